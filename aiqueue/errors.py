"""All errors that aiqueue raises, in one tree. May not import anything else of aiqueue.

::

    AIQueueError
    ├── BadInput                an argument is invalid; nothing was sent
    │   ├── InvalidToken        a tenant, key, priority or family that is not valid in a subject
    │   ├── EncodeError         a message that cannot be encoded as CBOR
    │   ├── DecodeError         a body that cannot be decoded
    │   ├── TooLarge            body and headers exceed the server's max_payload
    │   ├── UnknownFamily       no stream file (streams/*.toml) declares this family, or `families` leaves it out
    │   ├── LoadError           "module:attribute" does not name a worker
    │   ├── SettingsError       an invalid argument, environment variable or aiqueue.toml key
    │   ├── TopologyError       an invalid streams/*.toml, limits.toml or gateway.toml; names file and key
    │   ├── IdReused            a job of this id has another body, and the family takes one body for an id
    │   └── AboveLimit          a reservation above the limit itself: waiting would not help
    ├── Unavailable             no server answers now; a retry can help
    ├── AccessDenied            wrong credentials, or no permission for a subject
    ├── QueueFull               a limit is reached, nothing was stored; a retry can help
    │   ├── LaneFull            the lane holds its maximum of jobs
    │   ├── StreamFull          the family's stream is at its limit
    │   ├── AccountFull         the account's storage is used up
    │   ├── DiskFull            the server's storage is used up
    │   └── InboxFull           the inbox holds its maximum of unread mail
    ├── ConfigMismatch          a stream differs from its declaration and cannot be changed in place
    ├── EmbedderChanged         a tenant's stored vectors are of another embedder: reindex first
    ├── DataLossRefused         apply would delete messages, which was not allowed
    ├── NotFound                no such job, dead letter, stream or consumer
    ├── Corrupt                 a document's stored bytes do not match its hash
    ├── Conflict                another write to the same subject came first
    │   ├── DuplicateJob        a job of this id exists, and the caller wanted a new one
    │   └── NotParked           the job does not wait for a time (any more): it cannot be rescheduled
    ├── Stale                   a newer attempt owns the job; this attempt may no longer write
    ├── JobFailed               the awaited job failed
    │   ├── JobCancelled        the awaited job was cancelled
    │   └── ChildFailed         a child that a job gathers failed or was cancelled
    │       └── ChildCancelled  that child was cancelled; also a JobCancelled
    ├── ResultInvalid           the awaited job's result is not of the type that its message declares
    ├── JobGone                 the awaited job is gone, and nothing shows that a worker ended it
    │   └── ChildLost           nothing is left of a child that a job gathers, or of its result
    ├── ResultTimeout           the awaited job did not end within the timeout
    ├── ReplyTimeout            the agent did not reply within the timeout
    ├── MailBounced             the agent's inbox returned the request
    ├── ResultDisabled          the job's handler stores no result
    ├── ResponderError          the responder failed to answer a request
    ├── EmbeddedError           the embedded server does not start or answer
    │   └── BinaryMissing       no nats-server binary is installed
    └── ServerError             any other error of the server; carries its codes
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

JobState = Literal[
    "queued", "parked", "in_flight", "retrying", "waiting", "done", "failed", "cancelled", "ended", "unknown"
]
"""What a job does now, as `aiqueue inspect` says it: docs/concepts/job-lifecycle.md says what each state means."""


class AIQueueError(Exception):
    """Base class of all errors that aiqueue raises. `retryable`: the same call can succeed later.

    `item` is set on errors that `Client.enqueue_many` yields: the Message or JobSpec that was not stored.
    """

    retryable: bool = False
    item: Any = None

    def __str__(self) -> str:
        return " ".join(line.strip() for line in super().__str__().splitlines())

    def __reduce__(self) -> tuple[Any, ...]:
        # BaseException.__reduce__ would call __init__ with the text alone; most classes here take other parameters
        return _rebuild_error, (type(self), self.args, self.__dict__)


def _rebuild_error(kind: type[AIQueueError], args: tuple[Any, ...], state: dict[str, Any]) -> AIQueueError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class BadInput(AIQueueError):
    """An argument is invalid. Nothing was sent."""


class InvalidToken(BadInput):
    """A value that is not valid in a subject: it must match ``[A-Za-z0-9_-]{1,64}``."""

    def __init__(self, what: str, value: object) -> None:
        shown = repr(value)
        if len(shown) > 80:
            shown = f"{shown[:77]}… ({len(str(value))} characters)"
        super().__init__(f"{what} {shown} must be 1 to 64 characters of A-Z a-z 0-9 _ -")
        self.what, self.value = what, value


class EncodeError(BadInput):
    """A message that cannot be encoded as CBOR."""


class DecodeError(BadInput):
    """A body that cannot be decoded. `reason` is one line."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class TooLarge(BadInput):
    """The message and its headers together exceed the server's max_payload, or the message of a schedule exceeds the
    limit of schedules. With `headers`, the headers alone exceed the size that a stream accepts. `size` and `limit` are
    bytes.
    """

    def __init__(self, size: int, limit: int, *, headers: bool = False, advice: str = "") -> None:
        what = f"headers of {size:,} bytes" if headers else f"{size:,} bytes with headers"
        put = "store large data with client.documents.put and enqueue its Document, or raise the server's max_payload"
        advice = advice or ("move long values into the message" if headers else put)
        super().__init__(f"{what} exceed the limit of {limit:,}: {advice}")
        self.size, self.limit = size, limit


