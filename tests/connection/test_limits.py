"""Limits of the server and missing packages are named, with what to do about them."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable

import pytest

import aiqueue
from aiqueue.errors import ConfigMismatch, SettingsError, Unavailable
from aiqueue.topology import provision

from ..support import NatsProcess

OwnServer = Callable[..., NatsProcess]


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ("max_consumers: 2", r"AI_\w+ needs max_consumers of [\d,]+: .*: raise max_consumers of this account"),
        ("max_streams: 2", r"23 streams more are needed, and the account may have 2 and has 0: .* raise max_streams"),
        (
            "max_file: 1MiB",
            r"more file storage is needed, 1.0 MiB is free: declare less .* or raise max_file of this account",
        ),
    ],
)
async def test_apply_names_the_limit_of_the_account_that_is_too_low(
    own_server: OwnServer, limits: str, text: str
) -> None:
    server = own_server(
        f"accounts {{ A {{ jetstream {{ {limits} }}, users: [{{user: a, password: p}}] }} }}\nauthorization {{}}"
    )
    async with aiqueue.connect(server.url, user="a", password="p") as client:
        with pytest.raises(ConfigMismatch, match=text):
            await provision.apply(client.connection, client.topology)


async def test_a_server_with_all_its_connections_in_use_says_so(own_server: OwnServer) -> None:
    server = own_server("max_connections: 1\nauthorization {}")
    async with aiqueue.connect(server.url):
        with pytest.raises(Unavailable, match="takes no further connection: raise its max_connections"):
            await aiqueue.connect(server.url, connect_timeout=2).open()


@pytest.mark.skipif(importlib.util.find_spec("aiohttp") is not None, reason="aiohttp is installed")
@pytest.mark.parametrize("scheme", ["ws", "wss"])
async def test_a_websocket_address_without_aiohttp_names_the_package(scheme: str) -> None:
    with pytest.raises(SettingsError, match="pip install aiohttp"):
        await aiqueue.connect(f"{scheme}://127.0.0.1:1").open()


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("maximum connections exceeded", "takes no further connection: raise its max_connections"),
        ("Connection throttling is active. Please try again later.", "throttling is active"),
    ],
)
async def test_a_refusal_is_told_although_later_sockets_are_lost_before_its_words_are_read(
    reason: str, text: str
) -> None:
    """What the server does under load: it closes a socket that has unread data, and the client gets a reset."""
    refused = 0

    async def refuse(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal refused
        refused += 1
        if refused == 1:
            writer.write(b'INFO {"max_payload":1048576,"headers":true}\r\n-ERR \'%b\'\r\n' % reason.encode())
            await writer.drain()
            writer.close()
        else:
            writer.transport.abort()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        with pytest.raises(Unavailable, match=text):
            await aiqueue.connect(f"nats://127.0.0.1:{port}", connect_timeout=1).open()
    assert refused > 1
