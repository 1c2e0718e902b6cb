"""The reconciler, of which every worker has one: it parks ticks that are missing, as after the loss of a message."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from dataclasses import replace
from typing import NamedTuple

from .. import codec, subjects
from ..connection import Connection
from ..errors import AIQueueError, BadInput, Conflict, DecodeError
from ..lanes import WarnOnce
from ..topology import Topology
from .document import ScheduleDocument, next_ms
from .store import ScheduleStore, StoredSchedule
from .ticks import STUCK_S, Ticks

log = logging.getLogger(__name__)

EVERY_S = 30.0
FIRST_S = 2.0  # after the start of a worker
TURN_KEY = "turn"  # of the bucket: until when one worker looks, and no other one
AT_ONCE = 32
YIELD_EVERY = 50  # schedules that are looked at without a pause
WRITE_S = 2.0


class _KnownTick(NamedTuple):
    """What the reconciler keeps of a schedule: the subject of its next tick as parked and as due, and its time."""

    parked: str
    due: str
    at: float  # when it fires, seconds since the epoch


class Reconciler:
    """Looks every EVERY_S, from `start` to `stop`, for schedules whose next tick is neither parked nor due.

    Of several workers one looks at a time: it takes a turn, which is a key of the bucket. A server without schedules is
    asked for the state of the bucket, and nothing else. Of the documents only those are read that are newer than the
    last look.
    """

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self._store = ScheduleStore(connection, topology)
        self._ticks = Ticks(connection, topology)
        self._known: dict[tuple[str, str], _KnownTick] = {}
        self._created = ""  # of the bucket: sequences begin anew when it is created again
        self._seq = 0  # of the newest document that was read
        self._moved: set[tuple[str, str]] = set()  # schedules whose next tick the time zone database has moved
        self._is_first = True
        self._warn_once = WarnOnce(log)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Safe twice."""
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Safe twice and unstarted."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _run(self) -> None:
        await asyncio.sleep(FIRST_S * random.uniform(0.5, 1.5))  # noqa: S311  (no secret)
        while True:
            try:
                if await self._has_schedules() and await self._take_turn():
                    await self.look()
            except AIQueueError as error:
                log.debug("looking for missing ticks: %s", error)
            except Exception:
                log.exception("looking for missing ticks failed; the next look is in %g s", EVERY_S)
            await asyncio.sleep(EVERY_S * random.uniform(0.9, 1.1))  # noqa: S311

    async def _has_schedules(self) -> bool:
        """Return whether the bucket has keys. Raises NotFound (there is no bucket), AccessDenied, Unavailable."""
        info = await self._connection.api(f"STREAM.INFO.{self._store.stream}")
        created, last_seq = info["created"], info["state"]["last_seq"]
        if created != self._created or last_seq < self._seq:
            self._created, self._seq = created, 0
            self._known.clear()
        return bool(info["state"]["messages"])

    async def _take_turn(self) -> bool:
        """Return whether this worker looks now. Raises as `ScheduleStore.put`."""
        subject, now = self._store.key(TURN_KEY), self._connection.clock.now()
        stored = await self._connection.last(self._store.stream, subject)
        if stored is not None:
            with contextlib.suppress(DecodeError, KeyError, TypeError):
                if now < codec.decode(stored.data, codec.CBOR)["until"] <= now + EVERY_S:  # else a clock was set back
                    return False
        body = codec.dump({"until": round(now + 0.8 * EVERY_S, 3)})
        try:
            await self._store.write(subject, stored.seq if stored else 0, body, {}, WRITE_S)
        except Conflict:
            return False
        return True

    async def look(self) -> int:
        """Park the ticks that are missing, and return how many. Raises NotFound, AccessDenied, Unavailable.

        The documents are read before the ticks: a tick that is fired in between is due until its next one is parked.
        """
        await self._refresh()
        stored = await self._ticks.list_subjects() if self._known else set()
        suspects = {name for name, known in self._known.items() if not {known.parked, known.due} & stored}
        stuck_since = self._connection.clock.now() - STUCK_S
        suspects |= {name for name, known in self._known.items() if known.at < stuck_since and known.parked in stored}
        suspects |= self._moved
        self._moved.clear()
        found, todo = 0, sorted(suspects)
        for at in range(0, len(todo), AT_ONCE):
            healed = await asyncio.gather(*(self._heal(*each) for each in todo[at : at + AT_ONCE]))
            found += sum(healed)
        return found

    async def _refresh(self) -> None:
        """Read the documents that are newer than those that are known."""
        now, count = self._connection.clock.now(), 0
        async for stored in self._store.read(seq=self._seq + 1):
            self._note(stored, now)
            self._seq = max(self._seq, stored.seq)
            count += 1
            if count % YIELD_EVERY == 0:
                await asyncio.sleep(0)
        self._is_first = False

    def _note(self, stored: StoredSchedule, now: float) -> None:
        key, document = (stored.tenant, stored.id), stored.document
        self._known.pop(key, None)
        if document is None or document.paused is not None or document.next_ms is None:
            if stored.problem:
                self._warn_once(stored.problem)
            return
        where = document.route, document.tenant, document.id
        parked, due, at = subjects.tick(*where, document.next_ms), subjects.tick(*where), document.next_ms / 1000
        if document.recurrence_document.get("jitter"):
            with contextlib.suppress(BadInput):
                at = document.recurrence.jittered(document.name, at)
        self._known[key] = _KnownTick(parked, due, at)
        if self._is_first and _moved_to(document, now) is not None:
            self._moved.add(key)

    async def _heal(self, tenant: str, schedule_id: str) -> bool:
        """Park the next tick of a schedule if it is missing. Return whether it was."""
        try:
            document = await self._store.get(tenant, schedule_id)
            if document is None or document.paused is not None or document.next_ms is None:
                self._known.pop((tenant, schedule_id), None)  # the marker of its end may be gone
                return False
            moved_to = _moved_to(document, self._connection.clock.now())
            if moved_to is not None:
                log.warning("schedule %s: its time zone has changed, and with it the next tick", document.name)
                moved = await self._store.put(replace(document, next_ms=moved_to))
                await self._ticks.unpark(document)
                document = moved
            elif await self._ticks.drop_stuck(document):
                log.warning("schedule %s: its next tick was parked and did not become due", document.name)
            elif await self._ticks.has(document):
                return False
            else:
                log.info("schedule %s: its next tick was missing", document.name)
            await self._ticks.park(document)
        except Conflict:
            return False  # somebody else is at it
        except (BadInput, DecodeError) as error:
            self._warn_once(f"schedule {tenant}.{schedule_id}: {error}")
            return False
        return True


def _moved_to(document: ScheduleDocument, now: float) -> int | None:
    """Return the next tick of a schedule if it is another one than was stored, because the time zones of this host are
    of another year; None if the stored one is right, or its time has come, or it cannot be known here.
    """
    if document.next_ms is None or document.next_ms / 1000 <= now:
        return None
    if document.recurrence_document.get("tz", "UTC") == "UTC":
        return None
    try:
        found = next_ms(document.recurrence, now)
    except BadInput:
        return None
    last = document.last.tick_ms if document.last is not None else 0
    return None if found is None or found <= last or found == document.next_ms else found
