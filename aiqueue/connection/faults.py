"""Translation of every error of nats-py and JetStream into `aiqueue.errors`: two tables, tested to be complete."""

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

_Translator = Callable[[Exception, str], AIQueueError]


def _to_unavailable(error: Exception, what: str) -> AIQueueError:
    return Unavailable(f"{what}: {error_text(error)}")


def _to_maybe_stored(error: Exception, what: str) -> AIQueueError:
    return Unavailable(
        f"{what}: {error_text(error)}; the server may have carried it out all the same", maybe_stored=True
    )


def _to_bad_input(error: Exception, what: str) -> AIQueueError:
    return BadInput(f"{what}: {error_text(error)}")


def _to_access_denied(error: Exception, what: str) -> AIQueueError:
    problem = error_text(error)
    advice = "check user, password, token, credentials and TLS settings"
    if "CERTIFICATE_VERIFY_FAILED" in problem:
        advice = "set tls_ca to the certificate of the server's CA, and tls_hostname to the name in its certificate"
    return AccessDenied(f"{what}: {problem}: {advice}")


def _to_not_found(error: Exception, what: str) -> AIQueueError:
    return NotFound(f"{what}: {error_text(error)}")


def _to_conflict(error: Exception, what: str) -> AIQueueError:
    return Conflict(f"{what}: {error_text(error)}")


def _from_api_error(error: Exception, what: str) -> AIQueueError:
    if isinstance(error, je.APIError):
        return from_api(error.code or 0, error.err_code or 0, error.description or error_text(error), what)
    return ServerError(f"{what}: {error_text(error)}")


def _from_text(error: Exception, what: str) -> AIQueueError:
    """nats-py raises many of the server's -ERR lines as plain errors that differ only in their text."""
    message = error_text(error).lower()
    if "authorization" in message or "authentication" in message or "permissions violation" in message:
        return _to_access_denied(error, what)
    if "maximum payload" in message:
        return TooLarge(0, 0)
    if "invalid connect url" in message or "invalid hostname" in message or "websocket" in message:
        return _to_bad_input(error, what)
    if "maximum connections" in message or "empty response" in message or "stale" in message:
        return _to_unavailable(error, what)
    return ServerError(f"{what}: {error_text(error)}")


CLASSES: dict[type[Exception], _Translator] = {
    ne.Error: _from_text,
    ne.TimeoutError: _to_maybe_stored,
    ne.FlushTimeoutError: _to_maybe_stored,
    ne.DrainTimeoutError: _to_maybe_stored,
    ne.NoRespondersError: _to_unavailable,
    ne.StaleConnectionError: _to_maybe_stored,
    ne.UnexpectedEOF: _to_maybe_stored,
    ne.OutboundBufferLimitError: _to_unavailable,
    ne.ConnectionClosedError: _to_unavailable,
    ne.ConnectionDrainingError: _to_unavailable,
    ne.ConnectionReconnectingError: _to_unavailable,
    ne.NoServersError: _to_unavailable,
    ne.ServerNotInPoolError: _to_unavailable,
    ne.SlowConsumerError: _to_unavailable,
    ne.ProtocolError: _to_unavailable,
    ne.JsonParseError: _to_unavailable,
    ne.SecureConnRequiredError: _to_access_denied,
    ne.SecureConnWantedError: _to_access_denied,
    ne.SecureConnFailedError: _to_access_denied,
    ne.AuthorizationError: _to_access_denied,
    ne.InvalidUserCredentialsError: _to_access_denied,
    ne.BadSubscriptionError: _to_bad_input,
    ne.BadSubjectError: _to_bad_input,
    ne.BadHeaderError: _to_bad_input,
    ne.BadTimeoutError: _to_bad_input,
    ne.InvalidCallbackTypeError: _to_bad_input,
    ne.NotJSMessageError: _to_bad_input,
    ne.MsgAlreadyAckdError: _to_bad_input,
    ne.MaxPayloadError: lambda _e, _w: TooLarge(0, 0),
    je.Error: _from_api_error,
    je.APIError: _from_api_error,
    je.ServiceUnavailableError: _from_api_error,
    je.ServerError: _from_api_error,
    je.NotFoundError: _from_api_error,
    je.BadRequestError: _from_api_error,
    je.ConsumerInvalidResetError: _from_api_error,
    je.NoStreamResponseError: _to_unavailable,
    je.TooManyStalledMsgsError: _to_unavailable,
    je.FetchTimeoutError: _to_unavailable,
    je.ConsumerSequenceMismatchError: _from_api_error,
    je.BucketNotFoundError: _to_not_found,
    je.BadBucketError: _from_api_error,
    je.KeyValueError: _from_api_error,
    je.KeyDeletedError: _to_not_found,
    je.KeyNotFoundError: _to_not_found,
    je.KeyWrongLastSequenceError: _to_conflict,
    je.NoKeysError: _to_not_found,
    je.KeyHistoryTooLargeError: _to_bad_input,
    je.InvalidKeyError: _to_bad_input,
    je.InvalidBucketNameError: _to_bad_input,
    je.InvalidObjectNameError: _to_bad_input,
    je.BadObjectMetaError: _from_api_error,
    je.LinkIsABucketError: _to_bad_input,
    je.DigestMismatchError: _from_api_error,
    je.ObjectNotFoundError: _to_not_found,
    je.ObjectDeletedError: _to_not_found,
    je.ObjectAlreadyExists: _to_conflict,
    je.KeyValueLimitMarkerTTLNotSupportedError: _from_api_error,
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
    10012: Unavailable,  # consumer cannot be created now; for example, its files are being removed
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
    10043: NotFound,  # no message at the sequence to delete
    10047: DiskFull,  # storage resources exceeded
    10052: ConfigMismatch,  # stream configuration
    10054: TooLarge,  # max_msg_size
    10058: ConfigMismatch,  # stream name in use with another configuration
    10059: NotFound,  # stream
    10060: ConfigMismatch,  # expected stream does not match
    10065: ConfigMismatch,  # subjects overlap with another stream
    10070: Conflict,  # wrong last Msg-Id
    10071: Conflict,  # wrong last sequence
    10074: Unavailable,  # insufficient replicas
    10076: Unavailable,  # JetStream not enabled
    10077: StreamFull,  # the store refused, because of a limit or a fault: see _from_store_error
    10099: ConfigMismatch,  # several unfiltered consumers on a work queue
    10100: ConfigMismatch,  # consumer filters overlap on a work queue
    10101: ConfigMismatch,  # consumer must be deliver all on a work queue
    10110: BadInput,  # purge: sequence and keep
    10134: ConfigMismatch,  # consumer replicas
    10148: ConfigMismatch,  # consumer already exists
    10149: NotFound,  # consumer does not exist (update only)
    10158: Conflict,  # a message with the same Msg-Id is being stored at this moment
    10164: Conflict,  # wrong last sequence, cluster
    10201: Conflict,  # duplicate in an atomic batch
}