class UnknownFamily(BadInput):
    """No stream file (streams/*.toml) declares this family, or the setting `families` does not name it."""

    def __init__(self, family: str, known: tuple[str, ...], advice: str = "") -> None:
        super().__init__(f"unknown family {family!r}; declared families: {', '.join(known) or 'none'}{advice}")
        self.family, self.known = family, known


class LoadError(BadInput):
    """A ``module:attribute`` that does not name a Worker or Agent, or whose module cannot be imported."""


class SettingsError(BadInput):
    """A setting with an unknown name or an invalid value. The text states where it is set."""


class TopologyError(BadInput):
    """An invalid stream file (streams/*.toml), limits.toml or gateway.toml: `file`, `key` and the `problem`."""

    def __init__(self, file: str, key: str, problem: str) -> None:
        super().__init__(f"{file}: {key}: {problem}" if key else f"{file}: {problem}")
        self.file, self.key, self.problem = file, key, problem


class IdReused(BadInput):
    """A job of this id was stored with another body, in a family where an id is of one body. Nothing was stored."""


class AboveLimit(BadInput):
    """A reservation above the limit itself would wait for ever. `what`: "requests" or "cost". `rule`: as text."""

    def __init__(self, what: str, value: float, limit: float, rule: str, key: str) -> None:
        problem = f"{what} {value:,.10g} is above the limit of {limit:,.10g} itself ({rule}) for the key {key!r}"
        super().__init__(f"{problem}: reserve less, or raise the limit")
        self.what, self.value, self.limit, self.rule, self.key = what, value, limit, rule, key


class Unavailable(AIQueueError):
    """No server answers. `maybe_stored`: the message may have been stored although no PubAck arrived."""

    retryable = True

    def __init__(self, problem: str, *, maybe_stored: bool = False) -> None:
        super().__init__(problem)
        self.maybe_stored = maybe_stored


class AccessDenied(AIQueueError):
    """The server rejects the credentials, or the user has no permission for a subject."""


class QueueFull(AIQueueError):
    """A limit is reached and nothing was stored. `limit` is a number in the unit that `reason` names: the server's, the
    declared one where that cannot be read, or None if the limit is unknown. Wait `retry_after_s` seconds before the
    next try.
    """

    retryable = True
    retry_s: ClassVar[float] = 5.0
    what_is_full: ClassVar[str] = "{} is full"  # of the lane

    def __init__(self, lane: str, reason: str, *, limit: int | None = None, retry_after_s: float | None = None) -> None:
        retry_after_s = self.retry_s if retry_after_s is None else retry_after_s
        bound = f" (limit {limit:,})" if limit is not None else ""
        super().__init__(f"{self.what_is_full.format(lane)}: {reason}{bound}; try again in {retry_after_s:g} s")
        self.lane, self.reason, self.limit, self.retry_after_s = lane, reason, limit, retry_after_s


class LaneFull(QueueFull):
    """The lane holds its maximum of jobs (`limit`). Other lanes of the family still accept jobs."""

    retry_s = 1.0


class StreamFull(QueueFull):
    """The family's stream is at its limit of bytes or messages (`limit`), over all tenants."""

    what_is_full = "the stream of {} is full"


class AccountFull(QueueFull):
    """The streams of the account have used up the storage that the server grants it."""

    what_is_full = "the account has no storage left for {}"


class DiskFull(QueueFull):
    """The server has used up its storage, max_file_store or max_memory_store, over all accounts."""

    what_is_full = "the server has no storage left for {}"


