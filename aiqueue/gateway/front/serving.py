"""Runs the front: its socket, its drain at SIGTERM, and gateway.toml again at SIGHUP."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Final

import uvicorn

from ...errors import AIQueueError, BadInput
from ..config_file import load
from .app import build_app
from .context import Front
from .http_protocol import BoundedProtocol

log = logging.getLogger(__name__)

BACKLOG: Final = 2_048
KEEP_ALIVE_S: Final = 75  # longer than the 60 s of common load balancers, which must close first


def listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """Return a socket that is bound. `port` 0: a free one. `shared`: several processes may serve the same port.

    Raises BadInput if the address cannot be used.
    """
    try:
        (family, kind, number, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        bound = socket.socket(family, kind, number)
    except OSError as error:
        raise BadInput(_unusable(host, port, error)) from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise BadInput(_unusable(host, port, error)) from None
    bound.setblocking(False)
    return bound


def reserve(host: str, port: int) -> socket.socket:
    """Return a bound socket that keeps an address for the processes that share it. Nobody else may serve it already.

    Raises BadInput.
    """
    alone = listen(host, port)
    port = alone.getsockname()[1]
    alone.close()
    return listen(host, port, shared=True)


def url_of(bound: socket.socket) -> str:
    """Return the base URL for clients, such as ``http://127.0.0.1:8000/v1``."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def _unusable(host: str, port: int, error: OSError) -> str:
    why = " ".join((error.strerror or str(error)).lower().split())
    return f"cannot listen on {host}:{port}: {why}; choose another --host or --port"


class _Server(uvicorn.Server):
    """uvicorn's server, whose signals are handled by `serve`. `on_ready` is called when it accepts connections."""

    on_ready: Callable[[], None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.on_ready is not None:
            self.on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(
    front: Front,
    bound: socket.socket,
    *,
    drain_timeout_s: float = 30.0,
    on_ready: Callable[[], None] | None = None,
    stop: asyncio.Event | None = None,
    cuts_at_second: bool = True,
) -> bool:
    """Serve on this socket until SIGTERM or Ctrl-C, or until `stop` is set. Return whether all requests were answered.

    Then new connections are refused, and requests under way have `drain_timeout_s` to end. What is left is cut: jobs go
    on, and a client gets the rest of a stream by Last-Event-ID. `cuts_at_second`: a second signal cuts at once.
    """
    server = _Server(
        uvicorn.Config(
            build_app(front), http=BoundedProtocol, ws="none", lifespan="off", loop="none", log_config=None,
            access_log=False, proxy_headers=False, server_header=False, backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
    )  # fmt: skip
    server.on_ready = on_ready
    stop = stop or asyncio.Event()
    with _signals(front, server, stop, cuts_at_second):
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait([serving, stopped], return_when=asyncio.FIRST_COMPLETED)
        front.is_draining = server.should_exit = True
        done, _ = await asyncio.wait([serving], timeout=drain_timeout_s)
        left = len(server.server_state.tasks)
        for task in [*server.server_state.tasks]:
            task.cancel()
        server.force_exit = True
        stopped.cancel()
        await serving
        return bool(done) or not left


@contextlib.contextmanager
def _signals(front: Front, server: uvicorn.Server, stop: asyncio.Event, cuts_at_second: bool) -> Iterator[None]:
    def on_stop() -> None:
        if stop.is_set() and cuts_at_second:
            server.force_exit = True
            for task in [*server.server_state.tasks]:
                task.cancel()
        stop.set()

    loop, handled = asyncio.get_running_loop(), []
    handlers = {signal.SIGINT: on_stop, signal.SIGTERM: on_stop, signal.SIGHUP: lambda: _reload(front)}
    for number, handler in handlers.items():
        with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread
            loop.add_signal_handler(number, handler)
            handled.append(number)
    try:
        yield
    finally:
        for number in handled:
            loop.remove_signal_handler(number)


def _reload(front: Front) -> None:
    """Read gateway.toml again; if it is wrong, that is logged, and the former one stays."""
    try:
        front.use(load(settings=front.client.settings))
    except AIQueueError as error:
        log.error("gateway.toml is not reloaded, and the former one stays: %s", error)  # noqa: TRY400
    else:
        log.info("%s is reloaded: %d models", front.config.file, len(front.config.models))
