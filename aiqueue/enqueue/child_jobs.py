"""Stores children of jobs, encoded by the handler's process, with ids that their parent makes. And jobs of schedules,
which have such ids too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

from .. import codec, headers, subjects
from ..connection import Connection, block
from ..errors import AIQueueError, BadInput
from ..job import ChildSpec
from ..payload import Document
from ..topology import Topology
from ..tracing import Tracing, names
from .key_lanes import KeyLanes, key_headers
from .parking import Parking, resolve_due_at
from .producer import AttachedJob, Producer
from .refusals import OnFull, retry_while_full
from .templates import JobTemplate, checked_headers, checked_lane
from .traces import start_send

TIMEOUT_S = 30.0  # for storing a child, also while its lane is full
DEPTH_MAX = 32  # ancestors of a job


class StoredChild(NamedTuple):
    """What became of a child. `seq`: in its work stream, 0 for one that waits for its delay."""

    seq: int
    duplicate: bool


class ChildJobs:
    """Stores the children of one worker's jobs."""

    def __init__(
        self, connection: Connection, topology: Topology, key_lanes: KeyLanes | None = None,
        tracing: Tracing | None = None,
    ) -> None:  # fmt: skip
        self._producer = Producer(connection, topology, key_lanes, tracing=tracing)
        self._parking = Parking(connection, topology)
        self._topology = topology

    def lane_of(self, spec: ChildSpec, tenant: str, parents_priority: str) -> subjects.Lane:
        """Return the lane of a child. Raises BadInput for an unknown family, priority or header.

        Without a priority of its own it has its parent's, if its family has that.
        """
        lane = lane_of_child(self._topology, spec, tenant, parents_priority)
        return self._producer.lane_template(self._topology.family(lane.family), tenant, lane.priority).lane

    async def store(
        self, spec: ChildSpec, lane: subjects.Lane, job_id: str, inherited: Mapping[str, str], *,
        on_full: OnFull = "wait", timeout_s: float = TIMEOUT_S,
    ) -> StoredChild:  # fmt: skip
        """Store a child, once within the stream's duplicate window. `inherited`: the headers from its parent.

        While its lane is full, with `on_full` "wait" try again until `timeout_s` is over. Raises QueueFull, TooLarge,
        Unavailable, NotFound.
        """
        producer, end = self._producer, time.monotonic() + timeout_s
        if spec.delay_s is not None or spec.deadline_s is not None:
            await producer.clock.ensure(self._parking.stream)
        due_at = resolve_due_at(spec.delay_s, None, producer.clock)
        template = producer.body_template(
            producer.lane_template(self._topology.family(spec.family), lane.tenant, lane.priority), spec.body,
            content_type=codec.CBOR, kind=spec.kind,
        )  # fmt: skip
        header_block = block(self._headers(spec, template, job_id, inherited))
        with start_send(producer.tracing, template, job_id, header_block) as sending:
            sending.set(names.CHILD, spec.name)
            header_block = sending.add_to(header_block)
            attached = AttachedJob(header_block, spec.body, lane, {}, 0)
            if spec.documents or len(spec.body) > producer.body_max:
                attached = await producer.attach_documents(
                    None, template, header_block, spec.body, end=end, by_caller=True,
                    documents=[Document(**each) for each in spec.documents],
                )  # fmt: skip
            try:
                if due_at is not None:
                    return await self._park(template, job_id, due_at, attached, end)
                ack = await producer.store(template, attached.block, attached.body, on_full, end)
            except AIQueueError as error:
                await producer.release_unless_stored(attached, error)
                raise
            await producer.release_unless_stored(attached, ack)
            return StoredChild(ack.seq, ack.duplicate)

    async def _park(
        self, template: JobTemplate, job_id: str, due_at: float, attached: AttachedJob, end: float
    ) -> StoredChild:
        async def park(left_s: float) -> bool:
            enqueued = await self._parking.store_delayed(
                template, job_id, due_at, attached.block, attached.body, by_caller=True, timeout_s=left_s
            )
            return enqueued.duplicate

        duplicate = await retry_while_full(park, template, "wait", end - time.monotonic())
        if duplicate:
            await self._producer.documents.end_holds(template.lane.tenant, attached.document_headers)
        return StoredChild(0, duplicate)

    def _headers(
        self, spec: ChildSpec, template: JobTemplate, job_id: str, inherited: Mapping[str, str]
    ) -> dict[str, str]:
        """Return the headers of a child, in the order of those that `Producer` sets."""
        family, lane = template.family, template.lane
        fields = {
            headers.MSG_ID: subjects.msg_id(family.name, lane.tenant, job_id),
            headers.CONTENT_TYPE: codec.CBOR,
            headers.KIND: spec.kind,
            headers.JOB_ID: job_id,
            headers.PRIORITY: lane.priority,
        }
        if family.key:
            fields[family.key] = job_id
        fields |= key_headers(template.key)
        fields |= spec.secrets
        fields |= inherited
        if spec.deadline_s is not None:
            fields[headers.DEADLINE] = str(round((self._producer.clock.now() + spec.deadline_s) * 1000))
        return {**fields, **spec.headers}


def lane_of_child(topology: Topology, spec: ChildSpec, tenant: str, parents_priority: str) -> subjects.Lane:
    """Return the ordinary lane of a child; see `ChildJobs.lane_of`."""
    family = topology.family(spec.family)
    checked_headers(family, spec.headers)
    if spec.priority is None and parents_priority not in family.priorities and family.priorities:
        priority = subjects.NORMAL if subjects.NORMAL in family.priorities else family.priorities[0]
    else:
        priority = parents_priority if spec.priority is None else spec.priority
    return checked_lane(family, tenant, priority)


def inherited_headers(
    parent: subjects.ParentRun, parents_headers: Mapping[str, str], deadline: float | None
) -> dict[str, str]:
    """Return the headers that a child gets from its parent. Raises BadInput beyond DEPTH_MAX ancestors."""
    depth = headers.number(parents_headers.get(headers.DEPTH, "")) + 1
    if depth > DEPTH_MAX:
        raise BadInput(f"a job has at most {DEPTH_MAX} ancestors: a job that enqueues itself as its child has no end")
    root = headers.ascii_line(parents_headers.get(headers.ROOT, ""), 128) or f"{parent.family}/{parent.job_id}"
    fields = {headers.PARENT: str(parent), headers.ROOT: root, headers.DEPTH: str(depth)}
    if deadline is not None:
        fields[headers.DEADLINE] = str(round(deadline * 1000))
    return fields | headers.carried_tick(parents_headers)
