"""Lists of jobs that have ended, the newest first: what their journals keep of each outcome."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .. import headers, subjects
from ..connection import Connection, Stored
from ..errors import BadInput, NotFound
from ..journal import CANCELLED, FAILED, RESULT, Entry, entry_from_stored
from ..topology import Family, Topology
from ..units import Duration, parse_duration, short_size, whole_number
from .job_list import ERROR_MAX, PAGE_MAX
from .shown_payload import cut
from .timeline import last_worker

OutcomeState = Literal["done", "failed", "cancelled"]
OUTCOME_STATES: tuple[OutcomeState, ...] = get_args(OutcomeState)
SEARCHED_MAX = 10_000  # stored entries that are looked at for one page
BLOCK, BLOCK_MAX = 1_024, 1_048_576  # sequences that are read in one go: more where few of them match
READ_MAX = 2_048  # entries of one block that are read: with more of them, the block was too large
_Read = tuple[int, float, "ListedOutcome | None"]  # sequence, time, and the outcome, if the entry is one
_STATE_OF: Mapping[str, OutcomeState] = {RESULT: "done", FAILED: "failed", CANCELLED: "cancelled"}


@dataclass(frozen=True, slots=True)
class ListedOutcome:
    """The outcome of one run of a job. Times are seconds since the epoch.

    - `kind`: "" where a former version has written the outcome, or a job was cancelled of which only the body says it.
    - `enqueued_at`, `started_at`: when the job was enqueued, and when its last attempt began; None: not known, or it
      never began. `run_s`: how long that attempt ran.
    - `result`: without its secrets, and cut to a bounded size; a large one is not read, and a text says its size.
    - `reason`, `error`, `worker`: of a job that has failed or was cancelled. `seq`: in the stream of journals.
    - `schedule`: the schedule that has enqueued the job; "" if there is none.
    """

    job_id: str
    family: str
    tenant: str
    kind: str
    state: OutcomeState
    """How the job has ended: done, failed or cancelled."""
    attempt: int
    seq: int
    ended_at: float
    """When the job ended."""
    enqueued_at: float | None
    started_at: float | None
    run_s: float | None
    result: Any = None
    reason: str = ""
    error: str = ""
    worker: str = ""
    unique: str = ""
    """Key of the caller, of which `job_id` is a hash; empty: the id is the key, or none is known."""
    schedule: str = ""


@dataclass(frozen=True, slots=True)
class OutcomePage:
    """One page of a list. `cursor`: where the next page starts; "": there is none. `searched`: how many stored entries
    were looked at, SEARCHED_MAX at most, so that a page may hold fewer outcomes than asked for, and have a cursor.
    """

    outcomes: tuple[ListedOutcome, ...]
    cursor: str
    searched: int


@dataclass(frozen=True, slots=True)
class OutcomeFilter:
    """Selects outcomes; None matches all. Create one with `make_outcome_filter`, which checks the values."""

    family: Family | None = None
    tenant: str | None = None
    kind: str | None = None
    states: frozenset[OutcomeState] = frozenset(OUTCOME_STATES)
    newer_s: float | None = None
    slower_s: float | None = None

    def matches(self, outcome: ListedOutcome) -> bool:
        """Whether it is selected, but for its age and its family."""
        return (
            self.tenant in (None, outcome.tenant)
            and self.kind in (None, outcome.kind)
            and outcome.state in self.states
            and (self.slower_s is None or (outcome.run_s is not None and outcome.run_s >= self.slower_s))
        )


def make_outcome_filter(
    topology: Topology,
    *,
    family: str | None = None,
    tenant: str | None = None,
    kind: str | None = None,
    state: OutcomeState | Collection[OutcomeState] | None = None,
    newer: Duration | None = None,
    slower: Duration | None = None,
) -> OutcomeFilter:
    """Return a filter. Raises BadInput (InvalidToken, UnknownFamily)."""
    declared = None if family is None else topology.family(family)
    if declared is not None and declared.journal is None:
        raise BadInput(f"family {family} keeps no journals, so its outcomes are not stored")
    if tenant is not None:
        subjects.token("tenant", tenant)
    wanted = frozenset(OUTCOME_STATES if state is None else [state] if isinstance(state, str) else state)
    if not wanted or (unknown := sorted(str(each) for each in wanted - set(OUTCOME_STATES))):
        named = ", ".join(unknown) if wanted else "none"
        raise BadInput(f"a state of an outcome is one of {', '.join(OUTCOME_STATES)}, not {named:.80}")
    newer_s = None if newer is None else parse_duration("newer", newer)
    slower_s = None if slower is None else parse_duration("slower", slower)
    return OutcomeFilter(declared, tenant, kind, wanted, newer_s, slower_s)


async def list_outcomes(
    connection: Connection, topology: Topology, wanted: OutcomeFilter, *, limit: int = 50, cursor: str = "",
    results: bool = True,
) -> OutcomePage:  # fmt: skip
    """Return the next `limit` outcomes (1 to PAGE_MAX) of a filter, the newest first, after a cursor.

    Raises BadInput, NotFound (the stream is missing: run `aiqueue apply`), AccessDenied, Unavailable.
    """
    whole_number("limit", limit, 1, PAGE_MAX)
    below = _parse_cursor(cursor) if cursor else None
    stream = topology.journal_stream.name
    try:
        state = (await connection.api(f"STREAM.INFO.{stream}"))["state"]
    except NotFound:
        raise NotFound(f"stream {stream} does not exist: run `aiqueue apply`") from None
    await connection.clock.ensure(topology.parked_stream.name)
    since = None if wanted.newer_s is None else connection.clock.now() - wanted.newer_s
    reader = _BackwardReader(connection, topology, wanted, int(state["first_seq"]), results=results)
    high = min(below or int(state["last_seq"]) + 1, int(state["last_seq"]) + 1)
    found: list[ListedOutcome] = []
    searched = 0
    while high > reader.first:
        block, high = await reader.read(high)
        for seq, at, outcome in reversed(block):
            searched += 1
            if since is not None and at < since:
                return OutcomePage(tuple(found), "", searched)
            if outcome is not None and wanted.matches(outcome):
                found.append(outcome)
            if len(found) == limit or searched >= SEARCHED_MAX:
                return OutcomePage(tuple(found), str(seq) if seq > reader.first else "", searched)
    return OutcomePage(tuple(found), "", searched)


def _parse_cursor(cursor: str) -> int:
    if not (cursor.isascii() and cursor.isdecimal() and len(cursor) < 19 and int(cursor) > 0):
        raise BadInput(f"a cursor is what a list before has returned, not {cursor!r:.80}")
    return int(cursor)


def _subject(wanted: OutcomeFilter) -> str:
    if wanted.family is None or wanted.family.journal is None:
        return ">"  # families may have journals of any number of tokens
    return subjects.journal(wanted.family.journal, wanted.tenant or "*", "*")


class _BackwardReader:
    """Reads journals from their end to their beginning, block by block: the server reads forward only."""

    def __init__(
        self, connection: Connection, topology: Topology, wanted: OutcomeFilter, first: int, *, results: bool
    ) -> None:
        self.first = max(1, first)
        self._connection, self._stream, self._subject = connection, topology.journal_stream.name, _subject(wanted)
        self._families = {each.journal: each.name for each in topology.families.values() if each.journal is not None}
        self._results = results
        self._size = BLOCK

    async def read(self, high: int) -> tuple[list[_Read], int]:
        """Return the entries below a sequence that match, the oldest first, and the sequence from which on all were
        read. There may be none.
        """
        while True:
            low = max(self.first, high - self._size)
            found = await self._read_between(low, high)
            if found is None:  # more than READ_MAX, which a block of BLOCK sequences cannot have
                self._size = max(BLOCK, self._size // 8)
                continue
            if len(found) < READ_MAX // 8:
                self._size = min(BLOCK_MAX, self._size * 2)
            return found, low

    async def _read_between(self, low: int, high: int) -> list[_Read] | None:
        """Entries are parsed at once: results may be large, and what is kept of them is not."""
        found: list[_Read] = []
        async with contextlib.aclosing(self._connection.read(self._stream, self._subject, seq=low)) as messages:
            async for stored in messages:
                if stored.seq >= high:
                    break
                found.append((stored.seq, stored.time, _parse(self._families, stored, results=self._results)))
                if len(found) > READ_MAX:
                    return None
        return found


def _parse(families: Mapping[str, str], stored: Stored, *, results: bool) -> ListedOutcome | None:
    """Return the outcome in an entry; None: it is none, or not of a declared family."""
    state = _STATE_OF.get(stored.headers.get(headers.EVENT, ""))
    family = families.get(stored.subject.rsplit(".", 2)[0])
    if state is None or family is None:
        return None
    entry = entry_from_stored(stored).masked()
    tenant, job_id = subjects.parse_journal(stored.subject)
    data = entry.data if state != "done" and isinstance(entry.data, dict) else {}
    return ListedOutcome(
        job_id=job_id, family=family, tenant=tenant, kind=entry.kind, state=state, attempt=entry.attempt, seq=entry.seq,
        ended_at=entry.time, enqueued_at=entry.enqueued_at, started_at=entry.started_at,
        run_s=None if entry.started_at is None else max(0.0, entry.time - entry.started_at),
        result=_show_result(entry) if results and state == "done" else None,
        reason=str(data.get("reason") or "")[:ERROR_MAX], error=str(data.get("error") or "")[:ERROR_MAX],
        worker=last_worker(data), unique=entry.unique, schedule=entry.schedule,
    )  # fmt: skip


def _show_result(entry: Entry) -> Any:
    if entry.document is not None:
        return f"… {short_size(entry.document.size)}, stored as a document"
    return cut(entry.data)
