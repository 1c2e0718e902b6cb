"""One nats-py client: its options from our settings, its sockets with a time limit, its first connection bounded."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import Any

import nats.errors as ne
from nats.aio.client import Server

from ..config import Settings
from ..errors import AccessDenied, SettingsError, Unavailable
from .faults import text, translate
from .wire import PENDING_BYTES, Link

PINGS_MISSED_MAX = 2
RECONNECT_FIRST_S, RECONNECT_CAP_S = 0.05, 1.0

Callback = Callable[[], Awaitable[None]]


def reconnect_delay_s(attempt: int, rng: Callable[[], float] = random.random) -> float:
    """Seconds before reconnect number `attempt` (0 is the first): exponential, half of it jitter, capped."""
    full = min(RECONNECT_CAP_S, RECONNECT_FIRST_S * 2.0 ** min(attempt, 16))
    return full * (1 - 0.5 * rng())


def _next_server(servers: list[Server], _info: dict[str, Any]) -> tuple[Server, float]:
    """The server tried least, after a delay that grows with the rounds made over all of them."""
    chosen = min(servers, key=lambda server: server.reconnects)
    return chosen, reconnect_delay_s(chosen.reconnects)


def _tls(settings: Settings) -> ssl.SSLContext | None:
    wanted = settings.tls_ca or settings.tls_cert or any(url.startswith("tls://") for url in settings.servers)
    if not wanted:
        return None
    try:
        context = ssl.create_default_context(cafile=settings.tls_ca)
        if settings.tls_cert:
            context.load_cert_chain(settings.tls_cert, settings.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"tls_ca, tls_cert or tls_key: {text(error)}") from None
    return context


def _options(settings: Settings) -> dict[str, Any]:
    for name in ("creds", "nkey"):
        path = getattr(settings, name)
        if path is not None and not path.is_file():
            raise SettingsError(f"{name}: there is no file {path}")
    secret = {name: value.get_secret_value() for name in ("password", "token") if (value := getattr(settings, name))}
    return {
        "servers": settings.servers,
        "name": settings.name,
        "user": settings.user,
        "password": secret.get("password"),
        "token": secret.get("token"),
        "user_credentials": str(settings.creds) if settings.creds else None,
        "nkeys_seed": str(settings.nkey) if settings.nkey else None,
        "tls": _tls(settings),
        "tls_hostname": settings.tls_hostname,
        "tls_handshake_first": settings.tls_handshake_first,
        "inbox_prefix": settings.inbox_prefix or f"_INBOX.{secrets.token_hex(8)}",
        "connect_timeout": max(1, round(settings.connect_timeout)),
        "ping_interval": settings.ping_interval,
        "max_outstanding_pings": PINGS_MISSED_MAX,
        "max_reconnect_attempts": -1,
        "reconnect_time_wait": RECONNECT_FIRST_S,
        "reconnect_to_server_handler": _next_server,
        "pending_size": PENDING_BYTES,
    }


async def dial(
    settings: Settings, *, lost: Callback, regained: Callback, closed: Callback, noted: Callable[[Exception], None]
) -> Link:
    """A connected client. `noted` hears of every error that no call of ours will raise.

    nats-py's first connection would go on for ever and swallow its errors: here it ends after
    ``settings.connect_timeout``, and at once when the server refuses us. Raises Unavailable, AccessDenied,
    SettingsError.
    """
    end = time.monotonic() + settings.connect_timeout
    while True:
        left = end - time.monotonic()
        try:
            return await _dial_for(left, settings, lost, regained, closed, noted)
        except Unavailable:
            # a server that refuses us may reset the connection before its reason is read: ask it again
            if time.monotonic() > end - RECONNECT_FIRST_S:
                raise
            await asyncio.sleep(RECONNECT_FIRST_S)


async def _dial_for(
    timeout_s: float,
    settings: Settings,
    lost: Callback,
    regained: Callback,
    closed: Callback,
    noted: Callable[[Exception], None],
) -> Link:
    options = _options(settings)
    where = settings.addresses
    standing = False
    last: list[Exception] = []
    refused = asyncio.Event()

    async def on_error(error: Exception) -> None:
        if standing:
            noted(error)
            return
        last[:] = [error]
        if isinstance(translate(error, ""), AccessDenied):
            refused.set()

    link = Link()
    connecting = asyncio.create_task(
        link.connect(error_cb=on_error, disconnected_cb=lost, reconnected_cb=regained, closed_cb=closed, **options)
    )
    stop = asyncio.create_task(refused.wait())
    try:
        await asyncio.wait({connecting, stop}, timeout=timeout_s, return_when="FIRST_COMPLETED")
        if connecting.done() and not connecting.cancelled() and connecting.exception() is None:
            standing = True
            return link
        error = connecting.exception() if connecting.done() else (last[0] if last else None)
    finally:
        stop.cancel()
        if not standing:
            connecting.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await connecting
            await link.forsake()
    raise _first_failure(error, where, settings)


def _first_failure(error: BaseException | None, where: str, settings: Settings) -> Exception:
    if isinstance(error, ImportError):
        return SettingsError(f"creds and nkey need another package: pip install 'aiqueue[nkeys]' ({text(error)})")
    if error is None or (isinstance(error, TimeoutError) and not isinstance(error, ne.AuthorizationError)):
        return Unavailable(f"no NATS server answers at {where} within {settings.connect_timeout:g} s")
    if type(error).__module__.partition(".")[0] == "nkeys":
        return SettingsError(f"creds or nkey: not a file of the right kind ({text(error)})")
    if not isinstance(error, Exception):
        return Unavailable(f"{where}: {text(error)}")
    ours = translate(error, where)
    if isinstance(ours, Unavailable):
        return Unavailable(f"no NATS server answers at {where} ({text(error)}): is it running, is NATS_URL right?")
    return ours
