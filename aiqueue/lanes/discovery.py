"""Lane discovery: which lanes hold jobs, and from when to when this worker pulls on each of them.

Producers' hints announce a lane at once; a poll finds it within a second. A lane that stays idle is released. With many
lanes, a lane that was found with a backlog is removed as soon as it is drained.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Collection, Coroutine
from datetime import UTC, datetime
from functools import partial
from typing import Any

from .. import subjects
from ..connection import Connection, Received, Subscription, timestamp
from ..errors import AIQueueError, ConfigMismatch, NotFound, Unavailable
from ..subjects import Lane
from ..topology import Family, problems
from .delivery import LanePull
from .key_gate import KeyGate
from .puller import Puller

log = logging.getLogger(__name__)

POLL_S = 1.0
IDLE_S = 60.0  # a lane without a job for this long is released; the server removes its consumer by inactive_threshold
CREATE_AT_ONCE_MAX = 16
FEW_LANES = 128  # with more lanes than this, a lane in memory that was found with a backlog is removed when drained
BACKLOG_MIN = 8  # jobs; a lane with fewer is not worth the cost of removing its consumer
SETTLED_S = 0.1  # after the last delivery of a drained lane: by then its ack should have reached the server
REMOVE_AT_ONCE_MAX = 64
PAUSED_S = 2.0  # how long a consumer is paused while it is checked before its removal
PAUSE_EXACT_S = 2e-6  # how exactly the server returns the end of a pause
REMOVE_API_S = 1.0  # timeout of each request meanwhile
REPORTED_MAX = 1_000
RECREATE_AFTER_S = 0.25  # earlier, the server may still remove the former consumer: docs/decisions/lane-made-anew.md
SUBJECTS_PAGE = 100_000  # the server's page size for the subjects of STREAM.INFO


class LaneDiscovery:
    """Finds the lanes of some families, and adds them to a puller while they are in use.

    `tenants`: None means all tenants. `keys`: where a family has a limit_key. `changed` is called when there may be
    something to pull. `poll_answered_at`: when the poll was last answered, monotonic seconds.

    A lane is in one of these states: opening (its consumer is being created), open (pulled on), settling (open, but
    drained and about to be removed), removing (its consumer is being removed).
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
        self._puller = puller
        self._keys = keys
        if keys is not None:
            puller.has_keys = True
        self._families = {family.name: family for family in families}
        self._tenants = None if tenants is None else frozenset(subjects.token("tenant", each) for each in tenants)
        self._changed = changed
        self._open: dict[Lane, LanePull] = {}
        self._opening: set[Lane] = set()
        self._hinted: set[Lane] = set()  # opening lanes that got a hint
        self._create_limit = asyncio.Semaphore(CREATE_AT_ONCE_MAX)
        self._settling: set[LanePull] = set()
        self._removing: dict[Lane, bool] = {}  # True: jobs were reported meanwhile, so open the lane again
        self._remove_limit = asyncio.Semaphore(REMOVE_AT_ONCE_MAX)
        self._remove_tasks: set[asyncio.Task[None]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._hint_subscriptions: list[Subscription] = []
        self._poller: asyncio.Task[None] | None = None
        self._poll_tasks: dict[str, asyncio.Task[None]] = {}
        self.poll_answered_at = 0.0
        self._reported: set[str] = set()
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
            self._run(self._report_foreign_readers(family))
        self._poller = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        """Stop finding lanes. Safe twice and unstarted."""
        self._stopped = True
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
        while True:
            try:
                info = await self._connection.api(f"STREAM.INFO.{family.stream}", request)
            except NotFound:
                raise NotFound(f"there is no stream {family.stream}: run `aiqueue apply` first") from None
            self.poll_answered_at = time.monotonic()
            found = info["state"].get("subjects") or {}
            if self._keys is not None:
                self._keys.note_subjects(family, info["config"]["subjects"])
            for subject, jobs in found.items():
                lane = subjects.parse_lane(subject)
                if lane is not None and lane not in self._removing:  # these numbers may be older than the removal
                    self._want_lane(lane, jobs=jobs)
            if len(found) < SUBJECTS_PAGE:
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
        self._want_lane(lane, jobs=1)

    def _want_lane(self, lane: Lane, *, jobs: int) -> None:
        """A lane holds about `jobs` jobs: pull on it, if this worker serves its family and tenant."""
        family = self._families.get(lane.family)
        if self._stopped or family is None or lane.priority not in family.priorities:
            return
        if lane.key and (self._keys is None or not family.limit_key):
            return
        if family.lanes == "shared":
            lane = Lane(lane.family, "*", lane.priority)
        elif self._tenants is not None and lane.tenant not in self._tenants:
            return
        pull = self._open.get(lane)
        if pull is not None:
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
        self._opening.add(lane)
        self._run(self._open_lane(family, lane, jobs))

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _open_lane(self, family: Family, lane: Lane, jobs: int) -> None:
        """Create a lane's consumer, or use the existing one, and pull on it."""
        try:
            config = family.lane_config(*lane[1:])
            name = config["durable_name"]
            if lane.key and self._keys is not None:
                await self._keys.find_text(family, lane)
            async with self._create_limit:
                info = await self._create_consumer(family, lane, config)
        except ConfigMismatch as error:
            await self._report_refusal(family, lane, error)
        except Unavailable as error:
            log.debug("lane %s: %s", lane, error)  # the poll tries again
            if "no such file" in str(error):
                await self._delete_broken_consumer(family, name)
        except AIQueueError as error:
            self._report_once(lane, str(error), served=False)
        else:
            self._start_pulling(family, lane, name, jobs, created=timestamp(info["created"]))
        finally:
            self._opening.discard(lane)
            self._hinted.discard(lane)

    async def _create_consumer(self, family: Family, lane: Lane, config: dict[str, Any]) -> dict[str, Any]:
        """Create a lane's consumer, and return the server's information about it.

        1. It exists as declared: creating it changes nothing.
        2. It exists with other settings: it is used all the same, because it has the same jobs; this is reported.
        3. It vanishes meanwhile: raises Unavailable.

        The information is requested separately: when a consumer exists already, the answer to CREATE may show the time
        of the server's restart as its creation time (docs/decisions/journal-runs.md).
        """
        name = f"{family.stream}.{config['durable_name']}"
        request = {"stream_name": family.stream, "config": config, "action": "create"}
        mismatch = None
        try:
            await self._connection.api(f"CONSUMER.CREATE.{name}.{config['filter_subject']}", request)
        except ConfigMismatch as error:
            if "already exists" not in str(error):
                raise
            mismatch = error
        try:
            info = await self._connection.api(f"CONSUMER.INFO.{name}")
        except NotFound as error:
            raise Unavailable(str(error)) from None  # another worker has just removed it
        if mismatch is not None and not info.get("paused"):  # a paused one differs because it is about to be removed
            self._report_mismatch(lane, mismatch, served=True)
        return info

    async def _delete_broken_consumer(self, family: Family, consumer: str) -> None:
        """Delete a consumer whose files are gone on the server. Until then, creating it fails every time."""
        with contextlib.suppress(AIQueueError):
            await self._connection.api(f"CONSUMER.DELETE.{family.stream}.{consumer}")

    def _start_pulling(self, family: Family, lane: Lane, consumer: str, jobs: int, *, created: float) -> None:
        """Add a lane to the puller."""
        pull = LanePull(
            lane, family.stream, consumer, family.ack_wait_s, pending=jobs,
            rank=family.priorities.index(lane.priority), weight=family.weight(lane.tenant), created=created,
            remove_when_drained=self._may_remove_when_drained(family, lane, jobs), paused=self._is_paused(lane),
        )  # fmt: skip
        self._open_pull(pull)

    def _open_pull(self, pull: LanePull) -> None:
        self._open[pull.key] = pull
        if self._keys is not None:
            self._keys.join(pull)
        self._puller.add(pull)
        self._changed()

    def _may_remove_when_drained(self, family: Family, lane: Lane, jobs: int) -> bool:
        """Whether a lane's consumer may be removed as soon as its backlog is done.

        Only one in memory, of a tenant's own lane, with a backlog worth it, and without a hint. Not if jobs are
        delivered only once: of a job that failed then, the consumer shows nothing.
        """
        own = family.lanes == "tenant" and not lane.key and family.lane_storage == "memory" and not family.claim
        return own and family.max_deliver != 1 and jobs >= BACKLOG_MIN and lane not in self._hinted

    async def _report_foreign_readers(self, family: Family) -> None:
        """Log an error for each other program that takes the jobs of a family."""
        for problem in await problems.find_foreign_readers(self._connection, family.stream, family.role, family.name):
            log.error("%s: %s -> %s", problem.stream, problem.text, problem.remedy)

    async def _report_refusal(self, family: Family, lane: Lane, error: ConfigMismatch) -> None:
        """Log why the server refuses a lane's consumer, and the consumer of another program that is in its place."""
        if str(lane) in self._reported:
            return
        found = await problems.find_foreign_readers(self._connection, family.stream, family.role, family.name)
        others = [f"{each.text} -> {each.remedy}" for each in found if each.code == "foreign-consumer"]
        if others:
            self._report_once(lane, "; ".join(others), served=False)
        else:
            self._report_mismatch(lane, error, served=False)

    def _report_mismatch(self, lane: Lane, error: ConfigMismatch, *, served: bool) -> None:
        problem = f"{error}; `aiqueue plan` shows the difference, `aiqueue apply` corrects it"
        self._report_once(lane, problem, served=served)

    def _report_once(self, lane: Lane, problem: str, *, served: bool) -> None:
        """Log an error about a lane, but not again every second."""
        if len(self._reported) >= REPORTED_MAX:
            self._reported.clear()
        if str(lane) not in self._reported:
            self._reported.add(str(lane))
            log.error("lane %s %s: %s", lane, "has drifted" if served else "cannot be served", problem)

    def _release_idle(self) -> None:
        """Stop pulling on lanes that had no job for IDLE_S, once their last pull has expired."""
        now = time.monotonic()
        for pull in list(self._open.values()):
            if pull.retiring and pull.idle:
                self._drop(pull)
            elif (
                pull.key.tenant != "*"
                and now - pull.last_delivery_at > IDLE_S
                and not pull.waiting
                and not pull.pending
            ):
                pull.retiring = True

    # -- removing drained lanes (docs/decisions/passing-lanes.md)

    def on_drained(self, pull: LanePull) -> bool:
        """Schedule the removal of a drained lane with `remove_when_drained`. Return False if the lane is to stay.

        It is removed only if there are more than FEW_LANES, because each consumer makes every ack of the stream slower.
        """
        if pull in self._settling:
            return True
        if self._stopped or len(self._open) <= FEW_LANES:
            return False
        self._settling.add(pull)
        asyncio.get_running_loop().call_later(SETTLED_S, self._start_removal, pull)
        return True

    def _start_removal(self, pull: LanePull) -> None:
        if not self._stopped:
            task = asyncio.create_task(self._remove_lane(pull))
            self._remove_tasks.add(task)
            task.add_done_callback(self._remove_tasks.discard)

    async def _remove_lane(self, pull: LanePull) -> None:
        """Remove a drained lane's consumer. Pull on the lane again if there are jobs or a hint, or if removal fails."""
        async with self._remove_limit:
            self._settling.discard(pull)
            if self._stopped or self._open.get(pull.key) is not pull:
                return
            if not (pull.remove_when_drained and pull.idle and pull.pending <= 0):  # jobs or a hint came meanwhile
                self._puller.pull_again(pull)
                self._changed()
                return
            self._drop(pull)
            self._removing[pull.key] = False
            try:
                removed = await self._remove_consumer_if_unused(f"{pull.stream}.{pull.consumer}")
            except NotFound:
                removed = True
            except AIQueueError as error:
                log.debug("removing lane %s: %s", pull.key, error)
                removed = False
            finally:
                wanted = self._removing.pop(pull.key)
        if not removed and not self._stopped:
            pull.pending, pull.remove_when_drained = 1, False  # it may hold jobs
            self._open_pull(pull)
        elif wanted:
            self._want_lane(pull.key, jobs=1)

    async def _remove_consumer_if_unused(self, name: str) -> bool:
        """Remove a consumer unless it is in use. Return False if it stays, for this worker to pull on again.

        It is paused and checked again before it is deleted: otherwise it could deliver a job between check and
        deletion, and the job would be delivered twice.

        1. It is in use before or during the pause: end the pause, return False.
        2. Another worker has paused it, before or meanwhile: leave it to that worker, return True.
        3. It is unused, and the pause is certain to hold: delete it, return True.
        """

        async def request(verb: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
            return await self._connection.api(f"CONSUMER.{verb}.{name}", body, timeout=REMOVE_API_S)

        before = await request("INFO")
        if before.get("paused"):
            return True
        if not _is_unused(before):
            return False
        # random microseconds distinguish this pause from those of other workers
        until = timestamp(before["ts"]) + PAUSED_S + secrets.randbelow(100_000) / 1e6
        asked_at = time.monotonic()
        await request("PAUSE", {"pause_until": datetime.fromtimestamp(until, UTC).isoformat(timespec="microseconds")})
        after = await request("INFO")
        pause_until = after["config"].get("pause_until")
        if pause_until is None or abs(timestamp(pause_until) - until) > PAUSE_EXACT_S:
            return True  # another worker's pause
        holds = after.get("paused") and time.monotonic() - asked_at < PAUSED_S / 2 and self._connection.connected
        if holds and _is_unused(after) and after["created"] == before["created"]:
            await request("DELETE")
            return True
        await request("PAUSE", {})
        return False

    def _drop(self, pull: LanePull) -> None:
        """Stop pulling on a lane."""
        if self._open.get(pull.key) is pull:
            del self._open[pull.key]
            self._puller.remove(pull)
            if self._keys is not None:
                self._keys.leave(pull)


def _is_unused(info: dict[str, Any]) -> bool:
    """Whether a consumer has no jobs, delivered or not, and no open pulls."""
    return not any(info[each] for each in ("num_ack_pending", "num_pending", "num_redelivered", "num_waiting"))
