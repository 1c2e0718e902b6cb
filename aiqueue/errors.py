"""All errors of aiqueue, in one tree.

::

    AIQueueError
    ├── BadInput                what the caller gave is wrong; nothing was sent
    │   ├── InvalidToken        a tenant, key, priority or family that cannot be part of a subject
    │   ├── EncodeError         a message that cannot be written as CBOR
    │   ├── DecodeError         a body that cannot be read
    │   ├── TooLarge            a frame, headers counted, above the server's max_payload
    │   ├── UnknownKind         no handler takes this kind of message
    │   ├── UnknownFamily       no topology file declares this family
    │   ├── LoadError           "module:attribute" that does not lead to a worker
    │   ├── SettingsError       an argument, environment variable or aiqueue.toml key
    │   └── TopologyError       a streams/*.toml file; names the file and the key
    ├── Unavailable             no server answers (now); a retry can help
    ├── AccessDenied            wrong credentials, or no permission for a subject
    ├── QueueFull               a limit is reached; a retry can help
    │   ├── LaneFull            the lane holds as many jobs as it may
    │   ├── StreamFull          the stream of all lanes of the family is at its limit
    │   ├── AccountFull         the account has used up its storage
    │   ├── DiskFull            the server has used up its storage
    │   └── InboxFull           the agent has as much unread mail as it may
    ├── ConfigMismatch          the server's stream differs from the declared one
    ├── DataLossRefused         an apply that would delete messages without being told to
    ├── NotFound                a job, dead letter, stream or consumer that is not there
    ├── Corrupt                 a document whose bytes are not those that were stored
    ├── Conflict                a write whose expected sequence is not the last one
    ├── Stale                   a newer attempt owns this job; this one may not write any more
    ├── JobFailed               the awaited job ended badly
    ├── ResultTimeout           the awaited job did not end in time
    ├── ReplyTimeout            the asked agent did not answer in time
    ├── MailBounced             the asked agent's inbox sent the mail back
    ├── ResultDisabled          the job's handler keeps no result
    ├── EmbeddedError           the embedded server cannot be had
    │   └── BinaryMissing       there is no nats-server binary
    └── ServerError             an answer of the server that has no name here; carries its codes
"""

from __future__ import annotations

from typing import Any, ClassVar


class AIQueueError(Exception):
    """Any error that aiqueue raises. `retryable` says whether the same call can succeed later.

    `item` is set on errors that `Client.enqueue_many` yields: the Message or JobSpec that was not stored.
    """

    retryable: ClassVar[bool] = False
    item: Any = None

    def __str__(self) -> str:
        return " ".join(line.strip() for line in super().__str__().splitlines())

    def __reduce__(self) -> tuple[Any, ...]:
        # BaseException's own would call __init__ with the text: children's errors could not reach their parents
        return _rebuilt, (type(self), self.args, self.__dict__)


def _rebuilt(kind: type[AIQueueError], args: tuple[Any, ...], state: dict[str, Any]) -> AIQueueError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class BadInput(AIQueueError):
    """What the caller gave is wrong. Nothing was sent."""


class InvalidToken(BadInput):
    """A word that cannot be part of a subject: it must match ``[A-Za-z0-9_-]{1,64}``."""

    def __init__(self, what: str, value: object) -> None:
        shown = repr(value)
        if len(shown) > 80:
            shown = f"{shown[:77]}… ({len(str(value))} characters)"
        super().__init__(f"{what} {shown} must be 1 to 64 characters of A-Z a-z 0-9 _ -")
        self.what = what
        self.value = value


class EncodeError(BadInput):
    """A message that cannot be written on the wire."""


