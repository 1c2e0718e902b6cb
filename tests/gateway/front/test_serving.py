"""The front as operators run it: the command in several processes, with few rights, and while the server is away."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest

import aiqueue
from aiqueue.gateway import ApiKeys, api_keys
from aiqueue.gateway.standin import Behaviour, StandIn
from aiqueue.topology import provision

from ... import forks
from ...connection.test_permissions import documented, user
from ...support import ROOT, Account, NatsProcess
from ..running import running, write_config
from .fronts import RunningFront, Tokens, add_keys, bearer, chat_body, open_front, parse_events, text_of_events

IMPORTS = ("aiqueue.cli.app", "aiqueue.cli.gateway_serve", "aiqueue.gateway.front", "uvloop")


@pytest.fixture
async def command(account: Account, client: aiqueue.Client, config: Path) -> AsyncIterator[forks.Program]:
    """`aiqueue gateway serve` in two processes, with a worker in this one."""
    environment = {
        **os.environ, "AIQUEUE_URL": account.url, "AIQUEUE_USER": account.user, "AIQUEUE_PASSWORD": account.password,
        "AIQUEUE_GATEWAY": str(config),
    }  # fmt: skip
    arguments = ("gateway", "serve", "--port", "0", "--processes", "2", "--drain-timeout", "5s")
    log = config.parent / "log"
    with log.open("ab") as out:
        process = forks.start("aiqueue", *arguments, cwd=ROOT, env=environment, stdout=out, stderr=out, imports=IMPORTS)
        try:
            async with running(client, config):
                yield process
        finally:
            process.kill()
            process.wait()


async def url_in(log: Path, members: int) -> str:
    """The URL that the command has printed, once so many processes serve it."""
    async with asyncio.timeout(30):
        while len(re.findall(r"^front: ", log.read_text(), re.MULTILINE)) < members:
            await asyncio.sleep(0.02)
    return re.findall(r"http://\S+/v1", log.read_text())[0]


def members_of(parent: int) -> list[int]:
    """The processes of a pool."""
    return [int(each) for each in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


async def test_the_command_serves_in_processes_that_are_replaced_and_drain(
    command: forks.Program, config: Path, tokens: Tokens, standin: StandIn
) -> None:
    standin.behaviour = Behaviour(token_s=0.05, completion_tokens=20)
    log = config.parent / "log"
    url = await url_in(log, 2)
    body = chat_body(stream=True, max_tokens=20)
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(20)) as http:
        os.kill(members_of(command.pid)[0], signal.SIGKILL)
        await url_in(log, 3)
        async with http.get(f"{url}/models", headers=bearer(tokens.mine)) as response:
            assert response.status == 200
        async with http.post(f"{url}/chat/completions", json=body, headers=bearer(tokens.mine)) as response:
            await response.content.readuntil(b"\n\n")
            os.kill(command.pid, signal.SIGTERM)
            text = (await response.read()).decode()
    assert text.endswith("data: [DONE]\n\n")
    assert await asyncio.to_thread(command.wait, 10) == 0
    assert "all requests finished" in log.read_text()
    assert "Traceback" not in log.read_text()


async def test_a_port_that_is_taken_is_an_error_in_one_line(front: RunningFront, account: Account) -> None:
    port = front.root.rpartition(":")[2]
    environment = {
        **os.environ, "AIQUEUE_URL": account.url, "AIQUEUE_USER": account.user, "AIQUEUE_PASSWORD": account.password,
    }  # fmt: skip
    arguments = ("gateway", "serve", "--port", port, "--processes", "2")
    pipe = subprocess.PIPE
    with forks.start(
        "aiqueue", *arguments, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, imports=IMPORTS
    ) as process:
        said, wrong = await asyncio.to_thread(process.communicate)
    assert (process.returncode, said) == (2, "")
    assert f"cannot listen on 127.0.0.1:{port}: address already in use" in wrong


async def test_at_sighup_gateway_toml_is_read_again_and_a_wrong_one_changes_nothing(
    front: RunningFront, config: Path, standin: StandIn, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("AIQUEUE_GATEWAY", str(config))
    more = '[[model]]\nname = "new"\nprovider = "p"\nkind = "embedding"\n'
    for text, expected in ((more, {"large", "new", "small", "vectors"}), ("[[model]", None)):
        write_config(config.parent, standin.url, more=text)
        known = set(front.front.config.models)
        os.kill(os.getpid(), signal.SIGHUP)
        async with asyncio.timeout(5):
            while set(front.front.config.models) != expected if expected else "is not reloaded" not in caplog.text:
                await asyncio.sleep(0.01)
        assert expected or set(front.front.config.models) == known


async def test_the_documented_permissions_of_the_front_suffice(
    own_server: Callable[..., NatsProcess], config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = user("front", *documented("[`aiqueue gateway serve`]"))
    server = own_server(f"authorization {{ users: [ {{ user: all, password: p }}, {few} ] }}")
    async with aiqueue.connect(url=server.url, user="all", password="p") as every:
        await provision.apply(every.connection, every.topology)
        _, token = await ApiKeys(every).add("acme", requests_per_minute=100, budget_micros=10**9)
        async with (
            running(every, config),
            aiqueue.connect(url=server.url, user="front", password="p") as client,
            open_front(client, config) as front,
            aiohttp.ClientSession() as http,
        ):
            for more in ({"idempotency_key": "k"}, {"idempotency_key": "k"}, {"x_stainless_retry_count": "0"},
                         {"x_stainless_retry_count": "1"}):  # fmt: skip
                for streamed in (False, True):
                    body = chat_body(str(streamed), stream=streamed)
                    headers = bearer(token, **{name: f"{each}{streamed:d}" if name[0] == "i" else each
                                               for name, each in more.items()})  # fmt: skip
                    async with http.post(f"{front.url}/chat/completions", json=body, headers=headers) as response:
                        text = await response.text()
                        assert response.status == 200, text
            after = parse_events(text)[1].id
            headers = bearer(token, last_event_id=after)
            async with http.post(f"{front.url}/chat/completions", json=body, headers=headers) as response:
                assert (await response.text()).endswith("data: [DONE]\n\n")
            async with http.get(f"{front.root}/readyz") as response:
                assert response.status == 200
    assert "denied" not in caplog.text
    assert "Violation" not in caplog.text


async def test_a_server_that_is_away_is_503_and_its_streams_go_on_when_it_is_back(
    own_server: Callable[..., NatsProcess], config: Path, standin: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_keys, "LOOK_WAIT_S", 0.5)
    standin.behaviour = Behaviour(token_s=0.1, completion_tokens=10)
    server = own_server()
    async with (
        aiqueue.connect(server.url, user=server.user, password=server.password) as client,
        contextlib.AsyncExitStack() as stack,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(30)) as http,
    ):
        await provision.apply(client.connection, client.topology)
        tokens = await add_keys(client)
        await stack.enter_async_context(running(client, config))
        front = await stack.enter_async_context(open_front(client, config, store_s=0.5))
        body = chat_body("a b c d e f g h i j", stream=True, max_tokens=10)
        chats = f"{front.url}/chat/completions"
        async with http.post(chats, json=body, headers=bearer(tokens.mine)) as response:
            first = await response.content.readuntil(b"\n\n")
            server.kill()
            async with http.get(f"{front.root}/readyz") as ready:
                assert (ready.status, (await ready.json())["status"]) == (503, "unavailable")
            async with http.get(f"{front.root}/healthz") as health:
                assert health.status == 200
            async with http.post(chats, json=chat_body(), headers=bearer(tokens.mine)) as refused:
                assert (refused.status, refused.headers["x-should-retry"]) == (503, "true")
            server.start()
            text = first.decode() + (await response.read()).decode()
    assert text_of_events(parse_events(text)) == "a b c d e f g h i j"
    assert text.endswith("data: [DONE]\n\n")
