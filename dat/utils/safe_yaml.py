"""Reading YAML of unknown origin."""

from pathlib import Path
from typing import Any

import yaml

# Bounds of a document: characters, nodes after every alias is expanded, depth of nesting, characters of a number.
MOST_CHARACTERS, MOST_NODES, DEEPEST, LONGEST_NUMBER = 2**20, 100_000, 100, 100


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, as parse_yaml gives it. Raises OSError and ValueError."""
    with path.open(encoding="utf-8-sig") as file:
        return parse_yaml(file.read(MOST_CHARACTERS + 1))


def parse_yaml(text: str, strings: bool = False) -> Any:
    """The plain values of a YAML document.

    Args:
        text: document.
        strings: leave all scalars as text, as a class "no" or 1e3 is meant.

    Raises:
        ValueError: invalid YAML, a key that is used twice, or a document beyond the bounds above; on one line.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"has more than {MOST_CHARACTERS} characters")
    try:
        # Both are subclasses of PyYAML's safe loaders.
        return yaml.load(text, _TextLoader if strings else _ValueLoader)
    # PyYAML reads explicit tags without a check: "!!int ''" is an IndexError, "!!bool a" a KeyError.
    except (yaml.YAMLError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise ValueError(" ".join(str(error).split())) from error


class _Bounded(yaml.composer.Composer):
    """Counts nodes while they are composed, as aliases repeat nodes that are in memory only once."""

    def __init__(self, text: str) -> None:
        super().__init__(text)  # type: ignore[call-arg]
        self._depth = self._nodes = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event, before = self.peek_event(), self._nodes  # type: ignore[attr-defined]
        self._depth += 1
        if self._depth > DEEPEST:
            raise _error(f"is nested more than {DEEPEST} levels deep", event)
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if node not in self._sizes:
                raise _error(f"the alias {event.anchor} stands inside its own value", event)
            self._nodes += self._sizes[node]
        else:
            self._nodes += 1
            self._sizes[node] = self._nodes - before
        if self._nodes > MOST_NODES:
            raise _error(f"has more than {MOST_NODES} values, aliases expanded", event)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, Any]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise _error(f"the key {key.value[:100]!r} is used twice", key)
                seen.add((key.tag, key.value))
        return node


class _TextLoader(_Bounded, yaml.BaseLoader):
    pass


class _ValueLoader(_Bounded, yaml.SafeLoader):
    def construct_scalar(self, node: Any) -> Any:
        if node.tag.endswith((":int", ":float")) and len(node.value) > LONGEST_NUMBER:
            raise _error(f"the number {node.value[:20]}... has more than {LONGEST_NUMBER} characters", node)
        return super().construct_scalar(node)


def _error(problem: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)