class DecodeError(BadInput):
    """A body that cannot be read. `reason` is one line."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class TooLarge(BadInput):
    """A frame above the server's max_payload, its headers counted, or `headers` alone above what a stream takes.
    Sizes are bytes.
    """

    def __init__(self, size: int, limit: int, *, headers: bool = False) -> None:
        what = f"headers of {size:,} bytes" if headers else f"{size:,} bytes with headers"
        advice = (
            "put what is long into the message"
            if headers
            else "put large data by client.documents.put and enqueue the Document, or raise max_payload on the server"
        )
        super().__init__(f"{what} are above the limit of {limit:,}: {advice}")
        self.size = size
        self.limit = limit


class UnknownKind(BadInput):
    """No handler takes this kind of message."""

    def __init__(self, kind: str, known: tuple[str, ...] = ()) -> None:
        hint = f"; known kinds: {', '.join(known)}" if known else ""
        super().__init__(f"unknown kind {kind!r}{hint}")
        self.kind = kind
        self.known = known


class UnknownFamily(BadInput):
    """No topology file declares this family."""

    def __init__(self, family: str, known: tuple[str, ...]) -> None:
        super().__init__(f"unknown family {family!r}; declared families: {', '.join(known) or 'none'}")
        self.family = family
        self.known = known


class LoadError(BadInput):
    """A ``module:attribute`` that does not lead to what was asked for."""


class SettingsError(BadInput):
    """A setting with a wrong name or value. The text names where it was set."""


class TopologyError(BadInput):
    """A topology file with a mistake: which file, which key, what is wrong."""

    def __init__(self, file: str, key: str, problem: str) -> None:
        super().__init__(f"{file}: {key}: {problem}" if key else f"{file}: {problem}")
        self.file = file
        self.key = key
        self.problem = problem


class Unavailable(AIQueueError):
    """No server answers. `maybe_stored` says whether what was being sent may have been stored all the same."""

    retryable = True

    def __init__(self, problem: str, *, maybe_stored: bool = False) -> None:
        super().__init__(problem)
        self.maybe_stored = maybe_stored


class AccessDenied(AIQueueError):
    """The server refuses the credentials, or the user may not use a subject."""


class QueueFull(AIQueueError):
    """A limit is reached and nothing was stored. `limit` is in the unit that `reason` names (None where the
    server does not tell it); `retry_after_s` is when another try makes sense, in seconds.
    """

    retryable = True
    retry_s: ClassVar[float] = 5.0
    is_full: ClassVar[str] = "{} is full"

    def __init__(self, lane: str, reason: str, *, limit: int | None = None, retry_after_s: float | None = None) -> None:
        retry_after_s = self.retry_s if retry_after_s is None else retry_after_s
        bound = f" (limit {limit:,})" if limit is not None else ""
        super().__init__(f"{self.is_full.format(lane)}: {reason}{bound}; try again in {retry_after_s:g} s")
        self.lane = lane
        self.reason = reason
        self.limit = limit
        self.retry_after_s = retry_after_s


class LaneFull(QueueFull):
    """The lane holds as many jobs as it may (`limit`). Others of the family take jobs."""

    retry_s = 1.0


class StreamFull(QueueFull):
    """The family's stream is at its limit of bytes or messages (`limit`), whoever's they are."""

    is_full = "the stream of {} is full"


class AccountFull(QueueFull):
    """The account has used up the storage that the server grants it, for all of its streams."""

    is_full = "no room in the account for {}"


class DiskFull(QueueFull):
    """The server has used up its storage: max_file_store or max_memory_store, for all accounts."""

    is_full = "no room on the server for {}"


class InboxFull(QueueFull):
    """`agent` has as much unread mail as it may (`limit`). Others take mail."""

    retry_s = 1.0
    is_full = "the inbox of {} is full"

    def __init__(self, agent: str, *, limit: int | None = None) -> None:
        super().__init__(agent, "it holds as many unread mails as it may", limit=limit)
        self.agent = agent


class ConfigMismatch(AIQueueError):
    """The server's stream or consumer differs from the declared one and cannot be changed in place."""


class DataLossRefused(AIQueueError):
    """An apply that would delete messages. `changes` names them."""

    def __init__(self, changes: tuple[str, ...]) -> None:
        super().__init__(f"{'; '.join(changes)}: this deletes messages; repeat with --allow-data-loss if that is meant")
        self.changes = changes


class NotFound(AIQueueError):
    """What was asked for is not there (any more)."""


class Corrupt(AIQueueError):
    """A document whose stored bytes are not those of its hash: it cannot be read any more."""


class Conflict(AIQueueError):
    """Another write came first: the expected sequence is not the last one."""


class Stale(AIQueueError):
    """A newer attempt owns this job; this one may not write any more. `ended` says whether the job has ended."""

    def __init__(self, problem: str, *, ended: bool) -> None:
        super().__init__(problem)
        self.ended = ended


class JobFailed(AIQueueError):
    """The awaited job ended as a dead letter, or was cancelled (`reason` "cancelled")."""

    def __init__(self, job_id: str, *, reason: str, error: str, attempt: int) -> None:
        where = f" on attempt {attempt}" if attempt else ""  # none was begun
        super().__init__(f"job {job_id} failed{where} ({reason}): {error}")
        self.job_id = job_id
        self.reason = reason
        self.error = error
        self.attempt = attempt


class ResultTimeout(AIQueueError, TimeoutError):
    """The awaited job did not end in time. It goes on; asking again is fine."""

    retryable = True


class ReplyTimeout(AIQueueError, TimeoutError):
    """The asked agent did not answer in time. What it says later goes to the asker's inbox all the same."""

    retryable = True


class MailBounced(AIQueueError):
    """A mail that awaited a reply came back: `reason` is one word, `error` a line."""

    def __init__(self, mail_id: str, *, to: str, reason: str, error: str) -> None:
        super().__init__(f"mail {mail_id} to {to} came back ({reason}): {error}")
        self.mail_id = mail_id
        self.to = to
        self.reason = reason
        self.error = error


class ResultDisabled(AIQueueError):
    """The job's handler was registered with ``result=False``: it ended well and kept no result."""


class EmbeddedError(AIQueueError):
    """The embedded server cannot be had."""


class BinaryMissing(EmbeddedError):
    """There is no nats-server binary on this machine."""


class ServerError(AIQueueError):
    """An answer of the server that has no class of its own. `code` is HTTP-like, `err_code` JetStream's own."""

    def __init__(self, description: str, *, code: int = 0, err_code: int = 0) -> None:
        super().__init__(f"the server answered: {description} (code {code}, err_code {err_code})")
        self.description = description
        self.code = code
        self.err_code = err_code


def details(error: AIQueueError) -> dict[str, Any]:
    """The error as plain data, for ``--json``: its class, text, whether to retry, and its attributes.

    JobFailed's own `error` is called ``cause`` there. What JSON has no form for is told by its repr.
    """
    told = {k: v for k, v in vars(error).items() if not k.startswith("_") and k != "item"}
    data = {"cause" if k == "error" else k: _jsonable(v) for k, v in told.items()}
    return {**data, "error": type(error).__name__, "message": str(error), "retryable": error.retryable}


def _jsonable(value: object) -> Any:
    if isinstance(value, tuple):
        return [_jsonable(each) for each in value]
    return value if value is None or isinstance(value, str | int | float) else repr(value)
