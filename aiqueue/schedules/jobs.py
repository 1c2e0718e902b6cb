"""The jobs of ticks: made, stored once, and looked for."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from .. import codec, headers, subjects
from ..connection import Connection
from ..enqueue import ChildJobs, KeyLanes, OnFull, StoredChild
from ..errors import BadInput, NotFound
from ..job import ChildSpec, MakeHeaders, Message, make_child_spec
from ..journal import Journal
from ..topology import Topology
from ..units import shown
from .document import FiredTick, ScheduleDocument
from .ticks import tick_text

STORE_S = 1.5  # below the ack_wait of ticks
MAKE_S = 30.0
DEDUP_S = 540.0  # a bit less than how long a work stream remembers a job's id
SCAN_MAX = 20_000  # jobs that are read through to find one
SCAN_KEPT_S = 60.0
SCANS_MAX = 64


class Tick(NamedTuple):
    """A tick, as the function gets it that makes its message. `at`: seconds since the epoch."""

    tenant: str
    """Tenant that the schedule belongs to."""
    schedule: str
    """The schedule's id."""
    at: float

    @property
    def time(self) -> datetime:
        """The tick's time, in UTC."""
        return datetime.fromtimestamp(self.at, UTC)


MakeMessage = Callable[[Tick], Message | Awaitable[Message]]
Makers = Mapping[tuple[str, str], MakeMessage]  # by tenant and id of the schedule


@dataclass(frozen=True)
class MessageMaker:
    """A function of the tick, and the family and kind of the messages that it makes."""

    make: MakeMessage
    family: str
    kind: str

    def __call__(self, tick: Tick) -> Message | Awaitable[Message]:
        return self.make(tick)


class MakerFailed(Exception):
    """The function that makes a schedule's messages has raised, or took longer than MAKE_S. The text says what."""


class NoMaker(Exception):
    """This worker does not have the function that makes a schedule's messages."""


class _Scan(NamedTuple):
    """When the jobs in a schedule's lanes were read, since which tick, and what was found."""

    at: float
    since: float
    found: dict[str, int]


