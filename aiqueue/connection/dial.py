"""Connecting one nats-py client: options from our settings, a first connection with a time limit, readable errors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import ssl
import time
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from typing import Any

import nats.errors as ne
from nats.aio.client import Server

from ..config import Settings
from ..errors import AccessDenied, AIQueueError, ServerError, SettingsError, Unavailable
from ..server_urls import Credentials
from .faults import error_text, translate
from .nats_client import PENDING_BYTES, NatsClient, credential_options, to_its_end

log = logging.getLogger(__name__)

PINGS_MISSED_MAX = 2
RECONNECT_FIRST_S, RECONNECT_CAP_S = 0.05, 1.0
CANCEL_AGAIN_S = 0.1
REVIVE_AGAIN_S = 1.0

Callback = Callable[[], Awaitable[None]]
Revive = Callable[[Settings], Awaitable[Settings]]


def reconnect_delay_s(attempt: int, rng: Callable[[], float] = random.random) -> float:
    """Seconds before reconnect number `attempt` (the first is 0): exponential, capped, half of the delay is jitter."""
    full = min(RECONNECT_CAP_S, RECONNECT_FIRST_S * 2.0 ** min(attempt, 16))
    return full * (1 - 0.5 * rng())


def _choose_server(servers: list[Server], _info: dict[str, Any]) -> tuple[Server, float]:
    """The server with the fewest attempts, and a delay that grows with its attempts."""
    chosen = min(servers, key=lambda server: server.reconnects)
    return chosen, reconnect_delay_s(chosen.reconnects)


def _tls_context(settings: Settings) -> ssl.SSLContext | None:
    enabled = settings.tls_ca or settings.tls_cert or any(url.startswith("tls://") for url in settings.servers)
    if not enabled:
        return None
    try:
        context = ssl.create_default_context(cafile=settings.tls_ca)
        if settings.tls_cert:
            context.load_cert_chain(settings.tls_cert, settings.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"cannot load tls_ca, tls_cert or tls_key: {error_text(error)}") from None
    return context


def _default_credentials(settings: Settings) -> Credentials:
    """The credentials of all servers without their own: those in the settings, else those of the first URL. Credentials
    files are read by nats-py.
    """
    given = Credentials(settings.user, settings.password, settings.token)
    if (given.user and given.password) or given.token or settings.creds or settings.nkey:
        return given
    return next(iter(settings.url_credentials.values()), given)


def _server_credentials(settings: Settings) -> dict[str, Credentials]:
    """The credentials of single servers, by host and port: of those whose URL differs from the default."""
    default = _default_credentials(settings)
    if default not in settings.url_credentials.values():
        return {}
    return {url.split("/")[2]: each for url, each in settings.url_credentials.items() if each != default}


def _client_options(settings: Settings) -> dict[str, Any]:
    if any(url.startswith(("ws://", "wss://")) for url in settings.servers) and find_spec("aiohttp") is None:
        raise SettingsError("addresses that begin with ws:// or wss:// need `pip install aiohttp`")
    for name in ("creds", "nkey"):
        path = getattr(settings, name)
        if path is not None and not path.is_file():
            raise SettingsError(f"{name}: file {path} does not exist")
    return {
        "servers": settings.servers,
        "name": settings.name,
        **credential_options(_default_credentials(settings)),
        "user_credentials": str(settings.creds) if settings.creds else None,
        "nkeys_seed": str(settings.nkey) if settings.nkey else None,
        "tls": _tls_context(settings),
        "tls_hostname": settings.tls_hostname,
        "tls_handshake_first": settings.tls_handshake_first,
        "inbox_prefix": settings.inbox_prefix or f"_INBOX.{secrets.token_hex(8)}",
        "connect_timeout": max(1, round(settings.connect_timeout)),
        "ping_interval": settings.ping_interval,
        "max_outstanding_pings": PINGS_MISSED_MAX,
        "max_reconnect_attempts": -1,
        "reconnect_time_wait": RECONNECT_FIRST_S,
        "reconnect_to_server_handler": _choose_server,
        "pending_size": PENDING_BYTES,
    }


async def restart_server(revive: Revive, settings: Settings, is_needed: Callable[[], bool]) -> Settings | None:
    """Restart an embedded server, again and again while `is_needed`. Returns its settings, or None if not needed."""
    while is_needed():
        try:
            return await revive(settings)
        except AIQueueError as error:
            log.warning("cannot restart the embedded server: %s", error)
            await asyncio.sleep(REVIVE_AGAIN_S)
    return None


class _Failures:
    """Why the attempts to connect failed. `telling` is the last error that tells most.

    A server that refuses a connection says why and closes it. The reset may come before its words are read, so a lost
    socket never replaces what an earlier attempt was told. `lost_later`: there was such a loss, so the reason may have
    passed.
    """

    def __init__(self) -> None:
        self.telling: BaseException | None = None
        self.lost_later = False

    def note(self, error: BaseException | None) -> None:
        if self.telling is not None and _is_lost(error) and not _is_lost(self.telling):
            self.lost_later = True
            return
        self.telling = error if error is not None else self.telling


def _is_lost(error: BaseException | None) -> bool:
    """Return whether the socket was lost, or never there, before the server said a word."""
    return isinstance(error, OSError | ne.UnexpectedEOF) or "empty response from server" in str(error)


async def dial(
    settings: Settings,
    on_disconnected: Callback,
    on_reconnected: Callback,
    on_closed: Callback,
    on_error: Callable[[Exception], None],
) -> NatsClient:
    """Connect a client. `on_error` gets every later error that no call raises.

    nats-py's first connection would retry for ever and swallow its errors. This one ends after
    ``settings.connect_timeout``, or at once if the server refuses the user. Raises Unavailable, AccessDenied,
    SettingsError.
    """
    end = time.monotonic() + settings.connect_timeout
    failures = _Failures()
    while True:
        left = end - time.monotonic()
        try:
            return await _dial_once(left, settings, failures, on_disconnected, on_reconnected, on_closed, on_error)
        except Unavailable:
            # a server that refuses the user may reset the connection before its reason is read, so dial again
            if time.monotonic() > end - RECONNECT_FIRST_S:
                raise
            await asyncio.sleep(RECONNECT_FIRST_S)


async def _dial_once(
    timeout_s: float,
    settings: Settings,
    failures: _Failures,
    on_disconnected: Callback,
    on_reconnected: Callback,
    on_closed: Callback,
    on_error: Callable[[Exception], None],
) -> NatsClient:
    options = _client_options(settings)
    connected = False
    refused = asyncio.Event()

    def note_error(error: Exception) -> None:
        if connected:
            on_error(error)
            return
        if refusal := client.unread_refusal():
            error = ne.Error(f"nats: {refusal}")
        failures.note(error)
        if isinstance(translate(error, ""), AccessDenied):
            refused.set()

    client = NatsClient(_server_credentials(settings), note_error)
    connecting = asyncio.create_task(
        client.connect(
            error_cb=client.note_error,
            disconnected_cb=on_disconnected,
            reconnected_cb=on_reconnected,
            closed_cb=on_closed,
            **options,
        )
    )
    refusal = asyncio.create_task(refused.wait())
    try:
        await asyncio.wait({connecting, refusal}, timeout=timeout_s, return_when="FIRST_COMPLETED")
        if connecting.done() and not connecting.cancelled() and connecting.exception() is None:
            connected = True
            return client
        if connecting.done() and not connecting.cancelled():
            failures.note(connecting.exception())
        failure = _explain_failure(failures.telling, settings)
        if isinstance(failure, ServerError) and failures.lost_later:
            failure = Unavailable(f"{settings.addresses}: {failure.description}")
    finally:
        refusal.cancel()
        if not connected:
            await to_its_end(_give_up(client, connecting))
    raise failure


async def _give_up(client: NatsClient, connecting: asyncio.Task[None]) -> None:
    """End an attempt to connect, and release what it has opened."""
    try:
        while not connecting.done():  # again: Python 3.11's wait_for swallows a cancellation that meets its result
            connecting.cancel()
            await asyncio.wait({connecting}, timeout=CANCEL_AGAIN_S)
        with contextlib.suppress(asyncio.CancelledError, Exception):
            connecting.result()
    finally:
        await client.abort()


def _doubt(settings: Settings) -> str:
    """What to look at where no server answers: an embedded one has an address that nobody has set."""
    source, key = settings.place("url")
    if settings.source("url") == "default":
        return "is it running?"
    return f"is it running, is {f'{key} in {source}' if key else source} right?"


def _explain_failure(error: BaseException | None, settings: Settings) -> Exception:
    """The error of ours that says why the first connection failed."""
    addresses = settings.addresses
    if isinstance(error, ImportError):
        return SettingsError(f"creds and nkey need `pip install 'aiqueue[nkeys]'` ({error_text(error)})")
    if error is None or (isinstance(error, TimeoutError) and not isinstance(error, ne.AuthorizationError)):
        return Unavailable(
            f"no NATS server answers at {addresses} within {settings.connect_timeout:g} s: {_doubt(settings)}"
        )
    if type(error).__module__.partition(".")[0] == "nkeys":
        return SettingsError(f"creds or nkey: the file holds no valid credentials ({error_text(error)})")
    if not isinstance(error, Exception):
        return Unavailable(f"{addresses}: {error_text(error)}")
    ours = translate(error, addresses)
    if "maximum connections" in str(error):
        return Unavailable(f"{addresses}: the server takes no further connection: raise its max_connections")
    if isinstance(ours, Unavailable):
        return Unavailable(f"no NATS server answers at {addresses} ({error_text(error)}): {_doubt(settings)}")
    return ours
