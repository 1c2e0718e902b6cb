"""`aiqueue inspect --watch`: the same view again and again, on a screen, as lines, and as JSON, over outages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import aiqueue

from ..support import Account, NatsProcess, create_streams
from .terminals import Terminal
from .test_top import CTRL_C, FAMILY, enqueue, environment_of


async def declare(account: Account) -> None:
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await create_streams(client)
        await enqueue(client, 2)


async def enqueue_one_more(account: Account) -> None:
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await enqueue(client, 1, "globex")


async def test_a_screen_follows_what_changes_over_an_outage_and_ctrl_c_restores_the_terminal(
    own_server: Callable[..., NatsProcess], tmp_path: Path
) -> None:
    server = own_server()
    await declare(server.account)
    options = ("inspect", FAMILY, "--watch", "0.5s")
    with Terminal(*options, env=environment_of(server.account), cwd=tmp_path) as terminal:
        await terminal.wait("aiqueue inspect agent.tasks", "tenant", "acme")
        await enqueue_one_more(server.account)
        await terminal.wait("globex")
        server.kill()
        await terminal.wait("no connection since", "what is shown is of", "globex")
        server.start()
        await terminal.wait("globex", without="no connection")
        terminal.press(CTRL_C)
        assert await terminal.end() == 130
        assert "Traceback" not in terminal.raw


async def test_json_is_an_object_a_line_that_says_when_there_is_no_connection(
    own_server: Callable[..., NatsProcess], tmp_path: Path
) -> None:
    server = own_server()
    await declare(server.account)
    options = ("inspect", FAMILY, "--watch", "0.5", "--json")
    with Terminal(*options, env=environment_of(server.account), cwd=tmp_path, size=(10_000, 24)) as terminal:
        await terminal.wait_raw('"lanes":', 2)
        server.kill()
        await terminal.wait_raw('"error":', 2)
        server.start()
        known = terminal.raw.count('"lanes":')
        await terminal.wait_raw('"lanes":', known + 1)
        terminal.press(CTRL_C)
        assert await terminal.end() == 130
    lines = [json.loads(line) for line in terminal.raw.replace("^C", "").split("\r\n") if line.startswith("{")]
    assert {frozenset(each) for each in lines} == {frozenset({"at", "lanes"}), frozenset({"at", "error"})}
    assert [each["pending"] for each in lines[0]["lanes"]] == [2]
    assert all(each["error"].startswith("no connection since") for each in lines if "error" in each)


async def test_a_dumb_terminal_gets_the_view_line_by_line(
    own_server: Callable[..., NatsProcess], tmp_path: Path
) -> None:
    server = own_server()
    await declare(server.account)
    with Terminal(
        "inspect", "--watch", "0.5", env=environment_of(server.account), cwd=tmp_path, term="dumb"
    ) as terminal:
        await terminal.wait_raw("aiqueue inspect", 2)
        server.kill()
        await terminal.wait_raw("no connection since", 2)
        assert "\x1b" not in terminal.raw


async def test_a_job_is_watched_until_it_has_ended(own_server: Callable[..., NatsProcess], tmp_path: Path) -> None:
    account = own_server().account
    await declare(account)
    options = ("inspect", "acme-0", "--watch", "0.5")
    with Terminal(*options, env=environment_of(account), cwd=tmp_path) as terminal:
        await terminal.wait("job acme-0: queued", "why")
        async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
            await client.cancel("acme-0", family=FAMILY, tenant="acme")
        await terminal.wait("job acme-0: cancelled")
        terminal.press("q")
        assert await terminal.end() == 0


async def test_what_cannot_be_read_at_first_ends_the_command(
    own_server: Callable[..., NatsProcess], tmp_path: Path
) -> None:
    account = own_server().account
    await declare(account)
    for target, said in (("no.family", "no.family"), ("no-such-job", "no-such-job")):
        with Terminal("inspect", target, "--watch", env=environment_of(account), cwd=tmp_path) as terminal:
            assert await terminal.end() in (1, 2)
            assert said in terminal.raw
