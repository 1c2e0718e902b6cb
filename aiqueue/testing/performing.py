"""Calls a handler as a worker would, without a server: through the codec, the handler's rules, and its retry policy."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Unpack

from .. import attempt, codec, headers, subjects
from ..attempt import Handler, Outcome, Raised, RawJob, Refused, Returned
from ..codec import secret_paths
from ..connection import block, read_headers
from ..enqueue import checked_headers, checked_lane, headers_of_job, resolve_job_id
from ..errors import BadInput, EncodeError
from ..job import Job, Message, check_message
from ..payload import R, encode_message, find_documents
from ..topology import Family, Topology
from ..units import parse_deadline
from ..worker import Worker
from . import options as given
from .calling import call_handler
from .options import JobOptions
from .performed import JobOutcome, Performed
from .recorder import Recorder

TENANT = "test"


async def perform(worker: Worker, message: Message[R], **options: Unpack[JobOptions]) -> Performed[R]:
    """Call the handler of a message once, as a worker would, without a server. Return what would become of the job.

    The message goes through its body on the wire and back, and the handler's result too. What decides about the
    outcome is the code that decides in a worker: which handler is called, its `timeout`, `on`, `retry` and `result`.

    - `attempt`: the number of the attempt, from 1.
    - `state`: what the worker's lifespan yields. The lifespan is not entered.
    - `documents`: the bytes of the documents that the handler reads, by document; see `aiqueue.testing.document`.
    - `steps`, `calls`: what earlier attempts have kept with ``job.step`` and ``job.called``.
    - `children`: by name, the results of children that have ended, for ``job.gather``; for one that has failed a
      ChildFailed, ChildCancelled or ChildLost of `aiqueue.errors`. The job waits for others.
    - `tenant` (default "test", or the first of the worker's `tenants`), `priority`, `unique`, `headers`, `deadline`: as
      of `Client.enqueue`.
    - `timeout`: instead of the handler's, which is often minutes. `cancel_after`: the job is cancelled so long after
      its start. Both are durations.
    - `settings`: whose stream files declare the message's family. Default: those of the working directory.

    Limits by key, pauses, and the claims of ids are not heeded, and a handler with ``process=True`` is called in this
    process. A test that is about these needs `drain`, which runs the worker on a server.

    Raises BadInput for wrong arguments, a family that the worker does not serve, and a message that cannot be enqueued
    (EncodeError). What the handler raises is in the outcome.
    """
    if not isinstance(worker, Worker):
        raise BadInput(f"testing.perform needs a Worker, not {type(worker).__name__}")
    given.check_names(options, JobOptions, "a worker")
    check_message(message)
    return await _JobAttempt(worker, message, options).run(options.get("state"))


class _JobAttempt:
    """One attempt of a job that nobody has stored."""

    def __init__(self, worker: Worker, message: Message[Any], options: Mapping[str, Any]) -> None:
        """Raises BadInput (EncodeError, UnknownFamily)."""
        topology = given.topology_of(options)
        self._model = type(message)
        self._number = given.attempt_of(options)
        self._timeout_s = given.duration_of(options, "timeout")
        self._cancel_after_s = given.duration_of(options, "cancel_after")
        family = _family_of(worker, message, topology)
        lane = checked_lane(family, _tenant_of(worker, options.get("tenant")), options.get("priority", subjects.NORMAL))
        self._raw = _raw_job(family, message, lane, options)
        self._decoded = attempt.decode_body(self._raw)
        handlers = attempt.Handlers({each.key: each for each in worker.handlers})
        self._handler = attempt.find_handler(handlers, family, self._decoded)
        recorder = self._recorder = Recorder(topology, self._raw, self._decoded.job_id)
        recorder.documents = given.documents_of(options)
        recorder.steps = given.through_codec(dict(given.mapping_of(options, "steps")))
        recorder.earlier = given.through_codec(list(options.get("calls", ())))
        recorder.outcomes = given.mapping_of(options, "children")
        self._exception: BaseException | None = None

    async def run(self, state: Any) -> Performed[Any]:
        """Call the handler, and return what would become of the job."""
        raw, decoded, handler = self._raw, self._decoded, self._handler
        if attempt.is_past_deadline(raw, time.time()):
            return self._end(attempt.DEADLINE_PASSED)
        job = attempt.build_job(raw, decoded, handler, attempt=self._number, state=state, progress=self._recorder)
        if not isinstance(job, Job) or handler is None:
            return self._end(job)  # type: ignore[arg-type]  # a job has a handler
        return self._end(await self._call(handler, job))

    async def _call(self, handler: Handler, job: Job[Any]) -> Outcome:
        recorder = self._recorder
        ended = await call_handler(
            handler, job, timeout_s=self._timeout_s or handler.timeout_s, cancel_after_s=self._cancel_after_s,
            cancel=recorder.cancel,
        )  # fmt: skip
        recorder.end()
        self._exception = ended.exception
        if ended.is_cancelled and not isinstance(ended.outcome, Returned):
            return attempt.Cancelled()
        return ended.outcome

    def _end(self, outcome: Outcome) -> Performed[Any]:
        """Return what `worker.Settlement` would make of an outcome."""
        secrets = attempt.secrets_of_body(self._decoded, self._raw.headers, self._handler)
        match attempt.without_secrets(outcome, secrets, self._decoded.data, self._raw.body):
            case Returned(value):
                return self._returned(value, secrets)
            case Raised() as raised:
                return self._raised(raised)
            case Refused(reason, error, trace):
                return self._performed("failed", reason=reason, error=error, traceback=trace)
            case attempt.Unknown(error):
                return self._performed("unknown", error=error)
            case attempt.Waiting():
                return self._performed("waiting")
            case attempt.Cancelled():
                return self._performed("cancelled")
            case _:  # AlreadyEnded, TakenOver
                return self._performed("stale")

    def _returned(self, value: Any, secrets: str) -> Performed[Any]:
        handler, is_kept = self._handler, bool(self._raw.family.journal)
        if handler is None or not handler.keeps_result or not is_kept:
            return self._performed("done")
        try:
            body = codec.encode_marked(value).body
        except EncodeError as error:
            text = secret_paths.redact(str(error), self._decoded.data, secrets)
            return self._performed("failed", reason="result", error=attempt.unkept_result(text))
        data = codec.decode(body, codec.CBOR, max_bytes=len(body))
        return self._performed("done", data=data, model=None if self._model.aiq_result is Any else self._model)

    def _raised(self, raised: Raised) -> Performed[Any]:
        delays = [attempt.delay_after(self._handler, raised, self._number, rng) for rng in (lambda: 0.0, lambda: 1.0)]
        after_s, after_min_s = delays
        error, pauses = raised.error, raised.pauses_key
        if after_s is None:
            return self._performed("failed", reason="attempts", error=error, traceback=raised.trace, pauses_key=pauses)
        if attempt.is_past_deadline(self._raw, time.time() + after_s):
            late = attempt.too_late(error, after_s)
            return self._performed("failed", reason="deadline", error=late, traceback=raised.trace, pauses_key=pauses)
        return self._performed(
            "retry", after_s=after_s, after_min_s=after_min_s, error=error, traceback=raised.trace, pauses_key=pauses
        )

    def _performed(self, outcome: JobOutcome, **fields: Any) -> Performed[Any]:
        recorder = self._recorder
        return Performed(
            outcome=outcome, job_id=self._decoded.job_id, kind=self._decoded.kind, attempt=self._number,
            exception=self._exception, chunks=tuple(recorder.said), progress=tuple(recorder.reported),
            steps=dict(recorder.steps), calls=tuple(recorder.calls), children=tuple(recorder.children.values()),
            settled=recorder.settled, **fields,
        )  # fmt: skip


def _family_of(worker: Worker, message: Message[Any], topology: Topology) -> Family:
    """Return the family of a message. Raises BadInput (UnknownFamily) if the worker takes no jobs of it."""
    family = topology.family(message.aiq_family)
    if not worker.handlers:
        raise BadInput("this worker has no handlers: register one with @worker.handle(YourMessage)")
    served = {each.key[0] for each in worker.handlers} if worker.families is None else set(worker.families)
    if family.name not in served:
        raise BadInput(
            f"this worker takes no jobs of {family.name}, the family of {type(message).__name__}: it takes those of "
            f"{', '.join(sorted(served))}"
        )
    return family


def _tenant_of(worker: Worker, tenant: str | None) -> str:
    if tenant is None:
        return worker.tenants[0] if worker.tenants else TENANT
    if worker.tenants is not None and tenant not in worker.tenants:
        raise BadInput(f"this worker takes no jobs of tenant {tenant!r}: it takes those of {', '.join(worker.tenants)}")
    return tenant


def _raw_job(family: Family, message: Message[Any], lane: subjects.Lane, options: Mapping[str, Any]) -> RawJob:
    """Return the job as a worker gets it. Raises BadInput (EncodeError)."""
    now, deadline = time.time(), options.get("deadline")
    extra = checked_headers(family, options.get("headers"), message)
    found = resolve_job_id(family, message, options.get("unique"), _HERE)
    fields = headers_of_job(family, message, lane, found.id)
    if found.shown:
        fields[headers.UNIQUE] = found.shown
    if message.aiq_documents and any(find_documents(message)):
        fields[headers.DOCUMENT_REF] = subjects.new_id()
    if deadline is not None:
        fields[headers.DEADLINE] = str(round(parse_deadline("deadline", deadline, now) * 1000))
    stored, _ = read_headers(block({**fields, **extra}))
    return RawJob(family, lane.tenant, lane.priority, 1, now, stored, encode_message(message), now)


class _Here:
    """The local clock."""

    offset_ms = 0


_HERE = _Here()
