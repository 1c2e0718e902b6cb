"""Which delivery of a job goes first: a later delivery takes the run over, and a pending retry is waited for."""

from __future__ import annotations

import contextlib
import logging
import re
from typing import Any, NamedTuple

from .. import headers
from ..attempt import RetryPending, TakenOver
from ..connection import Connection, timestamp
from ..errors import AIQueueError
from ..journal import RETRY, STARTED
from ..lanes import Delivery
from ..topology import Family
from .opening import OpenedJob
from .settlement import retry_dedup_key
from .unknown_kinds import Hops, hop_of

log = logging.getLogger(__name__)

_WAIT_ID = re.compile(r"w\d+-\d+-n(\d+)")  # the parking id of a job that waits for its children

RETRY_WAIT_MIN_S = 1.0  # a retry that is due sooner than this runs at once
CLAIM_LEASES = 2  # after so many leases a later delivery's `started` no longer stops an earlier delivery of the message


class DeliveryOrder(NamedTuple):
    """Orders the deliveries of one job: a later delivery compares greater. `started` stores it as a list of three.

    `consumer_created_at` comes before `delivery_count`, because a recreated consumer counts from 1 again.
    """

    seq: float  # of the message in the work stream; a job that was parked has a new one
    consumer_created_at: float  # seconds since the epoch
    delivery_count: float  # how often this consumer has delivered the message

    @classmethod
    def of_entry(cls, data: Any) -> DeliveryOrder | None:
        """Read the order from the data of a `started` entry. None: the entry has none, or not one of three numbers."""
        stored = data.get("delivery") if isinstance(data, dict) else None
        if not isinstance(stored, list) or len(stored) != len(cls._fields):
            return None
        return cls(*stored) if all(isinstance(each, int | float) for each in stored) else None


def wait_of(parking_id: str) -> int:
    """Return the number of the wait for children that a parking id is of; 0 if the job was not parked by one."""
    found = _WAIT_ID.fullmatch(parking_id)
    return headers.number(found[1]) if found else 0


def find_pending_retry(delivery: Delivery, opened: OpenedJob, now: float) -> RetryPending | None:
    """Return RetryPending if the newest entry is a `retry` that this delivery must wait for. None: run the delivery.

    Such a delivery appears when a worker wrote `retry` and died, or lost its link, before it told the server.
    1. Another message of the run, which was parked for the attempt that failed, wrote the entry. Unless this message is
       one for the next attempt, it is left over from before: acknowledge it.
    2. This message wrote the entry, and was to be parked. Its delay is not over: park it for the rest of the delay.
    3. A message of a later hop of the job, which was parked aside, wrote the entry: acknowledge this message. So with a
       message that was parked by a later wait for children.
    """
    newest = opened.record.newest
    if newest is None or newest.event != RETRY or not isinstance(newest.data, dict):
        return None
    parking_id = headers.parking_id(opened.raw.headers)
    if hop_of(newest.parking_id) > Hops.of(delivery, now).number:
        return RetryPending(None)
    if wait_of(newest.parking_id) > headers.number(opened.raw.headers.get(headers.GATHER, "")):
        return RetryPending(None)
    if parking_id != newest.parking_id:
        was_parked = newest.parking_id == retry_dedup_key(delivery, newest.attempt)
        is_next = opened.first_attempt > newest.attempt  # parked for it, or a hop of the one that was
        return RetryPending(None) if was_parked and not is_next else None
    delay_s = newest.data.get("delay_s")
    if newest.data.get("parked") is not True or not isinstance(delay_s, int | float):
        return None
    left_s = min(delay_s, newest.time + delay_s - now)
    return RetryPending(left_s) if left_s >= RETRY_WAIT_MIN_S else None


def find_takeover(
    delivery: Delivery, opened: OpenedJob, order: DeliveryOrder, now: float
) -> TakenOver | RetryPending | None:
    """Return what to do if the newest `started` is of a later delivery than this one (`order`). None: run this one.

    1. It is of a later message of the run. That message was parked by a delivery of this one, which is left over:
       acknowledge it, RetryPending. Nothing else would end it where results are not kept.
    2. It is of the same message: give way, TakenOver. This counts for CLAIM_LEASES leases only, because the order of
       such deliveries can be wrong after a consumer was recreated, and without the limit no delivery would run.
    """
    started = opened.record.recap
    if started is None or started.event != STARTED:
        return None
    theirs = DeliveryOrder.of_entry(started.data)
    if theirs is None or not theirs > order:  # `<=` would take one with NaN for later
        return None
    if theirs.seq > delivery.seq:
        return RetryPending(None)
    if now - started.time < CLAIM_LEASES * delivery.lane.ack_wait_s:
        return TakenOver()
    log.warning("job %s is run again: its latest attempt has written nothing for two lengths of a lease", opened.job_id)
    return None


async def order_delivery(connection: Connection, delivery: Delivery, family: Family) -> DeliveryOrder:
    """Return the place of a delivery among those of its job, by which a later delivery is told from an earlier one.

    A recreated consumer counts deliveries from 1 again, so the place includes when the consumer was created. For a
    redelivery the server is asked, because another worker may have removed and recreated the consumer, or the server
    one in memory. The answer stays true: while a job of the consumer is in flight, the server keeps the consumer.
    """
    lane = delivery.lane
    if delivery.delivery_count > 1 and (family.lanes == "tenant" or family.lane_storage == "memory"):
        with contextlib.suppress(AIQueueError):
            info = await connection.api(f"CONSUMER.INFO.{lane.stream}.{lane.consumer}")
            lane.created = max(lane.created, timestamp(info["created"]))
    return DeliveryOrder(delivery.seq, lane.created, delivery.delivery_count)
