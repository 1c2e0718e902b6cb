"""The consumers of lanes on the server: creating them, removing those that nobody uses, and what is wrong with one."""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from datetime import UTC, datetime
from typing import Any

from ..connection import Connection, timestamp
from ..errors import AIQueueError, ConfigMismatch, NotFound, Unavailable
from ..subjects import Lane
from ..topology import Family, problems

log = logging.getLogger(__name__)

PAUSED_S = 3.0  # how long a consumer is paused while it is checked before its removal
DELETE_WITHIN_S = 2.0  # the end of the pause, which is left for the server to come to the removal
PAUSE_EXACT_S = 2e-6  # how exactly the server returns the end of a pause
NEW_S = 0.2  # a consumer that was created so long before the answer was made by it
REMOVE_API_S = 1.0  # timeout of each request meanwhile
REPORTED_MAX = 1_000


class LaneConsumers:
    """Creates and removes the consumers of lanes, and logs once what is wrong with one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._reported: set[str] = set()
        self.removes = True  # False: consumers have replicas, and stay

    async def create(self, family: Family, lane: Lane, config: dict[str, Any]) -> dict[str, Any]:
        """Create a lane's consumer, and return the server's information about it.

        1. It exists as declared: creating it changes nothing.
        2. It exists with other settings: it is used all the same, because it has the same jobs; this is reported.
        3. It vanishes meanwhile: raises Unavailable.

        The information on one that is not new is requested separately: the answer to CREATE may show the time of the
        server's restart as its creation time (docs/decisions/journal-runs.md).
        """
        name = f"{family.stream}.{config['durable_name']}"
        request = {"stream_name": family.stream, "config": config, "action": "create"}
        mismatch = None
        try:
            created = await self._connection.api(f"CONSUMER.CREATE.{name}.{config['filter_subject']}", request)
            if _is_new(created):
                return created
        except ConfigMismatch as error:
            if "already exists" not in str(error):
                raise
            mismatch = error
        try:
            info = await self._connection.api(f"CONSUMER.INFO.{name}")
        except NotFound as error:
            raise Unavailable(str(error)) from None  # another worker has just removed it
        # one that was paused differs because it was to be removed; in a cluster its pause may have outlived the try
        if mismatch is not None and not info["config"].get("pause_until"):
            self._report_mismatch(lane, mismatch, served=True)
        return info

    async def delete_broken(self, family: Family, consumer: str) -> None:
        """Delete a consumer whose files are gone on the server. Until then, creating it fails every time."""
        with contextlib.suppress(AIQueueError):
            await self._connection.api(f"CONSUMER.DELETE.{family.stream}.{consumer}")

    async def remove_if_unused(self, name: str, *, with_backlog: bool = False) -> bool:
        """Remove a consumer (`name`: stream.consumer) unless it is in use. Return False if it stays.

        `with_backlog`: jobs that it has not delivered yet do not count, because another consumer will deliver them.

        It is paused and checked again before it is deleted: otherwise it could deliver a job between check and
        deletion, and the job would be delivered twice.

        0. It has replicas: return False. An ack that they do not have yet would be lost with the consumer, and a
           replica of the stream that lags would deliver what is done already.
        1. It is in use before or during the pause: end the pause, return False.
        2. Another worker has paused it, before or meanwhile: leave it to that worker, return True.
        3. It is unused, and the pause is certain to hold: delete it, return True.
        """

        async def request(verb: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
            return await self._connection.api(f"CONSUMER.{verb}.{name}", body, timeout=REMOVE_API_S)

        asked_at = time.monotonic()
        before = await request("INFO")
        if before.get("paused"):
            return True
        if (before.get("cluster") or {}).get("replicas"):
            self.removes = False
            return False
        if not _is_unused(before, with_backlog=with_backlog):
            return False
        # random microseconds distinguish this pause from those of other workers
        info_took_s, asked_at = time.monotonic() - asked_at, time.monotonic()
        until = timestamp(before["ts"]) + info_took_s + PAUSED_S + secrets.randbelow(100_000) / 1e6
        await request("PAUSE", {"pause_until": datetime.fromtimestamp(until, UTC).isoformat(timespec="microseconds")})
        after = await request("INFO")
        pause_until = after["config"].get("pause_until")
        if pause_until is None or abs(timestamp(pause_until) - until) > PAUSE_EXACT_S:
            return True  # another worker's pause
        holds = (
            after.get("paused")
            and time.monotonic() - asked_at < PAUSED_S - DELETE_WITHIN_S
            and self._connection.connected
        )
        unused = _is_unused(after, with_backlog=with_backlog) and after["created"] == before["created"]
        if holds and unused:
            await request("DELETE")
            return True
        await request("PAUSE", {})
        return False

    # -- reports

    async def report_foreign_readers(self, family: Family) -> None:
        """Log an error for each other program that takes the jobs of a family."""
        for problem in await problems.find_foreign_readers(self._connection, family.stream, family.role, family.name):
            log.error("%s: %s -> %s", problem.stream, problem.text, problem.remedy)

    async def report_refusal(self, family: Family, lane: Lane, error: ConfigMismatch) -> None:
        """Log why the server refuses a lane's consumer, and the consumer of another program that is in its place."""
        if str(lane) in self._reported:
            return
        found = await problems.find_foreign_readers(self._connection, family.stream, family.role, family.name)
        others = [f"{each.text} -> {each.remedy}" for each in found if each.code == "foreign-consumer"]
        if others:
            self.report_once(lane, "; ".join(others), served=False)
        else:
            self._report_mismatch(lane, error, served=False)

    def _report_mismatch(self, lane: Lane, error: ConfigMismatch, *, served: bool) -> None:
        problem = f"{error}; `aiqueue plan` shows the difference, `aiqueue apply` corrects it"
        self.report_once(lane, problem, served=served)

    def report_once(self, lane: Lane, problem: str, *, served: bool) -> None:
        """Log an error about a lane, but not again every second."""
        if len(self._reported) >= REPORTED_MAX:
            self._reported.clear()
        if str(lane) not in self._reported:
            self._reported.add(str(lane))
            log.error("lane %s %s: %s", lane, "has drifted" if served else "cannot be served", problem)


def _is_new(info: dict[str, Any]) -> bool:
    """Whether an answer to CREATE is about a consumer that was not there before, on a server of its own."""
    age_s = timestamp(info["ts"]) - timestamp(info["created"])
    return "cluster" not in info and not info["delivered"]["consumer_seq"] and age_s < NEW_S


def _is_unused(info: dict[str, Any], *, with_backlog: bool) -> bool:
    """Whether a consumer has no open pulls and no jobs, those that it has not delivered yet included or not."""
    used = ["num_ack_pending", "num_redelivered", "num_waiting"]
    return not any(info[each] for each in (used if with_backlog else [*used, "num_pending"]))
