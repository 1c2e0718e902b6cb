"""`aiqueue top` in a terminal, with a real server: what it shows, what its keys do, and what it survives."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

import aiqueue
from aiqueue.errors import JobFailed

from ..support import ROOT, Account, NatsProcess, create_streams
from .terminals import Open, Terminal

FAMILY = "agent.tasks"
DOWN, ESCAPE, CTRL_C, CTRL_Z = "\x1b[B", "\x1b", "\x03", "\x1a"


class Render(aiqueue.Message, kind="render"):
    page: int = 0
    note: str = ""


def environment_of(account: Account) -> dict[str, str]:
    dropped = ("NATS_URL", "AIQUEUE_", "NO_COLOR", "COLUMNS", "LINES")
    env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    settings = {"URL": account.url, "USER": account.user, "PASSWORD": account.password}
    return env | {f"AIQUEUE_{name}": value for name, value in settings.items()}


@pytest.fixture
async def client(account: Account) -> AsyncIterator[aiqueue.Client]:
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await create_streams(client)
        yield client


@pytest.fixture
def open_terminal(account: Account, tmp_path: Path) -> Iterator[Open]:
    """`aiqueue …` in a terminal of 80 x 24."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, **options: object) -> Terminal:
            env = environment_of(account) | options.pop("env", {})  # type: ignore[arg-type,operator]
            return stack.enter_context(Terminal(*arguments, env=env, cwd=tmp_path, **options))  # type: ignore[arg-type]

        yield start


def state_of(pid: int) -> str:
    """T: it is stopped."""
    return subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=True).stdout[:1]


async def enqueue(client: aiqueue.Client, jobs: int, tenant: str = "acme", note: str = "") -> None:
    for number in range(jobs):
        await client.enqueue(Render(page=number, note=note), tenant=tenant, unique=f"{tenant}-{number}")


async def fail(client: aiqueue.Client, jobs: int, tenant: str = "acme") -> None:
    """Leave dead letters."""
    worker = aiqueue.Worker(tenants=[tenant])

    @worker.handle(Render)
    async def render(job: aiqueue.Job[Render]) -> None:
        raise aiqueue.Reject("no such page")

    async with worker.running(client):
        for number in range(jobs):
            handle = await client.enqueue(Render(page=number), tenant=tenant, unique=f"bad-{number}")
            with contextlib.suppress(JobFailed):
                await handle.result(30)


async def acts_of(client: aiqueue.Client) -> list[tuple[str, int | None]]:
    return [(line.act, line.count) async for line in client.audit.find()]


async def select(terminal: Terminal, name: str) -> None:
    """Move down to a row."""
    for _ in range(20):
        if terminal.line(name).startswith("> "):
            return
        at = next(line for line in terminal.screen.lines if line.startswith("> "))
        terminal.press(DOWN)
        await terminal.until(lambda at=at: at not in terminal.screen.lines)
    raise AssertionError(f"{name} cannot be selected:\n{terminal.text}")