class InboxFull(QueueFull):
    """The inbox of `agent` holds its maximum of unread mail (`limit`). Other inboxes still accept mail."""

    retry_s = 1.0
    what_is_full = "the inbox of {} is full"

    def __init__(self, agent: str, *, limit: int | None = None) -> None:
        super().__init__(agent, "maximum of unread mail reached", limit=limit)
        self.agent = agent


class ConfigMismatch(AIQueueError):
    """The server's stream or consumer differs from the declared one and cannot be changed in place. Or a database was
    written by a newer aiqueue, or is not the tenant's.
    """


class EmbedderChanged(AIQueueError):
    """The stored vectors of a tenant are of another embedder, so that this one's cannot be compared with them."""

    def __init__(
        self, tenant: str, *, stored: str, stored_dimensions: int, wanted: str, wanted_dimensions: int
    ) -> None:
        super().__init__(
            f"tenant {tenant} is indexed by {stored or 'no embedder'} ({stored_dimensions} dimensions), not by "
            f"{wanted} ({wanted_dimensions}): run `aiqueue rag reindex --tenant {tenant}`, or set the former embedder"
        )
        self.tenant, self.stored, self.stored_dimensions = tenant, stored, stored_dimensions
        self.wanted, self.wanted_dimensions = wanted, wanted_dimensions


class DataLossRefused(AIQueueError):
    """Apply would delete messages and `allow_data_loss` was not given. `changes`: a sentence for each such change."""

    def __init__(self, changes: tuple[str, ...]) -> None:
        super().__init__(f"{'; '.join(changes)}: to delete these messages, repeat with --allow-data-loss")
        self.changes = changes


class NotFound(AIQueueError):
    """There is no such job, dead letter, document, stream or consumer (any more)."""


class Corrupt(AIQueueError):
    """A document whose stored bytes do not match its hash, or a damaged database. It cannot be read any more."""


class Conflict(AIQueueError):
    """Another write came first: the expected sequence is not the last sequence of the subject."""


class DuplicateJob(Conflict):
    """A job of this id was stored before, and `on_duplicate` is "raise". Nothing was stored.

    ``client.job(error.job_id)`` returns its handle. After a lost PubAck it may be the job of this very call.
    """

    def __init__(self, job_id: str, lane: str) -> None:
        super().__init__(f'job {job_id} is already in {lane}: nothing was stored, as on_duplicate="raise" asks')
        self.job_id, self.lane = job_id, lane


class NotParked(Conflict):
    """The job does not wait for a time, so it cannot be rescheduled. `state`: one of `JobState`, "due" or "gone"."""

    def __init__(self, job_id: str, state: JobState | Literal["due", "gone"]) -> None:
        super().__init__(f"job {job_id} is not parked ({state.replace('_', ' ')}), so it cannot be rescheduled")
        self.job_id, self.state = job_id, state


class Stale(AIQueueError):
    """A newer attempt owns the job, so this attempt may no longer write. `ended`: the job has already ended."""

    def __init__(self, problem: str, *, ended: bool) -> None:
        super().__init__(problem)
        self.ended = ended


class JobFailed(AIQueueError):
    """The awaited job became a dead letter, or was cancelled (JobCancelled). `reason` is one word, `error` one line.

    `attempt`: the number of the last attempt; 0: none was started.
    """

    def __init__(self, job_id: str, *, reason: str, error: str, attempt: int) -> None:
        where = f" on attempt {attempt}" if attempt else ""  # 0: no attempt was started
        super().__init__(f"job {job_id} failed{where} ({reason}): {error}")
        self.job_id, self.reason, self.error, self.attempt = job_id, reason, error, attempt


class JobCancelled(JobFailed):
    """The awaited job was cancelled, and does not run again. `reason` is "cancelled".

    `error` says when: before it started, between attempts, or while running. Who has cancelled it is not stored.
    """

    def __init__(self, job_id: str, *, reason: str = "cancelled", error: str = "cancelled", attempt: int = 0) -> None:
        super().__init__(job_id, reason=reason, error=error, attempt=attempt)
        how = error.removeprefix("cancelled").lstrip(" :")
        self.args = (f"job {job_id} was cancelled{f' {how}' if how else ''}",)


class ResultInvalid(AIQueueError):
    """The awaited job is done, and its result is not of the type that its message declares. `reason` is one line.

    `data` is the result as plain data, whole: with its secrets.
    """

    def __init__(self, job_id: str, *, expected: str, reason: str, data: Any) -> None:
        super().__init__(f"job {job_id} is done, and its result is not of the type {expected}: {reason}")
        self.job_id, self.expected, self.reason = job_id, expected, reason
        self._data = data  # with an underscore, so that `details` leaves it out: there may be secrets in it

    @property
    def data(self) -> Any:
        return self._data


