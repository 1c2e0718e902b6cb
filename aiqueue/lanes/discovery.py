"""Lane discovery: which lanes hold jobs, and from when to when this worker pulls on each of them.

Producers' hints announce a lane at once; a poll finds it within a second. A lane that stays idle is released. With many
lanes, not all are pulled on at a time (`rotation`), and one that was found with a backlog is removed as soon as it is
drained.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine
from functools import partial
from typing import Any

from .. import subjects
from ..connection import Connection, Received, Subscription, timestamp
from ..errors import AIQueueError, ConfigMismatch, NotFound, Unavailable
from ..subjects import Lane
from ..topology import Family
from . import line
from .consumers import PAUSED_S, LaneConsumers
from .delivery import SETTLED_S, LanePull
from .key_gate import KeyGate
from .line import LaneInLine
from .puller import Puller
from .rotation import Rotation

log = logging.getLogger(__name__)

POLL_S = 1.0
IDLE_S = 60.0  # a lane without a job for this long is released; the server removes its consumer by inactive_threshold
CREATE_AT_ONCE_MAX = 16
FEW_LANES = line.FEW_LANES  # with more open lanes, one in memory that had a backlog is removed when drained
BACKLOG_MIN = 8  # jobs; a lane with fewer is not worth the cost of removing its consumer
SETTLED_MAX_S = 5.0  # between two tries to remove a consumer; doubled up to this after each
REMOVE_AT_ONCE_MAX = 64
RECREATE_AFTER_S = 0.25  # earlier, the server may still remove the former consumer: docs/decisions/lane-made-anew.md
SUBJECTS_PAGE = 100_000  # the server's page size for the subjects of STREAM.INFO


class LaneDiscovery:
    """Finds the lanes of some families, and adds them to a puller while they are in use.

    `tenants`: None means all tenants. `keys`: where a family has a limit_key. `changed` is called when there may be
    something to pull. `poll_answered_at`: when the poll was last answered, monotonic seconds.

    A lane is in one of these states: opening (its consumer is being created), open (pulled on), settling (open, but
    drained or in line, and about to be removed), removing (its consumer is being removed). One that stands in line may
    be open, too: it is not pulled on, but its jobs are run and acknowledged.
    """

    def __init__(
        self,
        connection: Connection,
        puller: Puller,
        families: Collection[Family],
        *,
        tenants: Collection[str] | None,
        changed: Callable[[], None],
        keys: KeyGate | None = None,
    ) -> None:
        self._connection = connection
        self._consumers = LaneConsumers(connection)
        self._puller = puller
        self._keys = keys
        if keys is not None:
            puller.has_keys = True
        self._families = {family.name: family for family in families}
        self._tenants = None if tenants is None else frozenset(subjects.token("tenant", each) for each in tenants)
        self._changed = changed
        self._open: dict[Lane, LanePull] = {}
        self._opening: dict[Lane, int] = {}  # with their ranks
        self._hinted: set[Lane] = set()  # opening lanes that got a hint
        self._create_limit = asyncio.Semaphore(CREATE_AT_ONCE_MAX)
        self._settling: set[LanePull] = set()
        self._removing: dict[Lane, bool] = {}  # True: jobs were reported meanwhile, so open the lane again
        self.rotation = Rotation(
            puller, opening=self._opening, settling=self._settling, removing=self._removing,
            enter=self._begin_turn, leave=self._end_turn,
        )  # fmt: skip
        self._remove_limit = asyncio.Semaphore(REMOVE_AT_ONCE_MAX)
        self._remove_tasks: set[asyncio.Task[None]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._hint_subscriptions: list[Subscription] = []
        self._poller: asyncio.Task[None] | None = None
        self._poll_tasks: dict[str, asyncio.Task[None]] = {}
        self.poll_answered_at = 0.0
        self._is_paused: Callable[[Lane], bool] = lambda _lane: False
        self._stopped = False

    async def start(self) -> None:
        """Subscribe to hints, find all lanes once, and start the poll. Raises NotFound if a stream is missing."""
        for family in self._families.values():
            self._hint_subscriptions.append(
                await self._connection.subscribe(
                    f"{subjects.HINTS}.{family.name}.*.{'>' if family.limit_key else '*'}", self._on_hint
                )
            )
            await self._find_lanes(family)
            self._run(self._consumers.report_foreign_readers(family))
        self._poller = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        """Stop finding lanes. Safe twice and unstarted."""
        self._stopped = True
        await self.rotation.stop()
        if self._remove_tasks:
            await asyncio.wait(self._remove_tasks, timeout=PAUSED_S)  # so that they end the pauses they have started
        left = [task for task in (self._poller, *self._tasks, *self._remove_tasks) if task is not None]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        self._poller = None
        for subscription in self._hint_subscriptions:
            await subscription.close()
        self._hint_subscriptions.clear()

    @property
    def in_line(self) -> dict[str, int]:
        """How many lanes stand in line, by family."""
        return dict(Counter(waiting.lane.family for waiting in self.rotation.line))

    def set_paused(self, is_paused: Callable[[Lane], bool]) -> None:
        """Pull on the lanes for which this is false, and on no other, until the next call."""
        self._is_paused = is_paused
        changed = [pull for pull in self._open.values() if pull.paused != is_paused(pull.key)]
        resumed = [pull for pull in changed if pull.paused]
        for pull in resumed:
            pull.last_delivery_at = time.monotonic()  # idle, and quiet, from now on
        self._puller.set_paused([pull for pull in changed if not pull.paused], paused=True)
        self._puller.set_paused(resumed, paused=False)
        if self._poller is not None:  # lanes that were not open when they were paused
            for family in self._families.values():
                self._run(self._poll_family(family))
        self._changed()

    def on_consumer_gone(self, pull: LanePull) -> None:
        """The server no longer has a lane's consumer (inactive, deleted, lost in a restart): recreate it soon."""
        self._drop(pull)
        reopen = partial(self._want_lane, pull.key, jobs=1)  # the lane may still hold jobs
        asyncio.get_running_loop().call_later(RECREATE_AFTER_S, reopen)

    async def _poll(self) -> None:
        """Every POLL_S: find lanes, release idle ones, and repair lost pulls."""
        while True:
            await asyncio.sleep(POLL_S)
            for family in self._families.values():
                former = self._poll_tasks.get(family.name)
                if former is None or former.done():  # an unanswered request must not hold up the other families
                    task = self._poll_tasks[family.name] = asyncio.create_task(self._poll_family(family))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
            self._release_idle()
            self._puller.drop_lost_pulls()
            self.rotation.start()  # lanes that were open have got jobs
            self._changed()

    async def _poll_family(self, family: Family) -> None:
        """Find a family's lanes; log errors, because the poll comes again in a second."""
        try:
            await self._find_lanes(family)
        except AIQueueError as error:
            log.debug("finding lanes of %s: %s", family.name, error)
        except Exception:
            log.exception("finding lanes of %s failed", family.name)
        self._changed()

    async def _find_lanes(self, family: Family) -> None:
        """Ask the server which lanes of a family hold jobs, and open them. Raises NotFound (the stream is missing)."""
        if family.lanes == "shared":
            for priority in family.priorities:
                self._want_lane(Lane(family.name, "*", priority), jobs=1)
            self.poll_answered_at = time.monotonic()
            return
        request = {"subjects_filter": f"ai.{family.name}.>", "offset": 0}
        asked_at, is_first = time.monotonic(), self._poller is None
        while True:
            try:
                info = await self._connection.api(f"STREAM.INFO.{family.stream}", request)
            except NotFound:
                raise NotFound(f"there is no stream {family.stream}: run `aiqueue apply` first") from None
            self.poll_answered_at = time.monotonic()
            found = info["state"].get("subjects") or {}
            if self._keys is not None:
                self._keys.note_subjects(family, info["config"]["subjects"])
            reported = list(found.items())
            if is_first:  # among workers that start together, each has others of the lanes first
                random.shuffle(reported)
            for subject, jobs in reported:
                lane = subjects.parse_lane(subject)
                if lane is not None and lane not in self._removing:  # these numbers may be older than the removal
                    self._want_lane(lane, jobs=jobs, is_new=not is_first)
            if len(found) < SUBJECTS_PAGE:
                self._forget_empty(family, asked_at)
                return
            request["offset"] = int(str(request["offset"])) + len(found)

    def _on_hint(self, message: Received) -> None:
        """A producer reports jobs in a lane: open the lane, and keep it when it is drained.

        The producer relies on this worker now, and sends its next hint only after a while.
        """
        lane = subjects.parse_hint(message.subject)
        if lane.key and self._keys is not None and message.data:
            self._keys.learn(lane.family, message.data.decode(errors="surrogatepass"))
        if lane in self._opening:
            self._hinted.add(lane)
        elif lane in self._open:
            self._open[lane].remove_when_drained = False
        if (waiting := self.rotation.line.get(lane)) is not None:
            waiting.hinted = True
        self._want_lane(lane, jobs=1)

    def _want_lane(self, lane: Lane, *, jobs: int, is_new: bool = True) -> None:
        """A lane holds about `jobs` jobs: pull on it, if this worker serves its family and tenant.

        `is_new`: if it has to stand in line, it goes before those that had a turn already.
        """
        family = self._families.get(lane.family)
        if self._stopped or family is None or lane.priority not in family.priorities:
            return
        if lane.key and (self._keys is None or not family.limit_key):
            return
        if family.lanes == "shared":
            lane = Lane(lane.family, "*", lane.priority)
        elif self._tenants is not None and lane.tenant not in self._tenants:
            return
        waiting = self.rotation.line.get(lane)
        if waiting is not None:
            self.rotation.line.note_jobs(waiting, jobs, time.monotonic())
            return
        pull = self._open.get(lane)
        if pull is not None and not pull.in_line:
            pull.jobs_reported_at = time.monotonic()
            if lane.key and pull.pool is None and self._keys is not None:
                self._keys.find_pool(pull)
            self._puller.note_jobs(pull, jobs)
            self._changed()
            return
        if lane in self._removing:
            self._removing[lane] = True
            return
        if lane in self._opening or self._is_paused(lane):
            return
        now, rank = time.monotonic(), family.priorities.index(lane.priority)
        weight = family.weight(lane.tenant)
        waiting = LaneInLine(lane, rank, served_at=now, reported_at=now, jobs=jobs, weight=weight, is_new=is_new)
        if pull is not None or (self.rotation.is_full and _may_wait(family, lane)):
            self.rotation.add(waiting)
        else:
            self._begin_opening(family, waiting)

    def _begin_opening(self, family: Family, waiting: LaneInLine) -> None:
        self._opening[waiting.lane] = waiting.rank
        if waiting.hinted:
            self._hinted.add(waiting.lane)
        self._run(self._open_lane(family, waiting))

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _open_lane(self, family: Family, waiting: LaneInLine) -> None:
        """Create a lane's consumer, or use the existing one, and pull on it."""
        lane = waiting.lane
        try:
            config = family.lane_config(*lane[1:])
            name = config["durable_name"]
            if lane.key and self._keys is not None:
                await self._keys.find_text(family, lane)
            async with self._create_limit:
                info = await self._consumers.create(family, lane, config)
        except ConfigMismatch as error:
            await self._consumers.report_refusal(family, lane, error)
        except Unavailable as error:
            log.debug("lane %s: %s", lane, error)  # the poll tries again
            if "no such file" in str(error):
                await self._consumers.delete_broken(family, name)
        except AIQueueError as error:
            self._consumers.report_once(lane, str(error), served=False)
        else:
            self._start_pulling(family, waiting, name, info)
        finally:
            self._opening.pop(lane, None)
            self._hinted.discard(lane)

    def _start_pulling(self, family: Family, waiting: LaneInLine, consumer: str, info: dict[str, Any]) -> None:
        """Add a lane to the puller. `info`: what the server says of its consumer."""
        lane, may_wait = waiting.lane, _may_wait(family, waiting.lane)
        pull = LanePull(
            lane, family.stream, consumer, family.ack_wait_s, pending=waiting.jobs, rank=waiting.rank,
            weight=waiting.weight, created=timestamp(info["created"]), may_wait=may_wait, paused=self._is_paused(lane),
            remove_when_drained=may_wait and waiting.jobs >= BACKLOG_MIN and lane not in self._hinted,
        )  # fmt: skip
        self._open_pull(pull)
        pull.set_cap(info["config"].get("max_ack_pending", 0))
        (pull.turn or pull).served_at = waiting.served_at  # it has aged in line
        pull.owed = waiting.debt

    def _open_pull(self, pull: LanePull) -> None:
        self._open[pull.key] = pull
        if self._keys is not None:
            self._keys.join(pull)
        self._puller.add(pull)
        self._changed()

    def _release_idle(self) -> None:
        """Stop pulling on lanes that had no job for IDLE_S, once their last pull has expired."""
        now = time.monotonic()
        for pull in list(self._open.values()):
            if pull.in_line:
                if pull.idle and self.rotation.line.get(pull.key) is None:
                    self._drop(pull)
            elif pull.retiring and pull.idle:
                self._drop(pull)
            elif (
                pull.key.tenant != "*"
                and now - pull.last_delivery_at > IDLE_S
                and not pull.waiting
                and not pull.pending
            ):
                pull.retiring = True

    # -- lanes in line (docs/decisions/lanes-in-line.md)

    def _begin_turn(self, waiting: LaneInLine) -> None:
        """Pull on a lane that stood in line."""
        lane = waiting.lane
        if self._stopped or self._is_paused(lane):  # the poll finds it when it is resumed
            return
        pull = self._open.get(lane)
        if pull is None:
            self._begin_opening(self._families[lane.family], waiting)
            return
        pull.jobs_reported_at = waiting.reported_at
        pull.remove_when_drained, pull.settle_s = not waiting.hinted, SETTLED_S
        self._puller.begin_turn(pull, waiting.jobs)
        pull.owed = waiting.debt
        self._changed()

    def _end_turn(self, pull: LanePull, removal_pays: bool, debt: float) -> None:
        """Pull no more on a lane whose turn is over, and let it stand in line. Remove its consumer, if that pays."""
        now, hinted, jobs = time.monotonic(), not pull.remove_when_drained, pull.pending
        waiting = LaneInLine(pull.key, pull.rank, pull.given_at, now, jobs, pull.weight, hinted=hinted, debt=debt)
        self._puller.end_turn(pull)
        self.rotation.add(waiting, first=line.may_go_first(pull, now))
        if removal_pays and pull not in self._settling and self._consumers.removes:
            self._settle(pull)
        self._changed()

    def _forget_empty(self, family: Family, asked_at: float) -> None:
        """Take the lanes out of line that a poll, begun at `asked_at`, did not find: others have emptied them."""
        for waiting in list(self.rotation.line):
            lane = waiting.lane
            is_reported = waiting.reported_at >= asked_at or lane in self._removing  # of these nothing was read
            if lane.family == family.name and not is_reported:
                self.rotation.line.discard(lane)

    # -- removing drained lanes (docs/decisions/passing-lanes.md), and those in line

    def on_drained(self, pull: LanePull) -> bool:
        """Schedule the removal of a drained lane with `remove_when_drained`. Return False if the lane is to stay.

        It is removed only while lanes stand in line, or if it is in memory and one of more than FEW_LANES, because each
        consumer makes every ack of the stream slower.
        """
        if pull in self._settling:
            return True
        has_line = bool(self.rotation.line)
        is_many = self._families[pull.key.family].lane_storage == "memory" and len(self._open) > FEW_LANES
        if self._stopped or not (has_line or is_many) or not self._consumers.removes:
            return False
        self._settle(pull)
        return True

    def _settle(self, pull: LanePull) -> None:
        """Remove a lane's consumer after `settle_s` seconds, if it is unused then."""
        self._settling.add(pull)
        asyncio.get_running_loop().call_later(pull.settle_s, self._start_removal, pull)

    def _settle_later(self, pull: LanePull) -> None:
        pull.settle_s = min(SETTLED_MAX_S, 2 * pull.settle_s)
        self._settle(pull)

    def _start_removal(self, pull: LanePull) -> None:
        if not self._stopped:
            task = asyncio.create_task(self._remove_lane(pull))
            self._remove_tasks.add(task)
            task.add_done_callback(self._remove_tasks.discard)

    async def _remove_lane(self, pull: LanePull) -> None:
        """Remove the consumer of a lane that is drained or in line. If that fails, try again later.

        A drained lane is pulled on again meanwhile, and stays after some tries, or if there are jobs or a hint.
        """
        async with self._remove_limit:
            self._settling.discard(pull)
            if self._stopped or self._open.get(pull.key) is not pull:
                return
            in_line = pull.in_line
            if in_line and not pull.idle:
                self._settle_later(pull)
                return
            if not (in_line or (pull.remove_when_drained and pull.idle and pull.pending <= 0)):
                self._puller.pull_again(pull)  # jobs or a hint came meanwhile
                self._changed()
                return
            self._drop(pull)
            self._removing[pull.key] = False
            name = f"{pull.stream}.{pull.consumer}"
            try:
                removed = await self._consumers.remove_if_unused(name, with_backlog=in_line)
            except NotFound:
                removed = True
            except AIQueueError as error:
                log.debug("removing lane %s: %s", pull.key, error)
                removed = False
            finally:
                wanted = self._removing.pop(pull.key)
        if not removed and not self._stopped:
            if not in_line:  # it may hold jobs
                pull.pending, pull.remove_when_drained = 1, pull.settle_s < SETTLED_MAX_S
                pull.settle_s = min(SETTLED_MAX_S, 2 * pull.settle_s)
            elif self._consumers.removes:
                self._settle_later(pull)
            self._open_pull(pull)
        elif wanted:
            self._want_lane(pull.key, jobs=1)

    def _drop(self, pull: LanePull) -> None:
        """Stop pulling on a lane."""
        if self._open.get(pull.key) is pull:
            del self._open[pull.key]
            self._puller.remove(pull)
            if self._keys is not None:
                self._keys.leave(pull)


def _may_wait(family: Family, lane: Lane) -> bool:
    """Whether a lane may have to stand in line, and its consumer be removed.

    Only a tenant's own lane. Not if jobs are delivered only once: of a job that failed then, the consumer shows
    nothing. Not one of a limited key: it is pulled on only as far as its limit allows.
    """
    return family.lanes == "tenant" and not lane.key and family.max_deliver != 1