class TestScreen:
    async def test_families_with_their_counts_fit_into_80_columns_and_24_lines(
        self, client: aiqueue.Client, open_terminal: Open
    ) -> None:
        await enqueue(client, 3)
        await client.enqueue(Render(), tenant="acme", delay="1h")
        await fail(client, 2, "other")
        terminal = open_terminal("top")
        await terminal.wait("gateway.requests", "pending 3", "parked 1", "dead 2", "? help")
        row = terminal.line(FAMILY + " ").split()
        assert row[-9:-3] == [FAMILY, "3", "0", "1", "2", row[-4]]
        assert terminal.line("family ").split()[:6] == ["family", "pending", "in", "flight", "parked", "dead"]
        terminal.press("q")
        assert await terminal.end() == 0

    async def test_without_colour_there_is_no_style_and_the_selection_is_seen(
        self, client: aiqueue.Client, open_terminal: Open
    ) -> None:
        coloured, plain = open_terminal("top"), open_terminal("top", env={"NO_COLOR": "1"})
        for terminal in (coloured, plain):
            await terminal.wait("? help", FAMILY)
            assert sum(line.startswith("> ") for line in terminal.screen.lines) == 1
        assert coloured.screen.styles
        assert not plain.screen.styles

    async def test_what_has_not_changed_is_not_written_again(self, client: aiqueue.Client, open_terminal: Open) -> None:
        terminal = open_terminal("top", "--interval", "0.2s")
        await terminal.wait("? help", "in 0/s  done 0/s")
        for _ in range(3):
            terminal.raw = ""
            before = terminal.text
            await terminal.until(lambda: len(terminal.raw) > 0)
            changed = [old for old, new in zip(before.split("\n"), terminal.screen.lines, strict=True) if old != new]
            assert len(changed) <= 2  # the clock
            assert len(terminal.raw) < 400

    async def test_another_size_is_drawn_at_once(self, client: aiqueue.Client, open_terminal: Open) -> None:
        terminal = open_terminal("top")
        await terminal.wait("? help", "last hour")
        terminal.resize(200, 50)
        await terminal.wait("workers", "stored", "lanes")
        assert terminal.screen.lines[49].startswith("Enter in")
        terminal.resize(40, 12)
        await terminal.wait("pending 0", "agen", without="gateway.requests")

    async def test_hostile_messages_are_escaped(self, client: aiqueue.Client, open_terminal: Open) -> None:
        await enqueue(client, 2, note="\x1b[2J\x1b]0;title\x07\x9b31m\u202egnp")
        terminal = open_terminal("top", FAMILY, "--view", "jobs", size=(160, 40))
        await terminal.wait("\\u001b[2J\\u001b]0;title")
        terminal.press("\r")
        await terminal.wait("message", "job acme-", "\\x9b31m")

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT])
    async def test_the_terminal_is_restored_when_a_signal_ends_it(
        self, client: aiqueue.Client, open_terminal: Open, number: signal.Signals
    ) -> None:
        terminal = open_terminal("top")
        await terminal.wait("? help")
        assert terminal.terminal_modes() != terminal.modes_before
        if number == signal.SIGINT:
            terminal.press(CTRL_C)
        else:
            terminal.process.send_signal(number)
        assert await terminal.end() == (130 if number == signal.SIGINT else 0)
        assert "Traceback" not in terminal.raw

    async def test_ctrl_z_gives_the_terminal_back_and_fg_draws_again(
        self, client: aiqueue.Client, open_terminal: Open
    ) -> None:
        terminal = open_terminal("top")
        await terminal.wait("? help")
        terminal.press(CTRL_Z)
        pid = terminal.process.pid
        await terminal.until(lambda: state_of(pid) == "T")
        terminal.read()
        assert not terminal.screen.modes["alternate"]
        assert terminal.terminal_modes() == terminal.modes_before
        os.kill(pid, signal.SIGCONT)
        await terminal.wait("? help", FAMILY)
        terminal.press("q")
        assert await terminal.end() == 0


class TestKeys:
    async def test_they_lead_into_a_family_a_lane_and_a_job_and_back(
        self, client: aiqueue.Client, open_terminal: Open
    ) -> None:
        await enqueue(client, 3, note="draw me")
        await enqueue(client, 1, "globex")
        terminal = open_terminal("top")
        await terminal.wait(FAMILY, "? help")
        await select(terminal, FAMILY)
        terminal.press("\r")
        await terminal.wait("aiqueue top: agent.tasks ", "acme", "globex", "tenant")
        await select(terminal, "acme")
        terminal.press("\r")
        await terminal.wait("agent.tasks acme/normal", "acme-0", "acme-2")
        terminal.press("\r")
        await terminal.wait("job acme-0: queued", "why", "no worker", "timeline", without="reading")
        terminal.press("G")
        await terminal.wait("draw me")
        terminal.press(ESCAPE)
        await terminal.wait("acme-1", without="timeline")
        terminal.press(ESCAPE)
        await terminal.wait("globex")
        terminal.press(ESCAPE)
        await terminal.wait("aiqueue top: all families", "gateway.requests")

    async def test_rows_are_filtered_and_sorted(self, client: aiqueue.Client, open_terminal: Open) -> None:
        for tenant, jobs in (("acme", 1), ("globex", 3), ("initech", 2)):
            await enqueue(client, jobs, tenant)
        terminal = open_terminal("top", FAMILY)
        await terminal.wait("acme", "globex", "initech")

        def tenants() -> list[str]:
            names = [line[2:].split(" ")[0] for line in terminal.screen.lines]
            return [each for each in names if each in ("acme", "globex", "initech")]

        assert tenants() == ["globex", "initech", "acme"]
        terminal.press("S")
        await terminal.until(lambda: tenants() == ["acme", "initech", "globex"])
        terminal.press("/ini")
        await terminal.until(lambda: tenants() == ["initech"])
        terminal.press("\r")
        await terminal.wait("filter 'ini'")
        terminal.press(ESCAPE)
        await terminal.until(lambda: len(tenants()) == 3)

    async def test_keys_that_come_at_once_are_about_the_rows_that_the_keys_before_them_have_left(
        self, client: aiqueue.Client, open_terminal: Open
    ) -> None:
        for tenant in ("acme", "globex"):
            await enqueue(client, 1, tenant)
        terminal = open_terminal("top", FAMILY)
        await terminal.wait("acme", "globex", "? help")
        terminal.press("/globex\rp")
        await terminal.wait("Pause agent.tasks, tenant globex?")
        terminal.press("n")
        await terminal.wait("nothing was changed")
        terminal.press("\r\rp?")  # into a lane whose jobs are not read yet: no row is meant
        await terminal.wait("any key goes on")
        terminal.press("n")
        await terminal.wait("globex-0")

    async def test_a_count_that_is_done_while_a_filter_is_typed_asks_nothing(
        self, client: aiqueue.Client, open_terminal: Open
    ) -> None:
        await fail(client, 2)
        terminal = open_terminal("top", FAMILY)
        await terminal.wait("acme", "dead 2", "? help")
        terminal.press("R/y")
        await terminal.wait("filter: y_")
        await terminal.until(lambda: terminal.shows("filter: y_", "no rows contain"))
        await terminal.wait_raw("every 2s", 3)
        assert "filter: y_" in terminal.text

    async def test_help_names_every_key(self, client: aiqueue.Client, open_terminal: Open) -> None:
        terminal = open_terminal("top")
        await terminal.wait("? help")
        terminal.press("?")
        await terminal.wait("pause what is selected", "replay the dead letters", "any key goes on")
        terminal.press("x")
        await terminal.wait("gateway.requests")

    async def test_workers_and_what_they_run_are_shown(self, client: aiqueue.Client, open_terminal: Open) -> None:
        worker = aiqueue.Worker(name="w-1")

        @worker.handle(Render)
        async def render(job: aiqueue.Job[Render]) -> None: ...

        async with worker.running(client):
            terminal = open_terminal("top", "--view", "workers")
            await terminal.wait("w-1", "running", "workers 1")
            terminal.press("\r")
            await terminal.wait("worker w-1: running", "agent.tasks: render", "0 of")


