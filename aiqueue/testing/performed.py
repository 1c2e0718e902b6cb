"""What came of a call of a handler by `perform`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal

from ..job import M, Message
from ..payload import R_co, parse_message, parse_result

JobOutcome = Literal["done", "retry", "failed", "waiting", "cancelled", "unknown", "stale"]


@dataclass(frozen=True, slots=True)
class PerformedChild:
    """A job that the handler has enqueued as a child of its own. `data`: its message, as plain data.

    `delay_s`, `deadline_s`: seconds from now, as `Job.enqueue` was given them; None: not given.
    """

    name: str
    """Name of the child in its parent."""
    id: str
    """The child's job id."""
    kind: str
    """Kind of the child's message."""
    family: str
    """Family of the child's kind."""
    priority: str
    """Priority that the child is enqueued with."""
    data: dict[str, Any]
    delay_s: float | None = None
    deadline_s: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    """Headers that the handler has given to the child."""

    def message(self, model: type[M]) -> M:
        """Return the message as one of `model`. Raises DecodeError if it does not fit."""
        return parse_message(model, self.data)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Performed(Generic[R_co]):
    """What would have become of a job whose attempt was performed, and what its handler has reported.

    `outcome`:

    - **done**: the handler returned; see `result`
    - **retry**: the attempt failed, and the next one is due in `after_s` seconds at most. With jitter a worker waits a
      random time from `after_min_s` on
    - **failed**: the job becomes a dead letter, for `reason` (``attempts``, ``rejected``, ``invalid``, ``deadline``,
      ``result``, ``undecodable``)
    - **waiting**: `Job.gather` waits for children that have no outcome in the argument `children`
    - **cancelled**: it was stopped by `cancel_after`
    - **unknown**: the worker has no handler for the kind: the job is parked aside
    - **stale**: the handler raised Stale: another attempt has the job, and nothing follows

    `error` is one line, `traceback` the end of the traceback: as in a dead letter, without secrets. `exception` is what
    the handler raised, None if it raised nothing.

    `chunks`, `progress`, `calls`: what the handler has written, in order, as readers get it. `steps`: the results of
    all steps by name, those included that `perform` was given. `children`: see `PerformedChild`. `settled`: the last
    cost that ``job.settle`` was given. `pauses_key`: a ``Retry(pause="key")`` pauses the job's key for `after_s`.
    """

    outcome: JobOutcome
    """One of the words that are listed above."""
    job_id: str
    """Id that the job had in this attempt."""
    kind: str
    """Kind of the job's message."""
    attempt: int
    """Number of the attempt, from 1."""
    after_s: float | None = None
    """After how many seconds at most the next attempt is due; None: there is none."""
    after_min_s: float | None = None
    """The shortest delay that jitter can choose, in seconds; None: there is no next attempt."""
    reason: str = ""
    """Why the job becomes a dead letter, in one word; empty: it does not."""
    error: str = ""
    traceback: str = ""
    exception: BaseException | None = None
    pauses_key: bool = False
    chunks: tuple[Any, ...] = ()
    progress: tuple[tuple[float, str], ...] = ()
    steps: Mapping[str, Any] = field(default_factory=dict)
    calls: tuple[Any, ...] = ()
    children: tuple[PerformedChild, ...] = ()
    settled: float | None = None
    data: Any = None
    """Result of the handler, as plain data."""
    model: type[Message[Any]] | None = None
    """Class of the message; None for a handler for every kind."""

    @property
    def result(self) -> R_co:
        """The result, as `Handle.result` returns it: of the type that the message's class declares, or plain data.

        None if the handler keeps no result (``result=False``). Raises AssertionError, from the handler's exception, if
        the job is not done; ResultInvalid if the result is not of its type (`data` has it as plain data).
        """
        if self.outcome != "done":
            raise AssertionError(f"job {self.job_id} ({self.kind}) has no result: {self.describe()}") from (
                self.exception
            )
        if self.model is None:
            return self.data  # type: ignore[no-any-return]
        result: R_co = parse_result(self.model, self.data, job_id=self.job_id)
        return result

    def __repr__(self) -> str:
        return f"<Performed {self.kind}: {self.describe()}>"

    def describe(self) -> str:
        """Return the outcome in one line."""
        after = "" if self.after_s is None else f" in {self.after_s:g} s"
        reason = f" ({self.reason})" if self.reason else ""
        return f"{self.outcome}{after}{reason} on attempt {self.attempt}" + (f": {self.error}" if self.error else "")
