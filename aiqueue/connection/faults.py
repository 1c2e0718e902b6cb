"""From every error of nats-py and JetStream that we can meet to ours: two tables, tested to be complete."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable

import nats.errors as ne
import nats.js.errors as je

from ..errors import (
    AccessDenied,
    AccountFull,
    AIQueueError,
    BadInput,
    ConfigMismatch,
    Conflict,
    DiskFull,
    LaneFull,
    NotFound,
    QueueFull,
    ServerError,
    StreamFull,
    TooLarge,
    Unavailable,
)

_Make = Callable[[Exception, str], AIQueueError]


def _unavailable(error: Exception, what: str) -> AIQueueError:
    return Unavailable(f"{what}: {text(error)}")


def _maybe(error: Exception, what: str) -> AIQueueError:
    return Unavailable(f"{what}: {text(error)}; it may have been carried out all the same", maybe_stored=True)


def _bad(error: Exception, what: str) -> AIQueueError:
    return BadInput(f"{what}: {text(error)}")


def _denied(error: Exception, what: str) -> AIQueueError:
    return AccessDenied(f"{what}: {text(error)}: check user, password, token, credentials and TLS settings")


def _missing(error: Exception, what: str) -> AIQueueError:
    return NotFound(f"{what}: {text(error)}")


def _conflict(error: Exception, what: str) -> AIQueueError:
    return Conflict(f"{what}: {text(error)}")


def _api(error: Exception, what: str) -> AIQueueError:
    if isinstance(error, je.APIError):
        return from_api(error.code or 0, error.err_code or 0, error.description or text(error), what)
    return ServerError(f"{what}: {text(error)}")


def _plain(error: Exception, what: str) -> AIQueueError:
    """nats-py tells many things of the server's -ERR lines by text alone."""
    said = text(error).lower()
    if "authorization" in said or "authentication" in said or "permissions violation" in said:
        return _denied(error, what)
    if "maximum payload" in said:
        return TooLarge(0, 0)
    if "invalid connect url" in said or "invalid hostname" in said or "websocket" in said:
        return _bad(error, what)
    if "maximum connections" in said or "empty response" in said or "stale" in said:
        return _unavailable(error, what)
    return ServerError(f"{what}: {text(error)}")


CLASSES: dict[type[Exception], _Make] = {
    ne.Error: _plain,
    ne.TimeoutError: _maybe,
    ne.FlushTimeoutError: _maybe,
    ne.DrainTimeoutError: _maybe,
    ne.NoRespondersError: _unavailable,
    ne.StaleConnectionError: _maybe,
    ne.UnexpectedEOF: _maybe,
    ne.OutboundBufferLimitError: _unavailable,
    ne.ConnectionClosedError: _unavailable,
    ne.ConnectionDrainingError: _unavailable,
    ne.ConnectionReconnectingError: _unavailable,
    ne.NoServersError: _unavailable,
    ne.ServerNotInPoolError: _unavailable,
    ne.SlowConsumerError: _unavailable,
    ne.ProtocolError: _unavailable,
    ne.JsonParseError: _unavailable,
    ne.SecureConnRequiredError: _denied,
    ne.SecureConnWantedError: _denied,
    ne.SecureConnFailedError: _denied,
    ne.AuthorizationError: _denied,
    ne.InvalidUserCredentialsError: _denied,
    ne.BadSubscriptionError: _bad,
    ne.BadSubjectError: _bad,
    ne.BadHeaderError: _bad,
    ne.BadTimeoutError: _bad,
    ne.InvalidCallbackTypeError: _bad,
    ne.NotJSMessageError: _bad,
    ne.MsgAlreadyAckdError: _bad,
    ne.MaxPayloadError: lambda _e, _w: TooLarge(0, 0),
    je.Error: _api,
    je.APIError: _api,
    je.ServiceUnavailableError: _api,
    je.ServerError: _api,
    je.NotFoundError: _api,
    je.BadRequestError: _api,
    je.ConsumerInvalidResetError: _api,
    je.NoStreamResponseError: _unavailable,
    je.TooManyStalledMsgsError: _unavailable,
    je.FetchTimeoutError: _unavailable,
    je.ConsumerSequenceMismatchError: _api,
    je.BucketNotFoundError: _missing,
    je.BadBucketError: _api,
    je.KeyValueError: _api,
    je.KeyDeletedError: _missing,
    je.KeyNotFoundError: _missing,
    je.KeyWrongLastSequenceError: _conflict,
    je.NoKeysError: _missing,
    je.KeyHistoryTooLargeError: _bad,
    je.InvalidKeyError: _bad,
    je.InvalidBucketNameError: _bad,
    je.InvalidObjectNameError: _bad,
    je.BadObjectMetaError: _api,
    je.LinkIsABucketError: _bad,
    je.DigestMismatchError: _api,
    je.ObjectNotFoundError: _missing,
    je.ObjectDeletedError: _missing,
    je.ObjectAlreadyExists: _conflict,
    je.KeyValueLimitMarkerTTLNotSupportedError: _api,
}