class JobGone(AIQueueError):
    """The awaited job is not stored any more and has no outcome. Nothing shows that a worker ended it.

    It was purged, it expired, or another program took it. Or it ended long ago, and its result was not kept.
    """

    def __init__(self, job_id: str) -> None:
        super().__init__(
            f"job {job_id} is gone without an outcome: it was purged, it expired, or another program took it "
            "(`aiqueue doctor` names such programs); or it ended long ago. Enqueue it again if it did not run"
        )
        self.job_id = job_id


class ChildFailed(JobFailed):
    """A child of `Job.gather` is a dead letter, or was cancelled (ChildCancelled). `name`: its name in the parent."""

    def __init__(self, job_id: str, *, name: str, reason: str, error: str, attempt: int) -> None:
        super().__init__(job_id, reason=reason, error=error, attempt=attempt)
        self.args = (f"child {name!r}: {self}",)
        self.name = name


class ChildCancelled(ChildFailed, JobCancelled):
    """A child that `Job.gather` waits for was cancelled, and does not run again. `reason` is "cancelled"."""


class ChildLost(JobGone):
    """A child that `Job.gather` waits for was purged, or its result has expired.

    `name`: the child's name in its parent. The child is not enqueued again: use another name for that.
    """

    def __init__(self, job_id: str, *, name: str, error: str) -> None:
        super().__init__(job_id)
        self.args = (f"child {name!r}: job {job_id} is lost: {error}",)
        self.name, self.error = name, error


class ResultTimeout(AIQueueError, TimeoutError):
    """The awaited job did not end within the timeout. The job continues; waiting for it again is safe."""

    retryable = True
    reason = ""  # why it waits, as `aiqueue explain` names it, such as "no_worker"; "": not known
    evidence: tuple[str, ...] = ()  # what shows it, a sentence each


class ReplyTimeout(AIQueueError, TimeoutError):
    """The agent did not reply within the timeout. A later reply is still delivered to the requester's inbox."""

    retryable = True


class MailBounced(AIQueueError):
    """A request to an agent bounced: its inbox returned the mail. `reason` is one word, `error` one line."""

    def __init__(self, mail_id: str, *, to: str, reason: str, error: str) -> None:
        super().__init__(f"mail {mail_id} to {to} bounced ({reason}): {error}")
        self.mail_id, self.to, self.reason, self.error = mail_id, to, reason, error


class ResultDisabled(AIQueueError):
    """A worker has ended the job, but its handler is registered with ``result=False`` and stores no result."""


class ResponderError(AIQueueError):
    """The responder could not answer a request: its function raised, or a responder says so with a code of its own.

    Nothing is stored, and a request with the same id asks anew. `error` is one line, `code` is like HTTP's.
    """

    def __init__(self, job_id: str, *, error: str, code: int = 500) -> None:
        super().__init__(f"the responder failed to answer the request{f' for job {job_id}' if job_id else ''}: {error}")
        self.job_id, self.error, self.code = job_id, error, code


class EmbeddedError(AIQueueError):
    """The embedded server does not start, or does not answer."""


class BinaryMissing(EmbeddedError):
    """No nats-server binary is installed on this machine."""


class ServerError(AIQueueError):
    """Any other error of the NATS server. `code` is like HTTP's, `err_code` is JetStream's error code."""

    def __init__(self, description: str, *, code: int = 0, err_code: int = 0) -> None:
        super().__init__(f"NATS server error: {description} (code {code}, err_code {err_code})")
        self.description, self.code, self.err_code = description, code, err_code


def details(error: AIQueueError) -> dict[str, Any]:
    """Return the error as plain data, for ``--json``: class, message, whether to retry, and its attributes.

    An attribute `error` is returned under the key ``cause``. A value that JSON cannot represent becomes its repr.
    """
    attributes = {k: v for k, v in vars(error).items() if not k.startswith("_") and k != "item"}
    data = {"cause" if k == "error" else k: _to_json_value(v) for k, v in attributes.items()}
    return {**data, "error": type(error).__name__, "message": str(error), "retryable": error.retryable}


def _to_json_value(value: object) -> Any:
    if isinstance(value, tuple):
        return [_to_json_value(each) for each in value]
    return value if value is None or isinstance(value, str | int | float) else repr(value)
