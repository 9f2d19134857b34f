"""What an audit of a data set finds: problems by kind, with examples."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Problem:
    """One kind of problem: how often it was met, the first few cases, and whether it would stop training."""

    kind: str
    stops: bool
    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class Findings:
    """The problems of a split, by kind."""

    problems: dict[str, Problem] = field(default_factory=dict, kw_only=True)

    def add(self, kind: str, example: str, stops: bool = False, count: int = 1) -> None:
        """Counts a problem of a kind."""
        problem = self.problems.setdefault(kind, Problem(kind, stops))
        problem.count += count
        if len(problem.examples) < 5:
            problem.examples.append(example)

    @property
    def stops(self) -> bool:
        """Whether training on this split would stop."""
        return any(problem.stops for problem in self.problems.values())


def format_problems(problems: Iterable[dict[str, Any]]) -> list[str]:
    """Problems, as dictionaries, in lines of text: those that stop training first, three examples of each."""
    lines = []
    for problem in sorted(problems, key=lambda problem: not problem["stops"]):
        mark = "STOPS TRAINING" if problem["stops"] else "warning"
        lines.append(f"  {mark}: {problem['kind']} ({problem['count']})")
        lines += [f"      {example}" for example in problem["examples"][:3]]
    return lines