class TickJobs:
    """Stores the jobs of ticks, under ids that name the tick: stored twice, a tick has one job."""

    def __init__(
        self,
        connection: Connection,
        topology: Topology,
        key_lanes: KeyLanes | None = None,
        makers: Makers | None = None,
        make_headers: MakeHeaders | None = None,
    ) -> None:
        """`make_headers`: the client's, for the messages that `makers` make."""
        self._connection = connection
        self._topology = topology
        self._jobs = ChildJobs(connection, topology, key_lanes)
        self._journal = Journal(connection, topology.journal_stream.name)
        self._makers = {} if makers is None else makers
        self._make_headers = make_headers
        self._scans: dict[tuple[str, str], _Scan] = {}

    async def make(self, document: ScheduleDocument, tick_ms: int) -> ChildSpec:
        """Return the job of a tick. Raises NoMaker, MakerFailed, BadInput."""
        if document.body is not None:
            secrets = {headers.SECRET: document.secrets} if document.secrets else {}
            return ChildSpec(
                "tick", document.kind, document.family, document.body, document.priority, None, document.deadline_s,
                dict(document.headers), secrets, [],
            )  # fmt: skip
        maker = self._makers.get((document.tenant, document.id))
        wanted = document.family, document.kind
        if maker is None or (isinstance(maker, MessageMaker) and (maker.family, maker.kind) != wanted):
            raise NoMaker(document.name)  # the schedule is declared by newer code, or by older
        message = await _call(maker, Tick(document.tenant, document.id, tick_ms / 1000))
        if not isinstance(message, Message) or (message.aiq_family, message.aiq_kind) != wanted:
            raise BadInput(f"the function must return a message of kind {document.kind}, not {shown(message)}")
        return make_child_spec(
            "tick", message, priority=document.priority, deadline=document.deadline_s, headers=document.headers,
            make_headers=self._make_headers,
        )  # fmt: skip

    def check(self, document: ScheduleDocument) -> None:
        """Raises BadInput if the jobs of a schedule could not be stored: family, priority, headers."""
        spec = ChildSpec(
            "tick", document.kind, document.family, document.body or b"", document.priority, None, None,
            dict(document.headers), {}, [],
        )  # fmt: skip
        self._jobs.lane_of(spec, document.tenant, document.priority)

    async def store(
        self, document: ScheduleDocument, spec: ChildSpec, tick_ms: int, job_id: str, *,
        on_full: OnFull = "raise", timeout_s: float = STORE_S,
    ) -> StoredChild:  # fmt: skip
        """Store the job of a tick. Raises QueueFull, BadInput, NotFound, AccessDenied, Unavailable."""
        inherited = {headers.SCHEDULED_BY: document.id, headers.SCHEDULED_FOR: tick_text(tick_ms)}
        family = self._topology.families.get(document.family)
        if family is None or document.priority not in family.priorities:  # the server's topology may be newer
            with contextlib.suppress(*([] if family is None else [NotFound])):
                return await self._store_unknown(document, spec, job_id, inherited, timeout_s)
        lane = self._jobs.lane_of(spec, document.tenant, document.priority)
        return await self._jobs.store(spec, lane, job_id, inherited, on_full=on_full, timeout_s=timeout_s)

    async def _store_unknown(
        self, document: ScheduleDocument, spec: ChildSpec, job_id: str, inherited: dict[str, str], timeout_s: float
    ) -> StoredChild:
        """Store a job of a family that another service declares, as a forwarder does: the subject says enough."""
        fields = {
            headers.MSG_ID: subjects.msg_id(document.family, document.tenant, job_id),
            headers.CONTENT_TYPE: codec.CBOR,
            headers.KIND: spec.kind,
            headers.JOB_ID: job_id,
            headers.PRIORITY: document.priority,
            **spec.secrets,
            **inherited,
            **spec.headers,
        }
        if spec.deadline_s is not None:
            fields[headers.DEADLINE] = str(round((self._connection.clock.now() + spec.deadline_s) * 1000))
        subject = subjects.work(document.family, document.tenant, document.priority)
        ack = await self._connection.store(subject, spec.body, fields, timeout_s=timeout_s)
        return StoredChild(ack.seq, ack.duplicate)

    async def list_forgotten(self, document: ScheduleDocument, since: float) -> dict[str, int]:
        """Return ids and sequences of jobs that are still stored and whose ids the stream may have forgotten: those
        since a tick that is later than the stream remembers ids. Before that, the stream itself knows what is stored.

        What was read within SCAN_KEPT_S is not read again: the stream remembers the jobs that were stored since.
        """
        now, name = self._connection.clock.now(), (document.name, document.family)
        if now - since <= DEDUP_S:
            return {}
        scan = self._scans.get(name)
        if scan is None or now - scan.at > SCAN_KEPT_S or since < scan.since:
            if len(self._scans) >= SCANS_MAX:
                self._scans.clear()
            scan = self._scans[name] = _Scan(now, since, await self.find_in_lanes(document, since))
        return scan.found

    async def find_in_journal(self, document: ScheduleDocument, job_id: str) -> int | None:
        """Return the sequence of a job that has a journal."""
        family = self._topology.families.get(document.family)
        if family is None or family.journal is None:
            return None
        head = await self._journal.head(subjects.journal(family.journal, document.tenant, job_id))
        return None if head is None else head.run

    async def find_in_lanes(self, document: ScheduleDocument, since: float) -> dict[str, int]:
        """Return ids and sequences of the schedule's jobs that are stored, of the first SCAN_MAX jobs since a time."""
        family, found, count = self._topology.families.get(document.family), dict[str, int](), 0
        if family is None:
            return found
        stored = self._connection.read(family.stream, f"ai.{family.name}.{document.tenant}.>", since=since - 1)
        async with contextlib.aclosing(stored):
            async for each in stored:
                count += 1
                if each.headers.get(headers.SCHEDULED_BY) == document.id:
                    found[each.headers.get(headers.JOB_ID, "")] = each.seq
                if count >= SCAN_MAX:
                    break
        return found

    async def is_unfinished(self, tenant: str, last: FiredTick) -> bool:
        """Return whether a tick's job has not ended: it is still where it was stored, or its journal has no last word.

        One without a trace has ended.
        """
        family = self._topology.families.get(last.family)
        if family is None:
            return False
        if family.journal is not None:
            head = await self._journal.head(subjects.journal(family.journal, tenant, last.job_id))
            if head is not None:
                return not head.final
        try:
            stored = await self._connection.get(family.stream, last.seq)
        except NotFound:
            return False
        return stored is not None and stored.headers.get(headers.JOB_ID) == last.job_id


async def _call(maker: MakeMessage, tick: Tick) -> Any:
    """Return what the owner's function returns. It has a task of its own: it may cancel that, or not end when that is
    cancelled. Raises MakerFailed, whatever the function raises: none of its errors are of the tick, its lane, or the
    server.
    """

    async def call() -> Any:
        try:
            made = maker(tick)
            return await made if inspect.isawaitable(made) else made
        except BaseException as error:  # sys.exit() in it would end each worker of the owner in turn
            raise MakerFailed(_text_of(error)) from error

    task = asyncio.create_task(call())
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody else asks a late one
    try:
        await asyncio.wait([task], timeout=MAKE_S)
    finally:
        task.cancel()
    if not task.done():
        raise MakerFailed(f"TimeoutError: it took longer than {MAKE_S:g} s")
    return task.result()


def _text_of(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}".removesuffix(": ")
    except Exception:  # noqa: BLE001  (of its `__str__`)
        return f"{type(error).__name__}: (its text cannot be read)"