NO_JETSTREAM = "enable JetStream for this user's account on the server, or use a user of another account"


def denied_right(error: Exception) -> tuple[str, str] | None:
    """What the server does not permit: "publish" or "subscribe", and the subject. None for any other error."""
    found = re.search(r'(publish|subscription) to "([^"]+)"', str(error), re.IGNORECASE)
    if found is None:
        return None
    return "publish" if found[1].lower() == "publish" else "subscribe", found[2]


def denied(verb: str, subject: str) -> AccessDenied:
    """What a user learns who may not publish or subscribe to a subject."""
    return AccessDenied(f"permission denied: this user may not {verb} to {subject}; see docs/operations/permissions.md")


def error_text(error: BaseException) -> str:
    """An exception as one line, never empty, without nats-py's prefix."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line.removeprefix("nats: ")


def from_api(code: int, err_code: int, description: str, what: str) -> AIQueueError:
    """Our error for an error reply of JetStream. An unknown code becomes ServerError with both codes."""
    kind = CODES.get(err_code)
    if err_code == 10039:
        error = Unavailable(f"{what}: {description}: {NO_JETSTREAM}")
        error.retryable = False
        return error
    if err_code == 10059:
        return NotFound(f"{what}: {description}: run `aiqueue apply` on this server first")
    if kind is StreamFull:
        return _from_store_error(description, what)
    if kind is not None and issubclass(kind, QueueFull):
        return kind(what, description)
    if kind is TooLarge:
        return BadInput(f"{what}: {description}: the stream's max_msg_size is smaller than this message")
    if kind is None:
        return ServerError(f"{what}: {description}", code=code, err_code=err_code)
    return kind(f"{what}: {description}")


def _from_store_error(description: str, what: str) -> AIQueueError:
    """JetStream has one code for all failures of a store, so the text decides."""
    if "maximum" not in description:
        if "no space left" in description:
            return DiskFull(what, description)
        return Unavailable(f"{what}: {description}")  # for example, the store is being closed or moved
    return LaneFull(what, description) if "per subject" in description else StreamFull(what, description)


def translate(error: Exception, what: str) -> AIQueueError:
    """Our error for anything that nats-py, the event loop or the socket raised during `what`."""
    if isinstance(error, AIQueueError):
        return error
    for cls in type(error).__mro__:
        if cls in CLASSES:
            return CLASSES[cls](error, what)
    if isinstance(error, ssl.SSLError):
        return _to_access_denied(error, what)
    if isinstance(error, TimeoutError):
        return _to_maybe_stored(error, what)
    if isinstance(error, OSError):
        return _to_unavailable(error, what)
    return ServerError(f"{what}: {type(error).__name__}: {error_text(error)}")
