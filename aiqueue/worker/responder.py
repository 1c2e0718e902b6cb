"""The responder: answers requests for a job's result, whether the result exists already or is still to come."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from .. import attempt, codec, headers, subjects
from ..attempt import PLAIN_TYPES, Outcome, Raised, Refused, Returned
from ..client import Client, check_client
from ..connection import Answer, Endpoint, Received, Service
from ..enqueue import Producer, fingerprint_of
from ..errors import (
    AccessDenied,
    AIQueueError,
    BadInput,
    Conflict,
    DecodeError,
    JobFailed,
    LaneFull,
    NotFound,
    QueueFull,
    ResponderError,
    ResultTimeout,
    TooLarge,
    Unavailable,
)  # fmt: skip
from ..job import Retry
from ..journal import EMPTY_RECORD, RESULT, Entry, RunRecord, wait_for_outcome
from ..payload import HeldDocument
from ..requests import Claims, ParsedRequest, find_bare_id, replies
from ..topology import Family
from ..units import Duration, parse_duration, texts, whole_number

log = logging.getLogger(__name__)

NAME, VERSION = "aiqueue-responder", "1.0.0"  # as a NATS micro service; the version is that of the answers
MARGIN_S = 0.25  # a timeout is answered this much before the request's deadline, to arrive in time
WAIT_MAX_S = 3_600.0  # also for requests with a later deadline
ENQUEUE_S = 10.0
HEADERS_BYTES_MAX = 512  # of an answer
EXPECTED_MSG_ID, NO_MSG_ID = "Nats-Expected-Last-Msg-Id", "none"  # ours begin with a tenant and a slash
STORE_TRIES_MAX = 8  # of an answer, in a journal that others write to meanwhile


class Request(NamedTuple):
    """A request for a result, as the function `answer` of a `Responder` gets it. `id`: that of the job."""

    family: str
    tenant: str
    id: str
    subject: str
    reply: str
    headers: Mapping[str, str]
    body: bytes


AnswerFunction = Callable[[Request], Awaitable[Any]]


class Responder:
    """Answers requests on ``ai.gateway.responses.{tenant}``, ``ai.rag.results.{tenant}``, and the answer subjects of
    all other families whose stream file has `reply_within`.

    A request names a job by its id: in a header such as ``request_id``, or as its whole body. It is answered when the
    job has ended. A request with more than an id is enqueued if no job of the id exists. The responder waits until the
    request's ``Aiq-Deadline`` (milliseconds since the epoch, at most an hour), or without one for the family's
    `reply_within`. A later outcome is the answer to the next request.

    - `families`: the families to answer for; None: all with `reply_within`.
    - `tenants`: the tenants to answer; None: all.
    - `concurrency` (1 to 100,000, default 1,000): how many requests may wait, and how many calls of `answer` may run.
      Further ones get a retryable error.
    - `drain_timeout` (default "5s"): how long waiting requests are still answered after the responder is stopped.
    - `answer`: an async function that returns the result for a request whose id has no job, in place of enqueueing it.
      The result is stored once, in the journal of the id. If the function raises, nothing is stored, and the requester
      gets ResponderError; for `Reject` JobFailed, and for `Retry` the requester asks again, within its timeout. A
      request that holds nothing but an id waits for its job as without this function.

    Several responders share the requests: they are NATS micro services in one queue group.
    """

    def __init__(
        self,
        *,
        families: Collection[str] | None = None,
        tenants: Collection[str] | None = None,
        concurrency: int = 1_000,
        drain_timeout: Duration = "5s",
        answer: AnswerFunction | None = None,
    ) -> None:
        if answer is not None:
            attempt.is_async_handler(
                answer, rule="answer must be an async function of one request", argument="the request",
                instead_of_yield="return the result",
            )  # fmt: skip
        self.answer_function = answer
        self.families = None if families is None else texts("families", families)
        self.tenants = (
            None if tenants is None else tuple(subjects.token("tenant", each) for each in texts("tenants", tenants))
        )
        self.concurrency = whole_number("concurrency", concurrency, 1, 100_000)
        self.drain_timeout_s = parse_duration("drain_timeout", drain_timeout)

    @asynccontextmanager
    async def running(self, client: Client) -> AsyncIterator[Service]:
        """Answer requests while the block runs, on an open client. Leaving the block drains.

        Raises UnknownFamily, BadInput if a family has no `reply_within`, AccessDenied, Unavailable.
        """
        check_client(client)
        answerers = [(_FamilyResponder(client, family, self), family) for family in self.answered(client)]
        endpoints = [
            Endpoint(
                f"{family.name.replace('.', '-')}{'' if tenant == '*' else f'-{tenant}'}",
                f"{family.journal}.{tenant}",
                answerer.answer,
            )
            for answerer, family in answerers
            for tenant in self.tenants or ("*",)
        ]
        service = Service(
            client.connection, endpoints, name=NAME, version=VERSION,
            description="Answers requests for the results of aiqueue jobs",
        )  # fmt: skip
        await service.start()
        try:
            yield service
        finally:
            await service.stop(self.drain_timeout_s)
            for answerer, _ in answerers:
                await answerer.close()

    def answered(self, client: Client) -> list[Family]:
        """Return the families that it answers for. Raises UnknownFamily, BadInput."""
        if self.families is None:
            found = [each for each in client.topology.work_families if each.reply_within_s is not None]
        else:
            found = [client.topology.family(name) for name in self.families]
        for family in found:
            if family.reply_within_s is None:
                raise BadInput(f"family {family.name} answers no requests: {family.advise_to_set('reply_within')}")
        if not found:
            raise BadInput("no declared family answers requests: set reply_within in a stream file or an overlay")
        return found


class _FamilyResponder:
    """Answers the requests of one family."""

    def __init__(self, client: Client, family: Family, responder: Responder) -> None:
        self._connection = client.connection
        self._journal = client.journal
        self._parking = client.parking
        self._claims = Claims(client.journal, client.parking)
        self._producer = Producer(client.connection, client.topology)  # for its hints
        self._documents = client.documents
        self._family = family
        self._answer_function = responder.answer_function
        self._closed = False
        self._answering: dict[str, asyncio.Task[Entry]] = {}  # calls of that function, by the id's journal
        self._waiting_max = responder.concurrency
        self._waiting = 0

    async def close(self) -> None:
        """Cancel the calls of the answer function that nobody waits for any more."""
        self._closed = True
        tasks = list(self._answering.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def answer(self, message: Received) -> Answer:
        """Return the answer to a request. Every error becomes an answer; nothing in a request makes this raise."""
        headers.restore_case(message.headers)
        as_json = replies.is_json(message.headers.get(headers.CONTENT_TYPE, ""), message.data)
        job_id = ""
        self._waiting += 1
        try:
            request = self._parse_request(message)
            job_id = request.job_id
            entry = await self._wait_for_final_entry(request, message)
            request.check_body(entry)
            return await self._to_answer(entry, job_id, as_json=as_json)
        except AIQueueError as error:
            return replies.error_answer(error, job_id, as_json=as_json)
        except asyncio.CancelledError:
            return replies.error_answer(
                Unavailable("this responder is stopping: repeat the request"), job_id, as_json=as_json
            )
        except Exception as error:
            log.exception("answering a request on %s failed", message.subject)
            return replies.error_answer(AIQueueError(f"{type(error).__name__}: {error}"), job_id, as_json=as_json)
        finally:
            self._waiting -= 1

    async def _to_answer(self, entry: Entry, job_id: str, *, as_json: bool) -> Answer:
        """Return a job's final entry as an answer. Raises JobFailed, NotFound if a large result is not kept any more.

        A result that is stored as a document is answered whole if it fits into a message, else by a reference.
        Raises TooLarge if another result exceeds a message.
        """
        if entry.event != RESULT:
            raise entry.as_error(job_id)
        document, value, max_payload = entry.document, entry.data, self._connection.max_payload
        if document is not None and document.size + HEADERS_BYTES_MAX <= max_payload:
            value = await self._documents.read_result(document)
        elif document is not None:
            return replies.reference_answer(document, job_id, as_json=as_json, secrets=entry.secrets)
        answer = replies.result_answer(value, job_id, as_json=as_json, secrets=entry.secrets)
        size_bytes = len(answer.body) + HEADERS_BYTES_MAX
        if size_bytes <= max_payload:
            return answer
        if document is not None:
            return replies.reference_answer(document, job_id, as_json=as_json, secrets=entry.secrets)
        raise TooLarge(size_bytes, max_payload)

    # -- reading a request

    def _parse_request(self, message: Received) -> ParsedRequest:
        """Return which job a request is about. Raises BadInput."""
        request_headers, family, body = message.headers, self._family, message.data
        job_id = subjects.id_in_message(request_headers.get(headers.JOB_ID))
        job_id = job_id or subjects.id_in_message(headers.find(request_headers, family.key or ""))
        can_enqueue, fingerprint, problem = False, "", ""
        if body.strip():
            try:
                data = codec.decode_message(
                    body,
                    content_type=request_headers.get(headers.CONTENT_TYPE, ""),
                    kind=request_headers.get(headers.KIND, "")[:128],
                    default_kind=family.default_kind,
                    aliases=family.aliases,
                ).data
            except DecodeError as error:
                text = find_bare_id(body, request_headers.get(headers.CONTENT_TYPE, ""))
                if not text:
                    raise BadInput(f"the body is neither a request nor an id: {error.reason}") from None
                job_id = job_id or text
            else:
                job_id = job_id or subjects.id_in_message(data.get(family.key or ""))
                can_enqueue = any(key != family.key for key in data)
                problem = headers.take_fields(request_headers, family.header_fields, data)
                if can_enqueue and job_id is not None:
                    fingerprint = fingerprint_of(family, data, body)
        tenant = subjects.token("tenant", message.subject.rpartition(".")[2])
        if job_id is None:
            if not can_enqueue:
                raise BadInput(f"the request names no job: set the header {family.key}, or send the id as the body")
            job_id = subjects.new_id()
        if problem := problem or headers.find_malformed(request_headers):
            raise BadInput(problem)
        deadline = headers.milliseconds(request_headers.get(headers.DEADLINE, ""))
        return ParsedRequest(tenant, job_id, can_enqueue, deadline, fingerprint)

    # -- finding the answer

    async def _wait_for_final_entry(self, request: ParsedRequest, message: Received) -> Entry:
        """Return the job's final entry, once it is written. If no job of the id exists, enqueue the request first.

        Raises ResultTimeout, Unavailable, and what enqueueing raises.
        """
        if self._waiting > self._waiting_max:
            raise Unavailable(f"{self._waiting_max:,} requests wait here already: repeat the request")
        now, within_s = self._connection.clock.now(), self._family.reply_within_s or 0.0
        deadline = now + within_s if request.deadline is None else min(request.deadline, now + WAIT_MAX_S)
        end = time.monotonic() + deadline - now - MARGIN_S
        subject = subjects.journal(str(self._family.journal), request.tenant, request.job_id)
        head = await self._journal.head(subject)
        request.check_body(head)
        if head is not None and head.final:
            return head
        run = head.run if head is not None else 0
        if request.can_enqueue and not await self._has_job(request, subject, started=head is not None):
            if self._answer_function is not None:
                return await self._answer_once(request, message, subject, end)
            await self._enqueue(request, message)
            run = 0
        try:
            found = await wait_for_outcome(self._journal, subject, run=run, timeout_s=max(0.0, end - time.monotonic()))
        except ResultTimeout:
            raise ResultTimeout(f"job {request.job_id} has not ended in time: repeat the request with its id") from None
        assert found is not None  # never without `job`: then only a final entry ends the wait
        return found

    async def _has_job(self, request: ParsedRequest, subject: str, *, started: bool) -> bool:
        """Whether a job of the id has started and still exists, or is parked.

        A job that waits in its lane is looked for only where a function answers. Otherwise the server drops the
        duplicate by its Msg-Id, and of two messages with one id only one is run.
        """
        if started:
            return await self._claims.is_taken_by_other_run(self._family, subject, 0, math.inf) is not False
        lane = subjects.Lane(self._family.name, request.tenant, "*")
        if await self._parking.find_all(lane, request.job_id):
            return True
        return self._answer_function is not None and await self._waits_in_lane(request)

    async def _waits_in_lane(self, request: ParsedRequest) -> bool:
        """Whether a job of the id is stored in a lane. Only as long as the server remembers its Msg-Id.

        Asks by a publish that is never stored, because it expects a Msg-Id of the stream's last message that none has.
        (The server compares an expected sequence before it looks for the Msg-Id.)
        """
        name, tenant = self._family.name, request.tenant
        asking = {headers.MSG_ID: subjects.msg_id(name, tenant, request.job_id), EXPECTED_MSG_ID: NO_MSG_ID}
        try:
            ack = await self._connection.store(
                subjects.lane(name, tenant, subjects.NORMAL), b"", asking, timeout_s=ENQUEUE_S
            )
        except (Conflict, QueueFull, NotFound, AccessDenied):
            return False
        return await self._connection.get(ack.stream, ack.seq) is not None

    async def _enqueue(self, request: ParsedRequest, message: Received) -> None:
        """Store the request as a job. The request's deadline is not the job's: it applies to the answer."""
        family, request_headers = self._family, message.headers
        priority = request_headers.get(headers.PRIORITY, "")
        lane = subjects.Lane(
            family.name, request.tenant, priority if priority in family.priorities else subjects.NORMAL
        )
        job_headers = headers.carried(request_headers) | {
            headers.MSG_ID: subjects.msg_id(family.name, request.tenant, request.job_id),
            headers.JOB_ID: request.job_id,
            headers.PRIORITY: lane.priority,
        }
        for name, limit in ((headers.KIND, 128), (headers.CONTENT_TYPE, 128), (headers.SECRET, 4_000)):
            if name in request_headers:
                job_headers[name] = headers.ascii_line(request_headers[name], limit)
        job_headers |= headers.carried_unique(request_headers)
        if family.key:
            job_headers[family.key] = request.job_id
        self._producer.hint(lane)
        try:
            await self._connection.store(subjects.work(*lane), message.data, job_headers, timeout_s=ENQUEUE_S)
        except LaneFull as error:
            raise LaneFull(str(lane), error.reason, limit=family.max_msgs_per_subject) from None
        except TooLarge as error:
            raise BadInput(f"the request cannot be enqueued: {error}") from None

    # -- answering in place of enqueueing

    async def _answer_once(self, request: ParsedRequest, message: Received, subject: str, end: float) -> Entry:
        """Return the entry with the result of the answer function. Requests of one id share one call.

        Raises ResultTimeout at `end` (monotonic seconds): the call goes on, and answers the next request of the id.
        Raises what the function raises, as an error that the requester can read.
        """
        task = self._answering.get(subject)
        if task is None:
            if len(self._answering) >= self._waiting_max:
                raise Unavailable(f"{self._waiting_max:,} answers are being made here already: repeat the request")
            task = self._answering[subject] = asyncio.create_task(self._answer_and_store(request, message, subject))
            task.add_done_callback(lambda done: self._on_answered(subject, done))
        await asyncio.wait([task], timeout=max(0.0, end - time.monotonic()))
        if not task.done():
            raise ResultTimeout(f"job {request.job_id} has not ended in time: repeat the request with its id")
        return task.result()

    def _on_answered(self, subject: str, task: asyncio.Task[Entry]) -> None:
        self._answering.pop(subject, None)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if not isinstance(error, ResponderError):  # which is logged
            log.info("the answer on %s failed: %s: %s", subject, type(error).__name__, error)

    async def _answer_and_store(self, request: ParsedRequest, message: Received, subject: str) -> Entry:
        """Call the answer function, store what it returns as the result, and return the final entry.

        1. A job of the id has ended meanwhile: return its entry. 2. One has started: wait for it. 3. Otherwise store.
        """
        head = await self._journal.head(subject)  # again: another request of the id may have been answered just now
        if head is not None and head.final:
            return head
        given = Request(
            self._family.name, request.tenant, request.job_id, message.subject, message.reply, message.headers,
            message.data,
        )  # fmt: skip
        body, held = await self._call_answer_function(given), None
        if len(body) > self._documents.inline_max:
            held = await self._documents.hold_result(request.tenant, body)
        entry, stored = await self._store_answer(request, subject, codec.Encoded(body), held)
        if held is not None and not stored:
            await self._documents.end_result(held)
        return entry

    async def _call_answer_function(self, given: Request) -> bytes:
        """Return the encoded result of the answer function, which may raise and return anything.

        Raises JobFailed for a Reject, Unavailable for a Retry, and ResponderError for whatever else is no result.
        """
        function, cause = self._answer_function, None
        assert function is not None
        outcome: Outcome
        try:
            value: Any = function(given)
            outcome = Returned(value) if type(value) in PLAIN_TYPES else await attempt.outcome_of_value(value)
            if isinstance(outcome, Returned):
                return codec.encode(outcome.value)
        except Retry as error:
            if error.pause == "key":
                attempt.warn_of_no_key(f"request {given.id}", "a request has no key")
            raise Unavailable(f"{error.reason}: repeat the request") from error
        except BaseException as error:  # SystemExit too, and a CancelledError that the function has raised itself
            if self._closed:
                raise
            outcome, cause = attempt.outcome_of_error(error), error
        problem = outcome.error if isinstance(outcome, Raised | Refused) else type(outcome).__name__
        if isinstance(outcome, Refused) and outcome.reason == "rejected":
            raise JobFailed(given.id, reason=outcome.reason, error=problem, attempt=1) from cause
        name = getattr(function, "__qualname__", None) or repr(function)
        log.error("%s failed to answer %s on %s: %s", name, given.id, given.subject, problem, exc_info=cause)
        raise ResponderError(given.id, error=problem) from cause

    async def _store_answer(
        self, request: ParsedRequest, subject: str, result: codec.Encoded, held: HeldDocument | None
    ) -> tuple[Entry, bool]:
        """Store a result, or a reference to its document `held`. Returns the final entry, and whether it is this."""
        stored = False
        for _ in range(STORE_TRIES_MAX):
            head = await self._journal.head(subject)
            if head is not None and head.final:
                return head, stored
            if head is not None and await self._has_job(request, subject, started=True):
                found = await wait_for_outcome(self._journal, subject, run=head.run, timeout_s=WAIT_MAX_S)
                assert found is not None  # never without `job`
                return found, stored
            record = EMPTY_RECORD if head is None else RunRecord(head.seq, head.epoch)
            stored = await self._journal.append_if_unchanged(
                subject, RESULT, held.entry if held else result, run=0 if head is None else head.run, attempt=1,
                parking_id="", record=record, extra=held.headers if held else None,
            )  # fmt: skip
        raise Unavailable(f"the answer to {request.job_id} was not stored: its journal changed before each write")
