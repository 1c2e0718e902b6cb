"""aiohttp, which nats-py needs for WebSockets only, is imported when an address asks for it and not before."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

import aiqueue
from aiqueue.server import supervisor

from ..support import ROOT, NatsProcess

pytest.importorskip("aiohttp")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_client_and_worker_are_imported_without_aiohttp_and_a_later_import_of_it_is_the_real_one() -> None:
    code = (
        "import sys, aiqueue; aiqueue.connect, aiqueue.Worker; loaded = 'aiohttp' in sys.modules; "
        "import nats.aio.transport as transport; import aiohttp.web; "
        "print('nats' in sys.modules, loaded, transport.aiohttp.WSMsgType is aiohttp.WSMsgType, aiohttp.web.__name__)"
    )
    assert run(code) == "True False True aiohttp.web"


@pytest.mark.filterwarnings("ignore:parameter 'timeout' of type 'float':DeprecationWarning")  # nats-py passes one
async def test_a_websocket_address_connects(own_server: Callable[..., NatsProcess]) -> None:
    port = supervisor.free_port()
    server = own_server(f"websocket {{ port: {port}, no_tls: true }}")
    async with aiqueue.connect(f"ws://127.0.0.1:{port}", user=server.user, password=server.password) as client:
        answer = await client.connection.api("STREAM.NAMES")
    assert answer["total"] == 0
