"""Answers the request/reply subjects: "the answer to this request", stored or still to come."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from . import codec, headers, subjects
from .client import Client
from .connection import Answer, Endpoint, Received, Service
from .enqueue import Producer
from .errors import AIQueueError, BadInput, DecodeError, LaneFull, ResultTimeout, TooLarge, Unavailable  # fmt: skip
from .journal import RESULT, Entry, wait_for_outcome
from .requests import Claims, replies
from .topology import Family
from .units import seconds

log = logging.getLogger("aiqueue.responder")

NAME, VERSION = "aiqueue-responder", "1.0.0"  # among the micro services; the version is of what is answered, and how
MARGIN_S = 0.25  # the answer that there is none is sent so much earlier, to be there in time
WAIT_MAX_S = 3_600.0  # whatever deadline a request has
ENQUEUE_S = 10.0
HEADERS_ROOM = 512  # bytes of an answer's headers, at most


class Responder:
    """Answers requests on ``ai.gateway.responses.{tenant}``, ``ai.rag.results.{tenant}`` and those of other families
    whose file has `reply_within`.

    A request names a job by its id (the header ``request_id``, or a body that is only the id) and is answered when the
    job has ended. A full request whose id is unknown is enqueued once. It waits until the request's ``Aiq-Deadline``
    (milliseconds since the epoch, at most an hour), without one for the family's `reply_within`; what comes later is
    there for the next request.

    `families`: which ones to answer for; None is all that have a `reply_within`. `tenants`: whose requests; None is
    everybody's. `concurrency` (1 to 100,000, default 1,000) is how many requests may wait; one above that is told to
    ask again. `drain_timeout` (default "5s"): what those that wait get when it is told to stop. Several responders
    share the requests: they are NATS micro services in one queue group.
    """

    def __init__(
        self,
        *,
        families: Collection[str] | None = None,
        tenants: Collection[str] | None = None,
        concurrency: int = 1_000,
        drain_timeout: str | float = "5s",
    ) -> None:
        if isinstance(families, str) or isinstance(tenants, str):
            raise BadInput("families and tenants are lists of names")
        if isinstance(concurrency, bool) or not 1 <= concurrency <= 100_000:
            raise BadInput(f"concurrency must be from 1 to 100,000, not {concurrency!r}")
        self.families = None if families is None else tuple(families)
        self.tenants = None if tenants is None else tuple(subjects.token("tenant", each) for each in tenants)
        self.concurrency = concurrency
        self.drain_timeout_s = seconds(drain_timeout)

    @asynccontextmanager
    async def running(self, client: Client) -> AsyncIterator[Service]:
        """Answer beside other code on an open client; leaving the block drains.

        Raises UnknownFamily, BadInput where a family has no `reply_within`, AccessDenied, Unavailable.
        """
        endpoints = [
            Endpoint(
                f"{family.name.replace('.', '-')}{'' if tenant == '*' else f'-{tenant}'}",
                f"{family.journal}.{tenant}",
                _Desk(client, family, self).answer,
            )
            for family in self.answered(client)
            for tenant in self.tenants or ("*",)
        ]
        service = Service(
            client.connection, endpoints, name=NAME, version=VERSION,
            description="Answers to requests whose jobs aiqueue's workers run",
        )  # fmt: skip
        await service.start()
        try:
            yield service
        finally:
            await service.stop(self.drain_timeout_s)

    def answered(self, client: Client) -> list[Family]:
        """The families that it answers for."""
        if self.families is None:
            found = [each for each in client.topology.work_families if each.reply_within_s is not None]
        else:
            found = [client.topology.family(name) for name in self.families]
        for family in found:
            if family.reply_within_s is None:
                raise BadInput(f"family {family.name} answers no requests: state reply_within in {family.file}")
        if not found:
            raise BadInput("no family answers requests: state reply_within in a stream file")
        return found


class _Asked(NamedTuple):
    """A request as it was read. `full`: there is more than an id, and it can be enqueued."""

    tenant: str
    job_id: str
    full: bool
    until: float | None  # seconds since the epoch


class _Desk:
    """Answers for one family."""

    def __init__(self, client: Client, family: Family, responder: Responder) -> None:
        self._connection = client.connection
        self._journal = client.journal
        self._parking = client.parking
        self._claims = Claims(client.journal, client.parking)
        self._producer = Producer(client.connection, client.topology)  # for its hints
        self._family = family
        self._most = responder.concurrency
        self._waiting = 0

    async def answer(self, message: Received) -> Answer:
        """Never raises for anything that a request holds."""
        as_json = replies.is_json(message.headers.get(headers.CONTENT_TYPE, ""), message.data)
        job_id = ""
        self._waiting += 1
        try:
            asked = self._read(message)
            job_id = asked.job_id
            return self._said(await self._await(asked, message), job_id, as_json=as_json)
        except AIQueueError as error:
            return replies.refusal(error, job_id, as_json=as_json)
        except asyncio.CancelledError:
            return replies.refusal(Unavailable("this responder is leaving: ask again"), job_id, as_json=as_json)
        except Exception as error:
            log.exception("answering on %s", message.subject)
            return replies.refusal(AIQueueError(f"{type(error).__name__}: {error}"), job_id, as_json=as_json)
        finally:
            self._waiting -= 1

    def _said(self, entry: Entry, job_id: str, *, as_json: bool) -> Answer:
        """The answer that a last word is. Raises JobFailed, and TooLarge for a result that an answer cannot carry."""
        if entry.event != RESULT:
            raise entry.failure(job_id)
        answer = replies.result(entry.data, job_id, as_json=as_json)
        size = len(answer.body) + HEADERS_ROOM
        if size > self._connection.max_payload:
            raise TooLarge(size, self._connection.max_payload)
        return answer

    # -- reading

    def _read(self, message: Received) -> _Asked:
        """Which answer is asked for. Raises BadInput."""
        told, family, body = message.headers, self._family, message.data
        named: Any = told.get(headers.JOB_ID) or told.get(family.key or "")
        full = False
        if body.strip():
            try:
                data = codec.read(
                    body,
                    content_type=told.get(headers.CONTENT_TYPE, ""),
                    kind=told.get(headers.KIND, "")[:128],
                    default_kind=family.default_kind,
                    aliases=family.aliases,
                ).data
            except DecodeError as error:
                text = body.decode("ascii", "replace").strip().strip('"')
                if not subjects.TOKEN.fullmatch(text):
                    raise BadInput(f"the body is neither a request nor an id: {error.reason}") from None
                named = named or text
            else:
                named = named or data.get(family.key or "")
                full = any(key != family.key for key in data)
        tenant = subjects.token("tenant", message.subject.rpartition(".")[2])
        if not isinstance(named, str | int) or not str(named):
            if not full:
                raise BadInput(f"the request names no job: give the header {family.key}, or the id as the body")
            named = subjects.new_id()
        deadline = headers.number(told.get(headers.DEADLINE, ""))
        return _Asked(tenant, subjects.foreign_id(str(named)), full, deadline / 1000 if deadline else None)

    # -- finding the answer

    async def _await(self, asked: _Asked, message: Received) -> Entry:
        """The job's last word. Raises ResultTimeout, Unavailable, and what enqueueing raises."""
        if self._waiting > self._most:
            raise Unavailable(f"{self._most:,} requests wait here already: ask again")
        now, within_s = time.time(), self._family.reply_within_s or 0.0
        until = now + within_s if asked.until is None else min(asked.until, now + WAIT_MAX_S)
        end = time.monotonic() + until - now - MARGIN_S
        subject = subjects.journal(str(self._family.journal), asked.tenant, asked.job_id)
        head = await self._journal.head(subject)
        if head is not None and head.final:
            return head
        run = head.run if head is not None else 0
        if asked.full and not await self._known(asked, subject, begun=head is not None):
            await self._enqueue(asked, message)
            run = 0
        try:
            found = await wait_for_outcome(self._journal, subject, run=run, timeout_s=max(0.0, end - time.monotonic()))
        except ResultTimeout:
            raise ResultTimeout(f"job {asked.job_id} has not ended in time: ask again with its id") from None
        assert found is not None  # without a stored job to look at it waits for a word
        return found

    async def _known(self, asked: _Asked, subject: str, *, begun: bool) -> bool:
        """Whether the job has begun and is still there, or is parked. One that waits in its lane is not looked for: the
        server knows its Msg-Id, and of two messages of an id one is run.
        """
        if begun:
            return await self._claims.taken(self._family, subject, 0, math.inf) is not False
        lane = subjects.Lane(self._family.name, asked.tenant, "*")
        return bool(await self._parking.of(lane, asked.job_id))

    async def _enqueue(self, asked: _Asked, message: Received) -> None:
        """Store the request as a job, as its sender would have. Its deadline is the answer's, not the job's."""
        family, told = self._family, message.headers
        wished = told.get(headers.PRIORITY, "")
        lane = subjects.Lane(family.name, asked.tenant, wished if wished in family.priorities else subjects.NORMAL)
        kept = headers.carried(told) | {
            headers.MSG_ID: subjects.msg_id(family.name, asked.tenant, asked.job_id),
            headers.JOB_ID: asked.job_id,
            headers.PRIORITY: lane.priority,
        }
        for name in (headers.KIND, headers.CONTENT_TYPE):
            if name in told:
                kept[name] = headers.ascii_line(told[name], 128)
        if family.key:
            kept[family.key] = asked.job_id
        self._producer.hint(lane)
        try:
            await self._connection.store(subjects.work(*lane), message.data, kept, timeout_s=ENQUEUE_S)
        except LaneFull as error:
            raise LaneFull(str(lane), error.reason, limit=family.max_msgs_per_subject) from None
        except TooLarge as error:
            raise BadInput(f"the request cannot be enqueued: {error}") from None