# JetStream's err_codes (nats-server, server/errors.json)
CODES: dict[int, type[AIQueueError]] = {
    10002: AccountFull,  # resource limits exceeded for account
    10003: BadInput,  # bad request
    10004: Unavailable,  # cluster: incomplete results
    10005: Unavailable,  # cluster: no suitable peers
    10006: Unavailable,  # cluster: not leader
    10008: Unavailable,  # temporarily unavailable
    10009: Unavailable,  # meta leader not available
    10010: Unavailable,  # cluster: not member
    10011: Unavailable,  # cluster: needs a leader
    10012: Unavailable,  # consumer can not be created (now: its files are being removed, say)
    10013: ConfigMismatch,  # consumer name already in use
    10014: NotFound,  # consumer
    10023: DiskFull,  # insufficient resources: max_file_store
    10025: BadInput,  # invalid JSON
    10026: QueueFull,  # maximum consumers
    10027: AccountFull,  # maximum streams
    10028: DiskFull,  # memory resources
    10035: AccessDenied,  # no permission
    10037: NotFound,  # message
    10039: Unavailable,  # JetStream not enabled for the account
    10043: NotFound,  # a message to delete: its sequence
    10047: DiskFull,  # storage resources exceeded
    10052: ConfigMismatch,  # stream configuration
    10054: TooLarge,  # max_msg_size
    10058: ConfigMismatch,  # stream name in use with another configuration
    10059: NotFound,  # stream
    10060: ConfigMismatch,  # expected stream does not match
    10065: ConfigMismatch,  # subjects overlap with another stream
    10071: Conflict,  # wrong last sequence
    10074: Unavailable,  # insufficient replicas
    10076: Unavailable,  # JetStream not enabled
    10077: StreamFull,  # the store refused, by a limit (LaneFull: that per subject) or by a fault: see _store_failed
    10099: ConfigMismatch,  # several unfiltered consumers on a work queue
    10100: ConfigMismatch,  # consumer filters overlap on a work queue
    10101: ConfigMismatch,  # consumer must be deliver all on a work queue
    10110: BadInput,  # purge: sequence and keep
    10134: ConfigMismatch,  # consumer replicas
    10148: ConfigMismatch,  # consumer already exists
    10149: NotFound,  # consumer does not exist (update only)
    10158: Conflict,  # the same id is being written at this moment
    10164: Conflict,  # wrong last sequence, cluster
    10201: Conflict,  # duplicate in an atomic batch
}


def denied_subject(error: Exception) -> str | None:
    """The subject, in lower case, that the server forbids us to publish to; None for any other error."""
    found = re.search(r'publish to "([^"]+)"', str(error), re.IGNORECASE)
    return found[1].lower() if found else None


def text(error: BaseException) -> str:
    """One line of an exception, never empty, without nats-py's prefix."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line.removeprefix("nats: ")


def from_api(code: int, err_code: int, description: str, what: str) -> AIQueueError:
    """Our error for an error answer of JetStream. Unknown codes become ServerError with both codes."""
    made = CODES.get(err_code)
    if made is StreamFull:
        return _store_failed(description, what)
    if made is not None and issubclass(made, QueueFull):
        return made(what, description)
    if made is TooLarge:
        return BadInput(f"{what}: {description}: the stream's max_msg_size is smaller than this message")
    if made is None:
        return ServerError(f"{what}: {description}", code=code, err_code=err_code)
    return made(f"{what}: {description}")


def _store_failed(said: str, what: str) -> AIQueueError:
    """One code stands for all that a store may say."""
    if "maximum" not in said:
        if "no space left" in said:
            return DiskFull(what, said)
        return Unavailable(f"{what}: {said}")  # it is being closed or moved, say
    return LaneFull(what, said) if "per subject" in said else StreamFull(what, said)


def translate(error: Exception, what: str) -> AIQueueError:
    """Our error for anything that nats-py, the event loop or the socket raised while doing `what`."""
    if isinstance(error, AIQueueError):
        return error
    for cls in type(error).__mro__:
        if cls in CLASSES:
            return CLASSES[cls](error, what)
    if isinstance(error, ssl.SSLError):
        return _denied(error, what)
    if isinstance(error, TimeoutError):
        return _maybe(error, what)
    if isinstance(error, OSError):
        return _unavailable(error, what)
    return ServerError(f"{what}: {type(error).__name__}: {text(error)}")
