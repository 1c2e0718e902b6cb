"""Claim a run before its handler is called: of several deliveries of one job, one runs."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from ..attempt import AlreadyEnded, Duplicate, Outcome, Postponed, Refused
from ..enqueue import id_reused, trimmed
from ..errors import AccountFull, DiskFull, Stale
from ..journal import WRITE_TRIES_MAX, Writer
from ..lanes import Delivery
from ..requests import CHECK_AGAIN_S, Claims
from .opening import OpenedJob, Opener
from .takeover import DeliveryOrder, find_takeover, order_delivery

log = logging.getLogger(__name__)


class RunClaims:
    """The claims of one worker's deliveries on their runs. `worker`: its name."""

    def __init__(self, claims: Claims, opener: Opener, worker: str) -> None:
        self._claims = claims
        self._opener = opener
        self._worker = worker

    async def claim(self, delivery: Delivery, opened: OpenedJob, writer: Writer) -> Outcome | None:
        """Write `started`, after which no earlier attempt and no earlier cancellation can write to this run's journal.

        Optimistic concurrency decides: of several `started` at once the journal takes the first. Returns:
        1. None: the run is claimed. Also None where the journal has no space: the job then runs unclaimed.
        2. AlreadyEnded: the run has a final entry.
        3. Duplicate, Postponed: in a family with `claim`, another run holds the job id, or may come back and hold it.
           Refused: it holds the id with another body, in a family with `fingerprint`.
        4. TakenOver, RetryPending: a later delivery of this run has started.
        Raises Stale when others wrote WRITE_TRIES_MAX times meanwhile.
        """
        family = opened.family
        order = await order_delivery(self._claims.journal.connection, delivery, family)
        for _ in range(WRITE_TRIES_MAX):
            if opened.record.ended:
                return AlreadyEnded()
            if family.claim and opened.record.newest is None and opened.record.head_seq:
                taken = await self._claims.is_taken_by_other_run(
                    family, writer.subject, delivery.run, delivery.enqueued_at
                )
                if taken and await self._claims.has_other_body(
                    family, writer.subject, delivery.run, opened.fingerprint
                ):
                    return Refused("invalid", str(id_reused(opened.job_id)), holds_id=False)
                if taken is not False:
                    return Duplicate() if taken else Postponed(CHECK_AGAIN_S)
            if (
                late := find_takeover(delivery, opened, order, self._claims.journal.connection.clock.now())
            ) is not None:
                return late
            try:
                if await writer.write_started(self._started_data(delivery, opened, order)):
                    return None
            except (AccountFull, DiskFull) as error:  # only jobs that end make space, so this one must run
                log.warning("job %s runs without its `started` entry: %s", opened.job_id, error)
                return None
            await self._opener.load_earlier_attempts(delivery, opened, writer.subject)
            writer.start_after(opened.record, opened.attempt)
        raise Stale(f"{writer.subject}: others wrote first, {WRITE_TRIES_MAX} times", ended=False)

    async def yield_id(self, delivery: Delivery, opened: OpenedJob, writer: Writer, refused: Refused) -> Refused:
        """Return the outcome of a job that was refused, in a family with `claim`: whether it holds its id.

        One that was refused before it was claimed must not end the journal of another run.
        """
        record = opened.record
        if not refused.holds_id or record.newest is not None or not record.head_seq:
            return refused
        taken = await self._claims.is_taken_by_other_run(
            opened.family, writer.subject, delivery.run, delivery.enqueued_at
        )
        return refused if taken is False else replace(refused, holds_id=False)

    def _started_data(self, delivery: Delivery, opened: OpenedJob, order: DeliveryOrder) -> dict[str, Any]:
        """Return the data of a `started` entry. It keeps the count of a suspect's trials, if there were any."""
        newest = opened.record.newest
        trials = newest.data.get("trials") if newest is not None and isinstance(newest.data, dict) else None
        data = {"seq": delivery.seq, "delivery": list(order), "worker": self._worker}
        return data | {"history": trimmed(opened.history or []), **({} if trials is None else {"trials": trials})}