class TestActs:
    async def test_p_pauses_a_tenant_after_a_question_and_p_again_resumes(
        self, client: aiqueue.Client, open_terminal: Open
    ) -> None:
        await enqueue(client, 1)
        terminal = open_terminal("top", FAMILY)
        await terminal.wait("acme", "? help")
        terminal.press("p")
        await terminal.wait("Pause agent.tasks, tenant acme?", "y: yes")
        terminal.press("n")
        await terminal.wait("nothing was changed")
        assert await client.pauses() == []
        assert await acts_of(client) == []
        terminal.press("p")
        await terminal.wait("y: yes")
        terminal.press("y")
        await terminal.wait("paused agent.tasks, tenant acme")
        (pause,) = await client.pauses()
        assert (pause.family, pause.tenant, pause.kind) == (FAMILY, "acme", None)
        terminal.press(DOWN)
        await terminal.wait("paused", "? help")
        terminal.press("p")
        await terminal.wait("Resume agent.tasks, tenant acme?")
        terminal.press("y")
        await terminal.wait("resumed agent.tasks, tenant acme")
        assert await client.pauses() == []
        assert await acts_of(client) == [("pause", 1), ("resume", 1)]

    async def test_r_replays_the_dead_letters_that_it_has_counted(
        self, client: aiqueue.Client, open_terminal: Open
    ) -> None:
        await fail(client, 3)
        terminal = open_terminal("top")
        await terminal.wait("dead 3", "? help")
        await select(terminal, FAMILY)
        terminal.press("R")
        await terminal.wait("Replay 3 dead letters of agent.tasks?", "y: yes")
        await fail(client, 1, "later")  # is not among those that were asked about
        terminal.press("y")
        await terminal.wait("replayed 3 of 3 dead letters of agent.tasks")
        await terminal.wait("pending 3", "dead 1")
        assert await acts_of(client) == [("jobs.replay", 3)]

    async def test_what_came_of_an_act_is_printed_when_the_user_has_left_meanwhile(
        self, client: aiqueue.Client, open_terminal: Open
    ) -> None:
        await fail(client, 2)
        terminal = open_terminal("top", FAMILY)
        await terminal.wait("acme", "dead 2", "? help")
        terminal.press("R")
        await terminal.wait("Replay 2 dead letters of agent.tasks, tenant acme?")
        terminal.press("yq")
        assert await terminal.end() == 0
        assert terminal.raw.endswith("replayed 2 of 2 dead letters of agent.tasks, tenant acme\r\n")

    async def test_r_replays_one_dead_letter_from_the_list_and_from_the_job(
        self, client: aiqueue.Client, open_terminal: Open
    ) -> None:
        await fail(client, 2)
        terminal = open_terminal("top", FAMILY, "--view", "dead")
        await terminal.wait("bad-0", "bad-1", "no such page")
        terminal.press("R")
        await terminal.wait("Replay dead letter 1, job bad-0?")
        terminal.press("y")
        await terminal.wait("bad-1", without="bad-0")
        terminal.press("\r")
        await terminal.wait("job bad-1: failed")
        terminal.press("R")
        await terminal.wait("Replay dead letter 2, job bad-1?")
        terminal.press("y")
        await terminal.wait("replayed dead letter 2", "job bad-1: queued")
        assert await acts_of(client) == [("dead.replay", 1), ("dead.replay", 1)]
        terminal.press("R")
        await terminal.wait("only dead letters can be replayed")


