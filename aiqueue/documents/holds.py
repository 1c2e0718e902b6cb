"""Holds on documents, and stored documents as they are listed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..payload import Document

JOB, PUT = "job", "put"  # what holds a document: a job, or the time for which it was put
RESULT = "result"  # or a journal's entry, which has it in place of a large result
STEP = "step"  # or a run's entry, which has it in place of a large result of a step
HOLDERS = (JOB, PUT, RESULT, STEP)


class DocumentHold(NamedTuple):
    """One hold on a document. `by` is one of HOLDERS. `ref` is the name of the hold, which is in the headers of its job
    or entry. That of a STEP begins with the tokens of its run, so that all holds of a run can be ended at once.
    """

    tenant: str
    sha256: str
    by: str
    ref: str

    @classmethod
    def parse(cls, tokens: list[str]) -> DocumentHold:
        """Return the hold of the last tokens of its subject."""
        tenant, sha256, by, *ref = tokens
        return cls(tenant, sha256, by, ".".join(ref))


class Labels(NamedTuple):
    """The texts that a caller gives a document."""

    title: str = ""
    content_type: str = ""


@dataclass(frozen=True)
class ListedDocument:
    """A stored document: when it was last put or held (seconds since the epoch), and how many holds of each kind."""

    document: Document
    touched_at: float
    jobs: int
    puts: int
    results: int
    steps: int

    def summary(self) -> dict[str, object]:
        """Return the same as plain data."""
        return {**self.document.model_dump(), "touched_at": self.touched_at, "jobs": self.jobs, "puts": self.puts,
                "results": self.results, "steps": self.steps}  # fmt: skip
