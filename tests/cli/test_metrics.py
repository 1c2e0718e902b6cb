"""``metrics``: over HTTP, and on stdout."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import aiqueue
from aiqueue.cli import metrics_server
from aiqueue.cli.app import app
from aiqueue.cli.metrics_server import MetricsServer
from aiqueue.errors import BadInput
from aiqueue.inspect import MetricsExporter, metrics_exporter

from ..metrics.test_exposition import samples
from ..support import Account, create_streams, eventually

pytestmark = pytest.mark.families("agent.tasks")


def declare() -> None:
    async def run() -> None:
        async with aiqueue.connect() as client:
            await create_streams(client)

    asyncio.run(run())


@pytest.fixture
def cli(account: Account, monkeypatch: pytest.MonkeyPatch) -> Any:
    settings = {"URL": account.url, "USER": account.user, "PASSWORD": account.password, "FAMILIES": "agent.tasks"}
    for name, value in settings.items():
        monkeypatch.setenv(f"AIQUEUE_{name}", value)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["metrics", *arguments])

    return run


def test_once_prints_the_metrics_and_names_a_source_that_is_not_there(cli: Any) -> None:
    missing = cli("--once")
    assert missing.exit_code == 1
    assert samples(missing.stdout)['aiqueue_up{source="history"}'] == 0
    assert "error: history: " in missing.stderr
    declare()
    found = cli("--once", "--tenants")
    assert (found.exit_code, found.stderr) == (0, "")
    assert samples(found.stdout)['aiqueue_up{source="history"}'] == 1


@pytest.mark.parametrize("arguments", [["--port", "70000"], ["--host", "no such host", "--port", "0"], ["--json"]])
def test_wrong_arguments_are_refused(cli: Any, arguments: list[str]) -> None:
    declare()
    assert cli(*arguments).exit_code == 2


@pytest.fixture
async def server(client: aiqueue.Client) -> AsyncIterator[MetricsServer]:
    exporter = MetricsExporter(client.connection, client.topology)
    found = MetricsServer(exporter)
    await found.stop()
    yield found
    await found.stop()
    await found.stop()
    await exporter.stop()


@pytest.fixture
async def port(server: MetricsServer) -> int:
    return await server.start("127.0.0.1", 0)


async def send(port: int, request: bytes, *, end: bool = False) -> tuple[int, dict[str, str], str]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    if end:
        writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), 30)
    writer.close()
    head, _, body = answer.decode().partition("\r\n\r\n")
    status, *lines = head.split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    assert int(headers["content-length"]) == len(body.encode())
    assert headers["connection"] == "close"
    return int(status.split()[1]), headers, body


async def test_metrics_and_health_are_served(port: int) -> None:
    for path in ("/metrics", "/metrics?x=1"):
        status, headers, body = await send(port, f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        assert status == 200
        assert headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert samples(body)['aiqueue_up{source="queues"}'] == 1
    assert (await send(port, b"GET /healthz HTTP/1.0\r\n\r\n"))[::2] == (200, "ok\n")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /metrics/ HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 405),
        (b"HEAD /healthz HTTP/1.1\r\n\r\n", 405),
        (b"GET /metrics\r\n\r\n", 400),
        (b"\x16\x03\x01\x00\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 70_000, 431),
    ],
)
async def test_anything_else_is_refused(port: int, request_: bytes, status: int) -> None:
    found, headers, _ = await send(port, request_, end=not request_.endswith(b"\r\n\r\n"))
    assert found == status
    assert (headers.get("allow") == "GET") == (status == 405)


async def test_who_sends_nothing_is_sent_away_and_too_many_are_refused(
    port: int, server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_server, "CONNECTIONS_MAX", 2)
    monkeypatch.setattr(metrics_server, "REQUEST_S", 2.0)
    silent = [asyncio.create_task(send(port, b"GET ")) for _ in range(2)]
    await eventually(lambda: len(server._connections) == 2)
    assert (await send(port, b"GET /healthz HTTP/1.1\r\n\r\n"))[0] == 503
    assert [status for status, *_ in await asyncio.gather(*silent)] == [408, 408]
    await eventually(lambda: not server._connections)
    assert (await send(port, b"GET /healthz HTTP/1.1\r\n\r\n"))[0] == 200


async def test_who_takes_nothing_of_an_answer_is_left(
    port: int, server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_server, "REQUEST_S", 0.5)
    length = 60_000  # more than the two sockets take here, and less than a transport gathers by itself

    async def scrape() -> Any:
        return metrics_exporter.Scrape("x" * length, {})

    monkeypatch.setattr(server._exporter, "scrape", scrape)
    assert server._server is not None
    server._server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.connect(("127.0.0.1", port))
        slow.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        await eventually(lambda: server._connections)
        await eventually(lambda: not server._connections)
        slow.settimeout(20)
        taken = 0
        with contextlib.suppress(ConnectionError):
            while data := await asyncio.to_thread(slow.recv, 65_536):
                taken += len(data)
    assert taken < length


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_amid_a_request(cli: Any, number: signal.Signals) -> None:
    declare()
    process = subprocess.Popen(
        [sys.executable, "-m", "aiqueue", "metrics", "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        found = re.match(r"metrics: http://127\.0\.0\.1:(\d+)/metrics, of nats://", process.stdout.readline())
        assert found is not None
        with socket.create_connection(("127.0.0.1", int(found[1])), timeout=30) as silent:
            silent.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
            assert silent.recv(15) == b"HTTP/1.1 200 OK"
            with socket.create_connection(("127.0.0.1", int(found[1])), timeout=30):
                process.send_signal(number)
                said, complained = process.communicate(timeout=40)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, said, complained) == (0, "metrics: stopped\n", "")


async def test_a_stop_ends_requests_that_are_open(port: int, server: MetricsServer) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await eventually(lambda: len(server._connections) == 1)
    await server.stop()
    with contextlib.suppress(ConnectionError):
        assert await asyncio.wait_for(reader.read(), 30) == b""
    writer.close()
    with pytest.raises(ConnectionError):
        await asyncio.open_connection("127.0.0.1", port)


async def test_a_port_that_is_taken_is_an_error_that_says_so(port: int, client: aiqueue.Client) -> None:
    another = MetricsServer(MetricsExporter(client.connection, client.topology))
    with pytest.raises(BadInput, match="--port"):
        await another.start("127.0.0.1", port)
    await another.stop()