class TestServerAway:
    async def test_a_killed_server_is_said_old_figures_are_called_old_and_it_goes_on_by_itself(
        self, own_server: Callable[..., NatsProcess], tmp_path: Path
    ) -> None:
        server = own_server()
        account = server.account
        async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
            await create_streams(client)
            await enqueue(client, 2)
        with Terminal("top", env=environment_of(account), cwd=tmp_path) as terminal:
            await terminal.wait("pending 2", "? help")
            server.kill()
            await terminal.wait("no connection since", "what is shown is of")
            assert "pending 2" in terminal.text
            terminal.press("p")
            await terminal.wait("not now: what is shown is not current")
            server.start()
            async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
                await enqueue(client, 1, "globex")
            await terminal.wait("pending 3", without="no connection")
            terminal.press("q")
            assert await terminal.end() == 0
            assert "Traceback" not in terminal.raw

    async def test_a_server_that_hangs_is_said(self, own_server: Callable[..., NatsProcess], tmp_path: Path) -> None:
        server = own_server()
        account = server.account
        async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
            await create_streams(client)
        with Terminal("top", "--interval", "0.5s", env=environment_of(account), cwd=tmp_path) as terminal:
            await terminal.wait("pending 0", "? help")
            server.pause()
            await terminal.wait("what is shown is of")
            server.resume()
            await terminal.wait("pending 0", without="what is shown is of")

    async def test_lines_say_that_there_is_no_connection_instead_of_figures(
        self, own_server: Callable[..., NatsProcess], tmp_path: Path
    ) -> None:
        server = own_server()
        account = server.account
        async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
            await create_streams(client)
        options = ("top", "--interval", "0.5s")
        with Terminal(*options, env=environment_of(account), cwd=tmp_path, term="dumb") as terminal:
            await terminal.wait_raw("all families: pending 0")
            server.kill()
            await terminal.wait_raw("no connection since")
            terminal.raw = ""
            await terminal.wait_raw("no connection since", 2)
            assert "pending" not in terminal.raw
            server.start()
            await terminal.wait_raw("all families: pending 0")


class TestPlain:
    async def test_a_dumb_terminal_gets_lines_at_each_interval_and_no_control_character(
        self, client: aiqueue.Client, open_terminal: Open
    ) -> None:
        await enqueue(client, 2)
        terminal = open_terminal("top", "--interval", "0.3s", term="dumb")
        await terminal.wait_raw("all families: pending 2", 2)
        terminal.press(CTRL_C)
        assert await terminal.end() == 130
        assert "\x1b" not in terminal.raw
        lines = terminal.raw.replace("^C", "").split("\r\n")
        assert all(len(line) <= 80 for line in lines)

    async def test_a_pipe_gets_one_look(self, client: aiqueue.Client, account: Account, tmp_path: Path) -> None:
        await enqueue(client, 2)
        done = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-m", "aiqueue", "top", FAMILY], cwd=tmp_path, capture_output=True,
            text=True, check=False, env=environment_of(account) | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        lines = done.stdout.splitlines()
        assert "agent.tasks: pending 2" in lines[0]
        assert lines[2].split()[:3] == ["tenant", "priority", "pending"]
        assert lines[3].split()[:3] == ["acme", "normal", "2"]

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("--interval", "1ms"), "--interval must be at least 0.2s"),
            (("--tenant", "acme"), "--tenant needs a family"),
            (("--view", "everything"), "name one of families, jobs"),
            (("agent.message",), "aiqueue inbox ls"),
            (("no.family",), "no.family"),
        ],
    )
    async def test_wrong_arguments_are_said_on_one_line(
        self, client: aiqueue.Client, open_terminal: Open, arguments: tuple[str, ...], said: str
    ) -> None:
        terminal = open_terminal("top", *arguments)
        assert await terminal.end() == 2
        assert said in terminal.raw
        assert terminal.raw.count("\n") == 1
