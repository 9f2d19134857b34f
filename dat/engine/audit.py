"""The problems that an audit of a dataset finds, by kind, with examples."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dat.utils.files import write_json
from dat.utils.text import echo


@dataclass
class Problem:
    """One kind of problem: the number of cases, the first few of them, and whether it would stop training."""

    kind: str
    stops: bool
    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class Findings:
    """The problems of a split, by kind."""

    problems: dict[str, Problem] = field(default_factory=dict, kw_only=True)

    def add(self, kind: str, example: str, stops: bool = False, count: int = 1) -> None:
        """Counts a case of a kind of problem."""
        problem = self.problems.setdefault(kind, Problem(kind, stops))
        problem.count += count
        if len(problem.examples) < 5:
            problem.examples.append(example)

    @property
    def stops(self) -> bool:
        """Whether a problem would stop training on this split."""
        return any(problem.stops for problem in self.problems.values())


def format_problems(problems: Iterable[dict[str, Any]]) -> list[str]:
    """Lines of text for problems, given as dictionaries: those that stop training first, with three examples each."""
    lines = []
    for problem in sorted(problems, key=lambda problem: not problem["stops"]):
        mark = "STOPS TRAINING" if problem["stops"] else "warning"
        lines.append(f"  {mark}: {problem['kind']} ({problem['count']})")
        lines += [f"      {example}" for example in problem["examples"][:3]]
    return lines


def finish_audit(summaries: dict[str, dict[str, Any]], out: Path) -> None:
    """Writes audit.json, prints the verdict, and exits with code 1 if training would stop on any split."""
    write_json(out / "audit.json", summaries)
    stops = any(summary["stops_training"] for summary in summaries.values())
    echo(f"{'training would stop, see above' if stops else 'training can start'}; written to {out}")
    if stops:
        sys.exit(1)
