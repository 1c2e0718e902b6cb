"""What is kept of measurements: the rows of all questions, and how each was asked. A question asked again replaces its
own.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .report import Row


@dataclass
class Asked:
    """How a question was asked: with what, on which day, where, how long it took, and what its answer lacks."""

    rounds: int
    jobs: int
    day: str
    seconds: float
    machine: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Results:
    """Rows in the order of their questions; `failed` says why a question has no newer figures, or none."""

    rows: list[Row] = field(default_factory=list)
    asked: dict[str, Asked] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def of(self, question: str) -> list[Row]:
        return [row for row in self.rows if row.question == question]

    def put(self, question: str, rows: list[Row], asked: Asked) -> None:
        """Replace what was known of a question."""
        self.rows = [row for row in self.rows if row.question != question] + rows
        self.asked[question] = asked
        self.failed.pop(question, None)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Results:
        """What `write` wrote. Raises ValueError with one line for anything else."""
        try:
            plain = json.loads(path.read_text())
            return cls(
                rows=[Row.read(each) for each in plain["rows"]],
                asked={question: Asked(**each) for question, each in plain["asked"].items()},
                failed=dict(plain["failed"]),
            )
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not the results of a run ({type(error).__name__}: {error})") from None
