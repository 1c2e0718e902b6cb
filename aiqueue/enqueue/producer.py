"""Enqueueing: from a message to a stored job."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from .. import headers, subjects
from ..connection import Connection, PubAck, block
from ..documents import Documents
from ..errors import AIQueueError, EncodeError, NotFound, QueueFull, Unavailable
from ..job import MakeHeaders, Message, add_made_headers, check_message
from ..payload import Document, encode_message, find_documents
from ..topology import Family, Topology
from ..tracing import Tracing
from ..units import Deadline, parse_duration, parse_time
from .fingerprints import Fingerprints
from .ids import resolve_job_id, with_header
from .key_lanes import KeyLanes, key_of_body, key_of_message, stated_key
from .refusals import FULL_FIRST_S, TRY_MIN_S, OnFull, StreamLimits, wait_while_full
from .templates import JobTemplate, checked_headers, checked_lane, headers_of_job
from .traces import start_send

HINT_EVERY_S = 20.0  # below the time after which a worker releases an idle lane (lanes.discovery.IDLE_S)
HINTED_MAX = 10_000
TEMPLATES_MAX = 10_000
ATTACH_AGAIN_S = 0.1  # the pause between tries to store a job's documents

_STREAM_LIMITS = (("bytes", "max_bytes"), ("messages", "max_msgs"))


class Enqueued(NamedTuple):
    """A stored job, and the sequence of its message in `stream`. `duplicate`: the job had been stored before.

    A delayed job has `due_at`, seconds since the epoch, and the `parking_id` under which it waits. `fingerprint`: that
    of its body, where it counts.
    """

    job_id: str
    lane: subjects.Lane
    stream: str
    seq: int
    duplicate: bool
    due_at: float | None = None
    parking_id: str = ""
    fingerprint: str = ""


class AttachedJob(NamedTuple):
    """The header block and body of a job, ready to be sent, and its documents, which are stored and held for it.

    `document_headers` name the documents and the hold on them; empty for a job without documents. `last_seq` is the
    last sequence of the job's stream before the job was sent.
    """

    block: bytes
    body: bytes
    lane: subjects.Lane
    document_headers: dict[str, str]
    last_seq: int


class Producer:
    """Stores jobs, and sends workers hints about lanes that may be new to them."""

    def __init__(
        self,
        connection: Connection,
        topology: Topology,
        key_lanes: KeyLanes | None = None,
        make_headers: MakeHeaders | None = None,
        *,
        tracing: Tracing | None = None,
    ) -> None:
        """`key_lanes`: where jobs of limited keys go. None: to the ordinary lanes. `make_headers`: the client's.

        `tracing`: what the spans of jobs are started by. None: there are none.
        """
        self.tracing = tracing
        self.connection = connection
        self.make_headers = make_headers
        self.key_lanes = key_lanes
        self.clock = connection.clock
        self.limits = StreamLimits(connection)
        self.topology = topology
        self._hinted_at: dict[subjects.Lane, float] = {}  # monotonic seconds
        self._templates: dict[tuple[type[Message], str, str, str], JobTemplate] = {}  # the last is the value of a key
        self.documents = Documents(connection, topology)
        self.body_max = self.documents.inline_max
        self.fingerprints = Fingerprints(connection, topology, self.documents)

    async def close(self) -> None:
        """End what was started in the background. Safe twice."""
        if self.key_lanes is not None:
            await self.key_lanes.close()

    async def enqueue(
        self,
        message: Message,
        *,
        tenant: str,
        priority: str = subjects.NORMAL,
        unique: str | None = None,
        extra: Mapping[str, str] | None = None,
        deadline: Deadline | None = None,
        on_full: OnFull = "raise",
        timeout_s: float = 30.0,
    ) -> Enqueued:
        """Store one job. Implements `Client.enqueue` for jobs without a delay; `extra` are the caller's headers."""
        template = self.template(message, tenant, priority, extra, deadline)
        job_id, by_caller, shown = resolve_job_id(template.family, message, unique, self.clock)
        header_block, body = template.header_block(job_id, self.clock), encode_message(message)
        if shown:
            header_block = with_header(header_block, headers.UNIQUE, shown)
        end, print_ = time.monotonic() + timeout_s, ""
        sending = None
        if self.tracing is not None:
            sending = start_send(self.tracing, template, job_id, header_block)
            header_block = sending.add_to(header_block)
        try:
            if by_caller and template.family.fingerprint is not None:
                print_ = await self.fingerprints.of_new(template.family, tenant, job_id, header_block, body)
            if message.aiq_documents or len(body) > self.body_max:
                ack = await self.store_with_documents(
                    message, template, header_block, body, on_full, end, by_caller=by_caller
                )
            else:
                ack = await self.store(template, header_block, body, on_full, end)
            # the server can know a fresh id only from an earlier try of this same call
            if print_ and ack.duplicate:
                await self.fingerprints.check_stored(template.family, tenant, job_id, print_, ack.stream, ack.seq)
        except BaseException as error:
            if sending is not None:
                sending.end(error)
            raise
        if sending is not None:
            sending.end()
        return Enqueued(job_id, template.lane, ack.stream, ack.seq, ack.duplicate and by_caller, fingerprint=print_)

    async def store(
        self, template: JobTemplate, header_block: bytes, body: bytes, on_full: OnFull, end: float
    ) -> PubAck:
        """Hint and store, until `end` (monotonic seconds). `on_full` "wait": retry with backoff while the lane is full.

        Raises QueueFull, Unavailable and what else `Connection.store` raises.
        """
        self.hint(template.lane, template.key)
        wait_s = FULL_FIRST_S
        while True:  # not by `retry_while_full`: that costs two more calls for each job
            left_s = max(TRY_MIN_S, end - time.monotonic())
            try:
                return await self.connection.store_block(
                    template.subject, header_block, body, stream=template.batch_stream, timeout_s=left_s
                )
            except QueueFull as error:
                wait_s = await wait_while_full(error, template, on_full, end, wait_s, self.limits)
            except NotFound:
                if not template.lane.key:
                    raise
                template = self.ordinary(template)

    # -- documents

    async def store_with_documents(
        self,
        message: Message | None,
        template: JobTemplate,
        header_block: bytes,
        body: bytes,
        on_full: OnFull,
        end: float,
        *,
        by_caller: bool,
    ) -> PubAck:
        """As `store`, for a job with documents or a large body. Raises what `attach_documents` and `store` raise."""
        attached = await self.attach_documents(message, template, header_block, body, end=end, by_caller=by_caller)
        try:
            ack = await self.store(template, attached.block, attached.body, on_full, end)
        except AIQueueError as error:
            await self.release_unless_stored(attached, error)
            raise
        await self.release_unless_stored(attached, ack)
        return ack

    async def attach_documents(
        self,
        message: Message | None,
        template: JobTemplate,
        header_block: bytes,
        body: bytes,
        *,
        end: float,
        by_caller: bool,
        documents: Sequence[Document] = (),
    ) -> AttachedJob:
        """Store a large body as a document, and hold all documents that the job needs.

        `message`: what the body was made of. None: the caller has encoded it, and found its other `documents`.
        `by_caller`: whether the job's id is the caller's.
        Call `release_unless_stored` once it is known whether the job was stored. While the server is unavailable, this
        is retried until `end` (monotonic seconds). Raises BadInput, NotFound, QueueFull, and at the end Unavailable.
        """
        try:
            if message is not None and message.aiq_documents:
                documents = tuple(find_documents(message))
        except Exception as error:
            raise EncodeError(
                f"the documents of the message cannot be read: {type(error).__name__}: {error}"
            ) from error
        large = len(body) > self.body_max
        if not documents and not large:
            return AttachedJob(header_block, body, template.lane, {}, 0)
        last_seq, held, problem = 0, None, "it took too long"
        try:
            async with asyncio.timeout(max(TRY_MIN_S, end - time.monotonic())) as limit:
                while held is None:
                    try:
                        if by_caller:  # a duplicate may be an earlier try of this call: its sequence is above this one
                            info = await self.connection.api(f"STREAM.INFO.{template.family.stream}")
                            last_seq = info["state"]["last_seq"]
                        held = await self.documents.attach(template.lane.tenant, documents, body if large else None)
                    except Unavailable as error:
                        problem = str(error)
                        if not error.retryable:
                            raise Unavailable(problem) from None
                        await asyncio.sleep(ATTACH_AGAIN_S)
        except TimeoutError:
            if not limit.expired():
                raise
            raise Unavailable(f"{template.lane}: the job's documents cannot be stored: {problem}") from None
        lines = "".join(f"{name}: {value}\r\n" for name, value in held.items())
        complete = header_block[:-2] + lines.encode() + header_block[-2:]
        return AttachedJob(complete, b"" if large else body, template.lane, held, last_seq)

    async def release_unless_stored(self, attached: AttachedJob, outcome: PubAck | AIQueueError) -> None:
        """Release a job's hold on its documents if it is certain that no stored job has this hold.

        1. The job was stored, or may have been stored: keep the hold.
        2. It was refused: release.
        3. It is a duplicate: release, unless the stored job is an earlier try of this call, with the same hold.

        Not for the PubAck of a parked job: `last_seq` is a sequence of the work stream.
        """
        if not attached.document_headers or (isinstance(outcome, Unavailable) and outcome.maybe_stored):
            return
        if isinstance(outcome, PubAck):
            if not outcome.duplicate:
                return
            if outcome.seq > attached.last_seq:
                with contextlib.suppress(AIQueueError):
                    stored = await self.connection.get(outcome.stream, outcome.seq)
                    ref = attached.document_headers[headers.DOCUMENT_REF]
                    if stored is not None and stored.headers.get(headers.DOCUMENT_REF) != ref:
                        await self.documents.end_holds(attached.lane.tenant, attached.document_headers)
                return
        await self.documents.end_holds(attached.lane.tenant, attached.document_headers)

    def template(
        self,
        message: Message,
        tenant: str,
        priority: str,
        extra: Mapping[str, str] | None = None,
        deadline: Deadline | None = None,
    ) -> JobTemplate:
        """Return the template for jobs like this one. It is cached unless there are `extra` headers or a deadline.

        Raises BadInput.
        """
        if self.make_headers is not None:
            extra = add_made_headers(self.make_headers, message, extra)
        if extra or deadline is not None or type(tenant) is not str or type(priority) is not str:
            return self._build_template(message, tenant, priority, extra, deadline, keyed=True)
        key = type(message), tenant, priority, ""  # by type: what is no message misses the cache, and is refused
        known = self._templates.get(key)
        if known is None:
            known = self._keep(key, self._build_template(message, tenant, priority, None, None, keyed=False))
        if known.family.limit_key is None or self.key_lanes is None:
            return known
        value = key_of_message(message, known.family.limit_key)
        token = self.key_lanes.token(known.family, tenant, value) if value else ""
        if not token:
            return known
        key = type(message), tenant, priority, value
        keyed = self._templates.get(key)
        if keyed is None or keyed.lane.key != token:
            keyed = self._keep(key, self._build_template(message, tenant, priority, None, None, keyed=True))
        return keyed

    def _keep(self, key: tuple[type[Message], str, str, str], template: JobTemplate) -> JobTemplate:
        if len(self._templates) >= TEMPLATES_MAX:
            self._templates.clear()
        self._templates[key] = template
        return template

    def _build_template(
        self,
        message: Message,
        tenant: str,
        priority: str,
        extra: Mapping[str, str] | None,
        deadline: Deadline | None,
        *,
        keyed: bool,
    ) -> JobTemplate:
        """Encode the headers once with made-up values for job id and deadline, and replace these by placeholders.

        `keyed`: the job may go into the lane of its limited key.
        """
        check_message(message)
        family = self.topology.family(message.aiq_family)
        extra = checked_headers(family, extra, message)
        value = ""
        if keyed and family.limit_key:
            value = key_of_message(message, family.limit_key) or stated_key(family, extra)
        template = self.lane_template(family, tenant, priority, value)
        lane, deadline_s = template.lane, None
        job_id, deadline_mark = subjects.new_id(), subjects.new_id()  # fresh ids, because they occur nowhere else
        job_headers = headers_of_job(family, message, lane, job_id, template.key)
        if isinstance(deadline, datetime):
            job_headers[headers.DEADLINE] = str(round(parse_time("deadline", deadline) * 1000))
        elif deadline is not None:
            deadline_s = parse_duration("deadline", deadline)
            job_headers[headers.DEADLINE] = deadline_mark
        job_headers.update(extra)
        raw = block(job_headers).replace(b"%", b"%%")
        header_template = raw.replace(job_id.encode(), b"%b").replace(deadline_mark.encode(), b"%d")
        id_count = raw.count(job_id.encode())
        return template._replace(
            header_template=header_template, id_count=id_count, deadline_s=deadline_s,
            model=None if message.aiq_result is Any else type(message),
        )  # fmt: skip

    def lane_template(self, family: Family, tenant: str, priority: str, key: str = "") -> JobTemplate:
        """Return a template without headers, for jobs that the caller has encoded. `key`: the value of their key, for
        which a limit may hold. Its `key` is empty in an ordinary lane, else it belongs in a header (`key_headers`).

        Raises BadInput.
        """
        lane = checked_lane(family, tenant, priority)
        token = self.key_lanes.token(family, tenant, key) if key and self.key_lanes else ""
        lane = lane._replace(key=token) if token else lane
        config = self.topology.streams[family.stream].config
        limits = {unit: config[key] for unit, key in _STREAM_LIMITS if config.get(key, 0) > 0}
        batch_stream = family.stream if config.get("allow_atomic") else ""
        return JobTemplate(
            family, lane, subjects.work(*lane), b"", 0, None, limits, batch_stream, None, key if token else ""
        )

    def body_template(
        self, template: JobTemplate, body: bytes, *, content_type: str, kind: str, stated: str = ""
    ) -> JobTemplate:
        """Return the template for a job with this body, of the family, tenant and priority of `template`, which has no
        headers. `stated`: the value of the limited key in a header, with which the body agrees. Raises BadInput.
        """
        if template.family.limit_key is None or self.key_lanes is None:
            return template
        value = stated or key_of_body(template.family, body, content_type=content_type, kind=kind)
        _, tenant, priority, _ = template.lane
        return self.lane_template(template.family, tenant, priority, value) if value else template

    def ordinary(self, template: JobTemplate) -> JobTemplate:
        """Return a template for the ordinary lane in place of one of a key, whose lane the stream has refused."""
        if self.key_lanes is not None:
            self.key_lanes.distrust(template.family)
        lane = template.lane.without_key
        return template._replace(lane=lane, subject=subjects.work(*lane))

    def request_headers(
        self, message: Message, tenant: str, priority: str, unique: str | None, extra: Mapping[str, str] | None
    ) -> tuple[Family, dict[str, str]]:
        """Return the family of a message, and the headers of a request for its job. Raises BadInput."""
        check_message(message)
        extra = add_made_headers(self.make_headers, message, extra)
        family = self.topology.family(message.aiq_family)
        lane = checked_lane(family, tenant, priority)
        job_id, _, shown = resolve_job_id(family, message, unique, self.clock)
        shown_headers = {headers.UNIQUE: shown} if shown else {}
        return family, {
            **headers_of_job(family, message, lane, job_id), **shown_headers, **checked_headers(family, extra, message),
        }  # fmt: skip

    def hint(self, lane: subjects.Lane, key: str = "") -> None:
        """Tell workers that a lane has jobs, at most once in HINT_EVERY_S. Never waits and never fails.

        `key`: the value of the limited key that the lane is of.
        """
        now = time.monotonic()
        if self._hinted_at.get(lane, -HINT_EVERY_S) + HINT_EVERY_S > now:
            return
        if len(self._hinted_at) >= HINTED_MAX:
            self._hinted_at.clear()
        try:
            self.connection.tell(subjects.hint(lane), subjects.hint_body(lane, key))
        except Unavailable:
            return  # the workers' poll finds the lane
        self._hinted_at[lane] = now


async def move_to_lane(
    connection: Connection,
    to: subjects.Lane,
    job_id: str,
    seq: int,
    job_headers: Mapping[str, str],
    body: bytes,
    *,
    key: str = "",
) -> None:
    """Store the job of sequence `seq` once more, in another lane of its family. The caller then acks the first one.

    `key`: what the lane of a limited key is of.

    Moving the same job twice stores one: the Msg-Id names the move. Raises QueueFull, Unavailable.
    """
    kept = headers.carried(job_headers, ours=True)
    kept |= {
        headers.MSG_ID: subjects.msg_id(to.family, to.tenant, job_id, f"lane-{seq}"),
        headers.JOB_ID: job_id,
        headers.PRIORITY: to.priority,
    }
    kept.pop(headers.LIMIT_KEY, None)
    if to.key:
        kept[headers.LIMIT_KEY] = headers.encode_key(key)
    await connection.publish(subjects.hint(to), subjects.hint_body(to, key))
    await connection.store(subjects.work(*to), body, kept)
