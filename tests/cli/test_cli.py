"""The command line as its users meet it: processes, their output and exit codes, on a real server."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from typer.testing import CliRunner, Result

import aiqueue
from aiqueue.cli import main, output
from aiqueue.cli.app import app, app_of

from .. import forks
from ..support import ROOT, Account, create_streams, wait_until, whole_lines

WORKER = """
import asyncio, time, aiqueue

class Echo(aiqueue.Message, kind="echo"):
    text: str = ""
    hold_s: float = 0

worker = aiqueue.Worker(concurrency=4)
not_a_worker = 1

@worker.handle(Echo, retry=aiqueue.Backoff(attempts=2, first=0.02))
async def echo(job: aiqueue.Job[Echo]) -> dict:
    await job.progress(0.5, "half")
    if job.message.text == "reject":
        raise aiqueue.Reject("not wanted")
    if job.message.text == "raise":
        raise ValueError("broken")
    if job.message.text == "block":
        print("blocking", flush=True)
        time.sleep(50)
    if job.message.hold_s:
        print("holding", flush=True)
        await asyncio.sleep(job.message.hold_s)
    return {"text": job.message.text}
"""
SEVERAL = "".join(f'{{"text": "line {number}"}}\n' for number in range(1, 41))

Cli = Callable[..., Result]


class Processes:
    """Command lines as processes of their own; what still runs at the end of a test is killed."""

    def __init__(self, place: Path, environment: Mapping[str, str]) -> None:
        self.place = place
        self.server = environment["AIQUEUE_URL"]
        self._environment = {**environment, "PYTHONPATH": str(ROOT)}
        self._started: list[forks.Program] = []

    def run(self, *arguments: str, text: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._command(arguments),
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            capture_output=True,
            text=True,
            cwd=self.place,
            env=self._environment | environment,
            timeout=40,
            check=False,
        )

    def start(self, *arguments: str) -> forks.Program:
        """Its stdout is a file in the test's place, to be looked at with `said`."""
        name = self.place / f"out-{len(self._started)}"
        with name.open("w") as out, name.with_suffix(".err").open("w") as err:
            process = forks.start("aiqueue", *arguments, cwd=self.place, env=self._environment, stdout=out, stderr=err)
        self._started.append(process)
        return process

    def said(self, process: forks.Program) -> str:
        name = self.place / f"out-{self._started.index(process)}"
        return "\n".join(whole_lines(name) + whole_lines(name.with_suffix(".err")))

    def started(self, *arguments: str, says: str) -> forks.Program:
        """A process that has said something."""
        process = self.start(*arguments)
        wait_until(lambda: says in self.said(process) or process.poll() is not None, within=30)
        assert process.poll() is None, self.said(process)
        return process

    def end(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait(40)

    def _command(self, arguments: tuple[str, ...]) -> list[str]:
        return [sys.executable, "-m", "aiqueue", *arguments]


def run_main(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the whole command line in this process: for commands that fail, and start nothing."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["aiqueue", *arguments]), contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended,
    ):  # fmt: skip
        main()
    code = ended.value.code
    assert isinstance(code, int)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def clear_environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AIQUEUE_", "NATS_")) and name not in ("COLUMNS", "FORCE_COLOR")
    }


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a worker in it, which is the current one."""
    (tmp_path / "app.py").write_text(WORKER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def environment(account: Account, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    ours = {"AIQUEUE_URL": account.url, "AIQUEUE_USER": account.user, "AIQUEUE_PASSWORD": account.password}
    monkeypatch.setattr(os, "environ", os.environ)  # restored as it was, whatever is changed below
    for name in [name for name in os.environ if name.startswith(("AIQUEUE_", "NATS_")) or name == "COLUMNS"]:
        monkeypatch.delenv(name)
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    return {**clear_environment(), **ours}


@pytest.fixture
def cli(place: Path, environment: dict[str, str]) -> Cli:
    """Verbs in this process, which is quicker; signals are tested with real ones."""

    def run(*arguments: str, text: str | None = None) -> Result:
        result = CliRunner().invoke(app, list(arguments), input=text)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture
def ready(cli: Cli) -> Cli:
    """The same, on a server with the streams."""

    async def create() -> None:
        async with aiqueue.connect() as client:
            await create_streams(client)

    asyncio.run(create())
    return cli


@pytest.fixture
def processes(place: Path, environment: dict[str, str]) -> Iterator[Processes]:
    found = Processes(place, environment)
    yield found
    found.end()


@pytest.fixture
def working(ready: Cli, processes: Processes) -> forks.Program:
    """A worker at work, in a process of its own."""
    return processes.started("work", "app:worker", says="slots")


@pytest.fixture
def served(ready: Cli, place: Path) -> Iterator[None]:
    """The same worker in a thread of this process, which starts sooner: for tests of other verbs than ``work``."""
    worker, stop, started = runpy.run_path(str(place / "app.py"))["worker"], threading.Event(), threading.Event()

    async def serve() -> None:
        async with aiqueue.connect() as client, worker.running(client):
            started.set()
            await asyncio.to_thread(stop.wait)

    with ThreadPoolExecutor(1) as threads:
        serving = threads.submit(asyncio.run, serve())
        wait_until(lambda: started.is_set() or serving.done())
        yield
        stop.set()
        serving.result(40)


def one_line(result: Result | subprocess.CompletedProcess[str]) -> str:
    """What it complained of: exactly one line, and nothing on stdout."""
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return str(line)


def data(result: Result) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def fail_some(cli: Cli) -> None:
    """Dead letters: 1 of acme, 2 and 3 of globex."""
    for number, (tenant, text) in enumerate((("acme", "reject"), ("globex", "reject"), ("globex", "raise")), start=1):
        body = json.dumps({"text": text})
        result = cli("enqueue", "echo", body, "--tenant", tenant, "--unique", f"doc-{number}", "--wait")
        assert result.exit_code == 1


class TestEveryVerb:
    def test_help_comes_quickly_and_imports_nothing_heavy(self, processes: Processes) -> None:
        code = (
            "import sys; from aiqueue.cli import app; heavy = {'nats', 'pydantic', 'cbor2', 'asyncio', 'rich'}; "
            "print(sorted(heavy & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout == "[]\n"
        result = processes.run("--help")
        assert result.returncode == 0
        for verb in ("demo", "server", "plan", "apply", "enqueue", "work", "inspect", "dead"):
            assert re.search(rf"^\W*{verb} ", result.stdout, re.MULTILINE), verb

    def test_a_command_is_built_without_the_others_and_an_unknown_one_with_all(self) -> None:
        for each in (*app.registered_commands, *app.registered_groups):
            assert each.name
            alone = app_of(each.name)
            assert [*alone.registered_commands, *alone.registered_groups] == [each]
            helped = [CliRunner().invoke(of, [each.name, "--help"]).output for of in (alone, app)]
            assert helped[0] == helped[1] != ""
        assert app_of("inspct") is app_of("--help") is app_of("") is app

    def test_version(self, processes: Processes) -> None:
        assert re.fullmatch(r"aiqueue \d+\.\d+\.\d+\S*\n", processes.run("--version").stdout)

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["inspct"], "Did you mean 'inspect'"),
            (["inspect", "--colour"], "No such option"),
            (["enqueue", "echo", "{}"], "--tenant"),
            (["dead", "show", "first"], "SEQ"),
            (["dead", "show", "0"], "SEQ"),
            (["dead", "replay", "0"], "SEQ"),
            (["dead", "purge", "--yes", "--", "-1"], "SEQ"),
            (["enqueue", "echo", "{}", "--tenant", "acme", "--delay", "\u00b2"], "is not a duration"),
            (["enqueue", "echo", "{}", "--tenant", "acme", "--at", "\u00b2.5"], "is not a time"),
            (["enqueue", "echo", "{}", "--tenant", "acme", "--at", "9" * 18], "at most 365 days"),
            (["dead", "ls", "--older", "5 parsecs"], "is not a duration"),
            (["work", "app:worker", "--concurrency", "0"], "--concurrency"),
            (["inspect", "--profile", "galaxy"], "single"),
            (["inspect", "no.family"], "unknown family 'no.family'; declared families: agent"),
            (["inspect", "a.b.c-d"], "unknown family"),
            (["inspect", "--job", ""], "job id"),
            (["inspect", "--streams", "nowhere"], "no such directory"),
            (["inspect", "--context", "nowhere"], "context"),
            (["inspect", "--context", "nowhere", "--url", ""], "argument url: is empty"),
            (["dead", "ls", "--tenant", "a.b"], "tenant 'a.b' must be"),
            (["dead", "ls", "--family", "no.family"], "unknown family"),
            (["dead", "replay"], "--all"),
            (["dead", "purge", "1", "--all", "--yes"], "exclude each other"),
            (["dead", "purge", "--all"], "--yes"),
        ],
    )
    def test_wrong_use_is_one_line_and_exit_code_2(
        self, place: Path, environment: dict[str, str], arguments: list[str], said: str
    ) -> None:
        result = run_main(*arguments)
        assert result.returncode == 2
        line = one_line(result)
        assert line.startswith("error: ")
        assert said in line

    @pytest.mark.usefixtures("place", "environment")
    def test_no_server_is_one_line_and_exit_code_1(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AIQUEUE_CONNECT_TIMEOUT", "1s")
        for arguments in (["--url", "nats://127.0.0.1:9", "inspect"], ["inspect", "--url", "nats://127.0.0.1:9"]):
            result = run_main(*arguments)
            assert result.returncode == 1
            assert "no NATS server answers at nats://127.0.0.1:9" in one_line(result)

    def test_wrong_password_is_one_line_and_exit_code_1(self, processes: Processes) -> None:
        result = processes.run("inspect", AIQUEUE_PASSWORD="wrong")
        assert result.returncode == 1
        assert processes.server in one_line(result)

    @pytest.mark.usefixtures("ready")
    def test_reader_that_leaves_early_is_no_error(self, processes: Processes) -> None:
        command = f"{sys.executable} -m aiqueue inspect --json | true"
        done = subprocess.run(
            ["/bin/sh", "-c", command], env=processes._environment, cwd=processes.place, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.stderr == ""

    def test_without_streams_says_what_to_do(self, cli: Cli) -> None:
        for arguments in (
            ["dead", "ls"],
            ["dead", "show", "1"],
            ["inspect", "agent.tasks"],
            ["enqueue", "echo", "{}", "--tenant", "acme"],
        ):
            result = cli(*arguments)
            assert result.exit_code == 1
            assert one_line(result).startswith("error: ")
            assert "run `aiqueue apply` on this server first" in result.stderr
        assert "stream AI_AGENT_TASKS does not exist: run `aiqueue apply`" in cli("inspect").stdout

    def test_enqueue_without_agent_tasks_asks_for_the_family(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AIQUEUE_FAMILIES", "rag.ingest,rag.queries")
        problem = "echo is the default kind of no family: give --family, rag.ingest or rag.queries"
        assert one_line(cli("enqueue", "echo", "{}", "--tenant", "acme")) == f"error: {problem}"

    def test_colour_is_for_terminals_only(self, ready: Cli) -> None:
        assert "\x1b" not in ready("inspect").output + ready("plan").output


class TestPlanAndApply:
    def test_drift_is_exit_code_3_until_applied(self, cli: Cli) -> None:
        first = cli("plan")
        assert first.exit_code == 3
        assert "+ create stream AI_AGENT_TASKS" in first.stdout
        assert "run `aiqueue apply` to make them" in first.stdout
        made = cli("apply")
        assert made.exit_code == 0
        assert "23 changes made" in made.stdout
        for verb in ("plan", "apply"):
            again = cli(verb)
            assert (again.exit_code, again.stdout) == (0, "nothing to change: 23 streams as declared\n")

    def test_plan_as_data(self, cli: Cli) -> None:
        result = cli("plan", "--json")
        assert result.exit_code == 3
        plan = json.loads(result.stdout)
        assert plan["drift"] is True
        assert {each["action"] for each in plan["changes"]} == {"create"}
        assert plan["applied"] == []
        reserved = plan["sum"]["file"]
        assert reserved["declared"] == reserved["added"] > 2**30
        assert (reserved["limit"], reserved["free"]) == (None, None)  # of the tests' account
        cli("apply")
        plan = data(cli("plan", "--json"))
        assert (plan["drift"], plan["changes"], plan["problems"], plan["overrides"]) == (False, [], [], [])
        assert plan["sum"]["file"] == {**reserved, "added": 0}
        assert {(each["host"], each["version"], each["same"]) for each in plan["applied"]} == {
            (socket.gethostname(), aiqueue.__version__, True)
        }

    def test_a_foreign_mirror_is_exit_code_3_for_plan_and_shown_by_apply(self, ready: Cli, account: Account) -> None:
        async def make_mirror() -> None:
            async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
                config = {"name": "COPY", "storage": "memory", "mirror": {"name": "AI_AGENT_TASKS"}}
                await client.connection.api("STREAM.CREATE.COPY", config)

        asyncio.run(make_mirror())
        for verb, code in (("plan", 3), ("apply", 0)):
            result = ready(verb)
            assert result.exit_code == code
            assert "! AI_AGENT_TASKS: the stream COPY is a mirror" in result.stdout
            assert "1 problem that `aiqueue apply` does not solve: see docs/operations/findings.md" in result.stdout
        (problem,) = json.loads(ready("plan", "--json").stdout)["problems"]
        assert (problem["stream"], problem["code"]) == ("AI_AGENT_TASKS", "foreign-mirror")

    def test_each_problem_of_an_apply_is_a_line_of_its_own(self, ready: Cli, place: Path) -> None:
        def write(rest: str) -> None:
            for name in ("x", "y"):
                family = f'[family]\nname = "{name}.jobs"\ndefault_kind = "{name}"'
                (place / "more" / f"{name}.toml").write_text(f'{family}\n[stream]\nname = "{name.upper()}"\n{rest}')

        (place / "more").mkdir()
        write("max_bytes = '1MiB'")
        made = ready("apply", "--streams", "more")
        assert made.stdout.startswith("file storage: ")
        assert ", 2.0 MiB more than now; " in made.stdout
        for name in ("x", "y"):
            assert ready("enqueue", name, "{}", "--tenant", "acme", "--streams", "more").exit_code == 0
        write("max_bytes = 10")
        planned = ready("plan", "--streams", "more")
        assert (planned.exit_code, "--allow-full" in planned.stdout) == (3, True)
        refused = ready("apply", "--streams", "more")
        assert refused.exit_code == 1
        first, second = refused.stderr.splitlines()
        assert first.startswith("error: X: lowering max_bytes from 1.0 MiB to 10 B while ")
        assert second.startswith("error: Y: lowering max_bytes from 1.0 MiB to 10 B while ")
        assert second.endswith("the stream takes no message (StreamFull) (--allow-full permits it)")
        assert ready("apply", "--streams", "more", "--allow-full").exit_code == 0
        full = ready("enqueue", "x", "{}", "--tenant", "acme", "--streams", "more")
        assert (full.exit_code, "full" in full.stderr) == (1, True)

    def test_loss_of_messages_must_be_allowed(self, ready: Cli, place: Path) -> None:
        file = place / "more" / "x.toml"
        file.parent.mkdir()
        text = '[family]\nname = "x.y"\ndefault_kind = "x"\n[stream]\nname = "X_Y"\n{}\n[consumer]\n'
        file.write_text(text.format('max_bytes = "1MiB"'))
        assert ready("apply", "--streams", "more").exit_code == 0
        for _ in range(2):
            assert ready("enqueue", "x", "{}", "--tenant", "acme", "--streams", "more").exit_code == 0
        file.write_text(text.format('max_bytes = "1MiB"\nmax_msgs_per_subject = 1'))
        planned = ready("plan", "--streams", "more")
        assert planned.exit_code == 3
        assert "--allow-data-loss" in planned.stdout
        refused = ready("apply", "--streams", "more")
        assert refused.exit_code == 1
        assert "--allow-data-loss" in one_line(refused)
        assert ready("apply", "--streams", "more", "--allow-data-loss").exit_code == 0
        (lane,) = data(ready("inspect", "x.y", "--streams", "more", "--json"))
        assert lane["pending"] == 1


class TestEnqueue:
    def test_stores_a_job_and_says_its_id(self, ready: Cli) -> None:
        result = ready(
            "enqueue", "echo", '{"text": "x"}', "--tenant", "acme", "--priority", "high", "--unique", "doc-1"
        )
        assert result.stdout == "enqueued doc-1 in agent.tasks acme/high\n"
        again = ready("enqueue", "echo", '{"text": "x"}', "--tenant", "acme", "--priority", "high", "--unique", "doc-1")
        assert again.exit_code == 0
        assert again.stdout.startswith("duplicate: doc-1 is already in")
        shown = data(ready("enqueue", "echo", "{}", "--tenant", "acme", "--unique", "doc-1", "--json"))
        assert shown == {
            "job_id": "doc-1", "family": "agent.tasks", "tenant": "acme", "priority": "normal", "duplicate": True
        }  # fmt: skip

    def test_a_delay_is_said_and_can_be_taken_back(self, ready: Cli) -> None:
        result = ready("enqueue", "echo", "{}", "--tenant", "acme", "--unique", "doc-9", "--delay", "1h")
        assert result.stdout.startswith("enqueued doc-9 in agent.tasks acme/normal, due in 1h")
        shown = data(ready("enqueue", "echo", "{}", "--tenant", "acme", "--at", "2000-01-01T00:00:00Z", "--json"))
        assert "due" not in shown  # it has passed: at once
        shown = data(ready("enqueue", "echo", "{}", "--tenant", "acme", "--delay", "10s", "--json"))
        assert abs(shown["due"] - time.time() - 10) < 10
        shown = ready("inspect", "doc-9").stdout
        assert shown.startswith("job doc-9: parked")
        assert "due" in shown
        assert ready("cancel", "doc-9").stdout == "cancelled doc-9: it will not run\n"
        assert ready("cancel", "doc-9").exit_code == 0
        assert "job doc-9: cancelled" in ready("inspect", "doc-9").stdout
        lost = ready("cancel", "doc-10", "--tenant", "acme")
        assert (lost.exit_code, lost.stdout) == (1, "")
        assert "no trace of job doc-10" in lost.stderr

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("--at", "2030-01-01T00:00:00", "has no time zone"),
            ("--at", "tomorrow", "seconds since the epoch"),
            ("--delay", "soon", "not a duration"),
            ("--delay", "400d", "at most 365 days"),
        ],
    )
    def test_a_time_that_makes_no_sense_is_wrong_usage(self, ready: Cli, option: str, value: str, message: str) -> None:
        result = ready("enqueue", "echo", "{}", "--tenant", "acme", option, value)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.replace("\u2502", " ").split())

    def test_cancelling_a_job_that_has_ended_is_exit_code_1(self, ready: Cli, served: None) -> None:
        ready("enqueue", "echo", "{}", "--tenant", "acme", "--unique", "doc-1", "--wait")
        result = ready("cancel", "doc-1")
        assert (result.exit_code, result.stdout) == (1, "")
        assert "job doc-1 was not cancelled: it has already ended" in result.stderr
        shown = json.loads(ready("cancel", "doc-1", "--json").stdout)
        assert shown == {"job_id": "doc-1", "cancelled": False, "detail": "it has already ended"}

    def test_a_running_job_is_stopped(self, ready: Cli, working: forks.Program) -> None:
        ready("enqueue", "echo", '{"hold_s": 60}', "--tenant", "acme", "--unique", "doc-1")
        wait_until(lambda: "half" in ready("inspect", "doc-1").stdout, within=40)
        assert ready("cancel", "doc-1").stdout == "cancelled doc-1: it has started, and its worker is told to stop it\n"
        assert ready("cancel", "doc-1").stdout == "cancelled doc-1: it was cancelled before\n"
        assert "job doc-1: cancelled" in ready("inspect", "doc-1").stdout

    def test_takes_the_family_whose_own_kind_it_is(self, ready: Cli) -> None:
        result = ready("enqueue", "gateway.request", '{"request_id": "r-1"}', "--tenant", "acme", "--priority", "batch")
        assert result.stdout == "enqueued r-1 in gateway.requests acme/batch\n"
        result = ready(
            "enqueue", "gateway.request", "{}", "--tenant", "acme", "--family", "rag.ingest", "--unique", "d"
        )
        assert result.stdout == "enqueued d in rag.ingest acme/normal\n"

    def test_waits_for_the_result(self, ready: Cli, served: None) -> None:
        result = ready("enqueue", "echo", '{"text": "hé"}', "--tenant", "acme", "--wait")
        assert data(result) == {"text": "hé"}
        assert result.stderr.startswith("enqueued ")

    def test_failed_job_is_exit_code_1(self, ready: Cli, served: None) -> None:
        result = ready("enqueue", "echo", '{"text": "reject"}', "--tenant", "acme", "--unique", "doc-1", "--wait")
        assert result.exit_code == 1
        assert result.stdout == ""
        assert "error: job doc-1 failed on attempt 1 (rejected): not wanted" in result.stderr

    def test_wait_has_an_end(self, ready: Cli) -> None:
        result = ready("enqueue", "echo", "{}", "--tenant", "acme", "--wait", "--timeout", "200ms")
        assert result.exit_code == 1
        assert "timed out after 0.2 s waiting for the result of job " in result.stderr

    def test_file_holds_one_job_a_line(self, ready: Cli, place: Path) -> None:
        (place / "jobs.jsonl").write_text(SEVERAL + "\n")
        result = ready("enqueue", "echo", "@jobs.jsonl", "--tenant", "acme")
        assert result.stdout.startswith("enqueued 40 jobs in agent.tasks acme/normal in ")
        assert "\n" not in result.stdout.rstrip()
        assert result.stderr == ""

    def test_stdin_holds_one_job_a_line(self, processes: Processes, ready: Cli) -> None:
        result = processes.run("enqueue", "echo", "-", "--tenant", "acme", "--json", text=SEVERAL)
        assert result.returncode == 0
        assert len({json.loads(line)["job_id"] for line in result.stdout.splitlines()}) == 40

    def test_one_value_may_span_lines(self, ready: Cli) -> None:
        result = ready("enqueue", "echo", "-", "--tenant", "acme", "--unique", "doc-1", text='{\n"text":\n"x"\n}\n')
        assert result.stdout == "enqueued doc-1 in agent.tasks acme/normal\n"

    def test_results_of_many_come_one_a_line(self, ready: Cli, served: None) -> None:
        text = '{"text": "a"}\n{"text": "reject"}\n{"text": "b"}\n'
        result = ready("enqueue", "echo", "-", "--tenant", "acme", "--wait", text=text)
        assert result.exit_code == 1
        assert {json.loads(line)["result"]["text"] for line in result.stdout.splitlines()} == {"a", "b"}
        assert "rejected" in result.stderr

    def test_bad_line_is_named_with_what_was_stored_before(self, ready: Cli) -> None:
        result = ready("enqueue", "echo", "-", "--tenant", "acme", text='{"text": "a"}\n\n{"text"\n')
        assert result.exit_code == 2
        assert result.stderr.splitlines()[0] == "1 job enqueued before this error:"
        assert result.stderr.splitlines()[1].startswith("error: stdin line 3: not JSON: ")

    def test_a_bad_line_before_much_that_is_not_read_any_more_is_one_error(
        self, processes: Processes, ready: Cli
    ) -> None:
        text = '{"text": "a"}\n{"text"\n' + '{"text": "b"}\n' * 60_000  # more than is read ahead
        result = processes.run("enqueue", "echo", "-", "--tenant", "acme", text=text)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
        assert len(result.stderr.splitlines()) == 2

    def test_bad_job_among_many_ends_it_with_what_was_stored(self, ready: Cli, place: Path) -> None:
        lines = [f'{{"task_id": "t-{n}"}}' for n in range(30)]
        lines[7] = '{"task_id": "a/b"}'
        (place / "jobs.jsonl").write_text("\n".join(lines))
        result = ready("enqueue", "echo", "@jobs.jsonl", "--tenant", "acme", "--json")
        assert result.exit_code == 2
        said = result.stderr.splitlines()
        ids = [json.loads(line)["job_id"] for line in result.stdout.splitlines()]
        assert ids[:7] == [f"t-{n}" for n in range(7)]  # in the order of the lines
        assert said[0] == f"{len(ids)} jobs enqueued before this error:"
        assert said[1].startswith("error: task_id 'a/b'")
        assert data(ready("inspect", "agent.tasks", "--json"))[0]["pending"] == len(ids)

    def test_unique_is_refused_for_several_before_any_is_stored(self, ready: Cli) -> None:
        result = ready("enqueue", "echo", "-", "--tenant", "acme", "--unique", "doc-1", text=SEVERAL)
        assert result.exit_code == 2
        assert "each body its own key" in one_line(result)
        assert ready("inspect", "doc-1").exit_code == 1

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["echo", "[]"], "a job's body must be a JSON object, not an array"),
            (["echo", "12"], "not a number"),
            (["echo", '{"a"'], "the body is not JSON"),
            (["echo", ""], "contains no job"),
            (["echo", "[" * 5000], "nested too deeply"),
            (["echo", "@nowhere"], "cannot read 'nowhere': No such file"),
            (["echo", "@."], "is a directory"),
            (["two words", "{}"], "kind 'two words'"),
            (["echo", "{}", "--tenant", "a b"], "tenant 'a b'"),
            (["echo", "{}", "--unique", ""], "unique key ''"),
            (["echo", "{}", "--priority", "urgent"], "high, normal, low"),
            (["echo", "{}", "--family", "no.family"], "unknown family"),
            (["echo", "{}", "--family", "agent.message"], "takes no jobs"),
            (["echo", "{}", "--header", "nothing"], "must be NAME=VALUE"),
            (["echo", "{}", "--header", "Aiq-Kind=x"], "reserved for aiqueue"),
            (["echo", "{}", "--header", "a=ü"], "printable ASCII"),
        ],
    )
    def test_refuses_what_cannot_be_a_job(self, ready: Cli, arguments: list[str], said: str) -> None:
        result = ready("enqueue", "--tenant", "acme", *arguments)
        assert result.exit_code == 2
        assert said in one_line(result)
        assert data(ready("inspect", "--tenant", "acme", "--json")) == []

    def test_interrupt_while_stdin_is_silent_ends_it_quietly(self, processes: Processes, ready: Cli) -> None:
        command = [sys.executable, "-m", "aiqueue", "enqueue", "echo", "-", "--tenant", "acme", "--json"]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=processes._environment,
            cwd=processes.place, text=True,
        )  # fmt: skip
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write('{"text": "a"}\n')
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["tenant"] == "acme"  # a line is sent when it comes
            process.send_signal(signal.SIGINT)
            assert process.wait(40) == 130
            assert process.stderr is not None
            assert process.stderr.read() == ""
        finally:
            process.kill()
            process.communicate()


class TestWork:
    def test_says_where_it_works_and_drains_on_sigterm(
        self, processes: Processes, ready: Cli, working: forks.Program
    ) -> None:
        ready("enqueue", "echo", '{"hold_s": 0.5}', "--tenant", "acme", "--unique", "doc-1")
        wait_until(lambda: "holding" in processes.said(working))
        working.send_signal(signal.SIGTERM)
        assert working.wait(40) == 0
        assert "4 slots, agent.tasks of all tenants, at nats://" in processes.said(working)
        assert "1 delivery in " in processes.said(working)
        assert "all jobs finished" in processes.said(working)
        assert data(ready("inspect", "doc-1", "--json"))["state"] == "done"

    def test_gives_jobs_up_after_the_drain_timeout_with_exit_code_1(self, processes: Processes, ready: Cli) -> None:
        worker = processes.started("work", "app:worker", "--drain-timeout", "100ms", says="slots")
        ready("enqueue", "echo", '{"hold_s": 50}', "--tenant", "acme")
        wait_until(lambda: "holding" in processes.said(worker))
        worker.send_signal(signal.SIGINT)
        assert worker.wait(40) == 1
        assert "go to other workers" in processes.said(worker)

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_second_signal_ends_it_at_once(
        self, processes: Processes, ready: Cli, working: forks.Program, number: signal.Signals, code: int
    ) -> None:
        ready("enqueue", "echo", '{"hold_s": 50}', "--tenant", "acme")
        wait_until(lambda: "holding" in processes.said(working))
        working.send_signal(signal.SIGTERM)
        wait_until(lambda: "draining" in processes.said(working))
        working.send_signal(number)
        assert working.wait(40) == code  # not after the 50 s of its job

    @pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
    def test_second_signal_ends_it_also_while_a_handler_blocks_its_event_loop(
        self, processes: Processes, ready: Cli, working: forks.Program
    ) -> None:
        ready("enqueue", "echo", '{"text": "block"}', "--tenant", "acme")
        wait_until(lambda: "blocking" in processes.said(working))
        working.send_signal(signal.SIGTERM)

        def has_seen_it() -> bool:
            (caught,) = re.findall(r"SigCgt:\s+(\w+)", Path(f"/proc/{working.pid}/status").read_text())
            return not int(caught, 16) >> (signal.SIGTERM - 1) & 1

        wait_until(has_seen_it)
        working.send_signal(signal.SIGTERM)
        assert working.wait(40) == -signal.SIGTERM  # not after the 50 s of its job

    def test_options_override_the_worker(self, processes: Processes, ready: Cli) -> None:
        options = ["--concurrency", "2", "--tenants", "acme,globex", "--families", "agent.tasks"]
        worker = processes.started("work", "app:worker", *options, says="2 slots, agent.tasks of")
        assert "2 slots, agent.tasks of acme, globex, at" in processes.said(worker)

    @pytest.mark.parametrize(
        ("target", "said"),
        [
            ("app", "'app' is not MODULE:ATTRIBUTE"),
            ("app:", "is not MODULE:ATTRIBUTE"),
            ("a b:worker", "is not MODULE:ATTRIBUTE"),
            ("app.py", "for `worker = aiqueue.Worker()` in app.py, give app:worker"),
            ("./src/jobs.py:mine", "for `mine = aiqueue.Worker()` in ./src/jobs.py, give src.jobs:mine"),
            ("src/jobs:mine", "give src.jobs:mine"),
            ("/src/jobs.py:mine", "in app.py, give app:mine"),
            ("app.py:worker", "no module 'app.py' in "),
            ("app.py:worker", "on PYTHONPATH; a module is named without .py: app"),
            ("nowhere:worker", "no module 'nowhere'"),
            ("app:wrker", "app has no attribute 'wrker'; the module has worker"),
            ("app:not_a_worker", "app:not_a_worker is of type int, not an aiqueue.Worker or Agent; the module"),
            ("broken:worker", "cannot import broken: ModuleNotFoundError: No module named 'nothing_here' (/"),
            ("unreadable:worker", "cannot import unreadable: SyntaxError: "),
            ("raising:worker", "cannot import raising: ValueError: first second (/"),
            ("untimely:worker", "untimely.py, line 4)"),
            ("misnamed:worker", "misnamed.py, line 2)"),
            ("leaving:worker", "cannot import leaving: SystemExit: 3"),
            ("empty:worker", "this worker has no handlers"),
        ],
    )
    def test_target_that_cannot_be_run_is_one_line(
        self, ready: Cli, place: Path, monkeypatch: pytest.MonkeyPatch, target: str, said: str
    ) -> None:
        (place / "broken.py").write_text("import nothing_here\n")
        (place / "unreadable.py").write_text("def f(:\n")
        (place / "raising.py").write_text("raise ValueError('first\\nsecond')\n")
        (place / "untimely.py").write_text(
            "import aiqueue\n\nworker = aiqueue.Worker(owner='a')\nworker.schedule('0 6 30 2 *', None, tenant='acme')\n"
        )
        (place / "misnamed.py").write_text("import aiqueue\nclass Job(aiqueue.Message, kind='a', family='b'): ...\n")
        (place / "leaving.py").write_text("import sys\nsys.exit(3)\n")
        (place / "empty.py").write_text("import aiqueue\nworker = aiqueue.Worker()\n")
        monkeypatch.setattr(sys, "path", list(sys.path))
        known = set(sys.modules)
        try:
            result = ready("work", target)
        finally:
            for name in {each for each in set(sys.modules) - known if (place / f"{each}.py").exists()}:
                del sys.modules[name]
        assert result.exit_code == 2
        assert said in one_line(result)

    def test_value_that_is_no_choice_is_refused_with_the_choices(self, processes: Processes) -> None:
        result = processes.run("enqueue", "echo", "{}", "--tenant", "acme", "--on-duplicate", "never")
        assert one_line(result).startswith("error: Invalid value for '--on-duplicate': 'never' is not one of 'first', ")

    def test_families_without_handler_are_refused(self, processes: Processes, ready: Cli) -> None:
        result = processes.run("work", "app:worker", "--families", "rag.ingest")
        assert result.returncode == 2
        assert "no handler is registered for rag.ingest" in result.stderr.splitlines()[-1]


class TestInspect:
    def test_overview_has_every_family(self, ready: Cli) -> None:
        ready("enqueue", "echo", "{}", "--tenant", "acme")
        found = {each["family"]: each for each in data(ready("inspect", "--json"))}
        assert set(found) == {
            "agent.message", "agent.tasks", "gateway.batches", "gateway.requests", "rag.ingest", "rag.queries",
        }  # fmt: skip
        assert found["agent.tasks"]["pending"] == 1
        assert re.search(r"^agent\.tasks +1 +0 +0 ", ready("inspect").stdout, re.MULTILINE)

    def test_family_lists_its_lanes(self, ready: Cli) -> None:
        assert "no lanes in agent.tasks" in ready("inspect", "agent.tasks").stdout
        for tenant in ("acme", "globex"):
            ready("enqueue", "echo", "{}", "--tenant", tenant)
        assert [each["tenant"] for each in data(ready("inspect", "agent.tasks", "--json"))] == ["acme", "globex"]
        text = ready("inspect", "agent.tasks").stdout
        assert "no worker requests them" in text
        assert [each["tenant"] for each in data(ready("inspect", "--tenant", "acme", "--json"))] == ["acme"]

    def test_job_by_word_or_option(self, ready: Cli, served: None) -> None:
        ready("enqueue", "echo", '{"text": "x"}', "--tenant", "acme", "--unique", "doc-1", "--wait")
        for arguments in (["doc-1"], ["--job", "doc-1"], ["agent.tasks", "--job", "doc-1", "--tenant", "acme"]):
            found = data(ready("inspect", *arguments, "--json"))
            assert (found["state"], found["result"]) == ("done", {"text": "x"})
        text = ready("inspect", "doc-1").stdout
        assert text.startswith("job doc-1: done\n")
        assert "50% half" in text
        assert '"text": "x"' in text

    def test_unknown_job_is_exit_code_1(self, ready: Cli) -> None:
        result = ready("inspect", "nobody")
        assert result.exit_code == 1
        assert "no trace of job nobody" in one_line(result)


class TestDead:
    @pytest.fixture(autouse=True)
    def _failed(self, ready: Cli, served: None, request: pytest.FixtureRequest) -> None:
        if "none" not in request.node.name:
            fail_some(ready)

    def seqs(self, cli: Cli, *filters: str) -> list[int]:
        return [each["seq"] for each in data(cli("dead", "ls", "--json", *filters))]

    @pytest.mark.parametrize("seq", [str(2**63), str(2**64), "9" * 40])
    def test_a_number_that_no_dead_letter_has_is_not_found(self, ready: Cli, seq: str) -> None:
        for verb in ("show", "replay"):
            result = ready("dead", verb, seq)
            assert result.exit_code == 1
            assert f"there is no dead letter {seq}" in one_line(result)

    def test_none_says_so(self, ready: Cli) -> None:
        assert ready("dead", "ls").stdout == "no dead letters\n"
        assert "match" in ready("dead", "ls", "--tenant", "acme").stdout
        assert data(ready("dead", "ls", "--json")) == []
        assert ready("dead", "replay", "--all").stdout == "no dead letters match\n"
        assert ready("dead", "purge", "--all", "--yes").exit_code == 0

    def test_ls_shows_and_filters(self, ready: Cli) -> None:
        text = ready("dead", "ls").stdout
        assert re.search(r"^ +1 +doc-1 +agent\.tasks acme/normal +echo ", text, re.MULTILINE)
        assert "rejected: not wanted" in text
        assert self.seqs(ready) == [1, 2, 3]
        assert self.seqs(ready, "--tenant", "globex") == [2, 3]
        assert self.seqs(ready, "--family", "rag.ingest") == []
        assert self.seqs(ready, "--kind", "echo", "--job", "doc-3") == [3]
        assert self.seqs(ready, "--older", "1h") == []
        assert self.seqs(ready, "--older", "0s", "--limit", "2") == [1, 2]
        assert self.seqs(ready, "--newer", "1h", "--tenant", "acme") == [1]
        assert self.seqs(ready, "--newer", "0s") == []
        assert "no dead letters match" in ready("dead", "purge", "--newer", "0s", "--yes").stdout
        assert ready("dead", "ls", "--older", "2h", "--newer", "1h").exit_code == 2
        assert "more than 2" in ready("dead", "ls", "--limit", "2").stderr

    def test_an_error_selects_what_is_listed_replayed_and_purged(self, ready: Cli) -> None:
        assert self.seqs(ready, "--error", "valueERROR") == [3]
        assert self.seqs(ready, "--error", "rejected: not") == [1, 2]
        assert self.seqs(ready, "--error", "broken", "--tenant", "acme") == []
        listed = data(ready("jobs", "ls", "--error", "valueerror", "--json"))["jobs"]
        assert [(each["state"], each["seq"]) for each in listed] == [("failed", 3)]
        assert data(ready("dead", "purge", "--error", "valueerror", "--yes", "--json"))["deleted"] == 1
        replayed = data(ready("jobs", "replay", "--error", "not wanted", "--tenant", "acme", "--yes", "--json"))
        assert replayed["done"] == 1
        assert data(ready("dead", "replay", "--error", "not wanted", "--tenant", "globex", "--json"))["replayed"] == 1
        wait_until(lambda: len(self.seqs(ready)) == 2)  # they have failed again
        for arguments in (("dead", "ls", "--error", " "), ("jobs", "ls", "--error", "x", "--state", "queued")):
            assert ready(*arguments).exit_code == 2

    def test_show_tells_attempts_and_payload(self, ready: Cli) -> None:
        text = ready("dead", "show", "3").stdout
        assert text.startswith("dead letter 3: ValueError: broken\n")
        assert "attempts (attempt 2)" in text
        assert '"text": "raise"' in text
        assert text.count("Traceback (most recent call last):") == 2
        found = data(ready("dead", "show", "3", "--json"))
        assert found["payload"] == {"text": "raise"}
        assert len(found["history"]) == 2
        missing = ready("dead", "show", "99")
        assert missing.exit_code == 1
        assert "no dead letter 99" in one_line(missing)

    def test_show_of_an_unreadable_payload_is_a_harmless_dump(self, ready: Cli) -> None:
        async def publish() -> None:
            async with aiqueue.connect() as client:
                headers = {"Nats-Msg-Id": "x", "task_id": "doc-9", "Content-Type": "application/json"}
                await client.connection.store("ai.agent.tasks.acme", b"\x1b[2J" + bytes(400), headers)

        asyncio.run(publish())
        wait_until(lambda: self.seqs(ready, "--job", "doc-9") == [4])
        text = ready("dead", "show", "4").stdout
        assert "cannot be decoded: not JSON" in text
        assert "0000  1b 5b 32 4a 00" in text
        assert "and 148 more bytes" in text
        assert "\x1b" not in text
        assert data(ready("dead", "show", "4", "--json"))["body_base64"].startswith("G1sySg")

    def test_replay_by_number_runs_it_again(self, ready: Cli) -> None:
        assert ready("dead", "replay", "1").stdout == "replayed 1 dead letter\n"
        wait_until(lambda: self.seqs(ready) == [2, 3, 4])  # it failed again
        again = data(ready("dead", "show", "4", "--json"))
        assert (again["job_id"], again["replays"]) == ("doc-1", 1)
        assert ready("dead", "replay", "1").exit_code == 1

    def test_replay_of_all_meets_each_once(self, ready: Cli) -> None:
        assert data(ready("dead", "replay", "--all", "--json")) == {"replayed": 3, "errors": []}
        wait_until(lambda: len(self.seqs(ready)) == 3)
        assert {each["replays"] for each in data(ready("dead", "ls", "--json"))} == {1}

    def test_purge_by_filter_and_number(self, ready: Cli) -> None:
        assert ready("dead", "purge", "--tenant", "globex", "--yes").stdout == "deleted 2 dead letters\n"
        assert self.seqs(ready) == [1]
        assert data(ready("dead", "purge", "1", "--yes", "--json")) == {"deleted": 1, "errors": []}
        assert self.seqs(ready) == []

    def test_purge_asks_first(self, ready: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        refused = ready("dead", "purge", "--all", text="y\n")  # nobody there: stdin is no terminal
        assert refused.exit_code == 2
        assert "--yes" in one_line(refused)
        monkeypatch.setattr("aiqueue.cli.dead.is_interactive", lambda: True)
        no = ready("dead", "purge", "--all", text="n\n")
        assert no.exit_code == 1
        assert "Delete 3 dead letters permanently?" in no.stderr
        assert self.seqs(ready) == [1, 2, 3]
        assert ready("dead", "purge", "--all", text="y\n").exit_code == 0
        assert self.seqs(ready) == []


class TestDocuments:
    def test_an_absent_one_is_named_without_advice_for_enqueue(self, ready: Cli) -> None:
        for verb in ("rm", "get"):
            result = ready("documents", verb, "0" * 64, "--tenant", "acme")
            assert result.exit_code == 1
            assert one_line(result).endswith("is not stored: it was never put, or deleted since")


class TestServer:
    def test_runs_until_told_to_stop_and_says_how_to_connect(self, processes: Processes, place: Path) -> None:
        # the environment names another server: this verb means the directory's own
        process = processes.started("server", says="Press Ctrl-C to stop.")
        said = processes.said(process)
        state = json.loads((place / ".aiqueue" / "state.json").read_text())
        assert f"is running at nats://127.0.0.1:{state['port']}" in said
        assert str(place / ".aiqueue" / "state.json") in said
        assert state["password"] not in said
        found = processes.run("inspect", "--json", "--directory", ".aiqueue")
        assert found.returncode == 0
        assert not any(each["missing"] for each in json.loads(found.stdout))
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0

        def gone() -> bool:
            with contextlib.suppress(ProcessLookupError):
                os.kill(state["pid"], 0)
                return False
            return True

        wait_until(gone, within=40)

    def test_refuses_another_server(self, processes: Processes) -> None:
        assert processes.run("server", "--url", "nats://127.0.0.1:4222").returncode == 2


class TestOutput:
    @pytest.mark.parametrize("at", [1e300, -1e300, 2.0**63])
    def test_times_that_no_calendar_has_are_shown_as_they_are(self, at: float) -> None:
        """As in the headers of a job that a plain publisher has stored: `aiqueue inspect` ended with an error."""
        assert output.format_time(at) == f"{at:g} s after 1970"

    def test_terminal_commands_in_foreign_text_are_shown_and_not_obeyed(self) -> None:
        assert output.escape_controls("a\x1b[2Jb\x9b\u202ec\n\td") == "a\\x1b[2Jb\\x9b\\u202ec\n\td"

    def test_no_character_that_changes_the_direction_of_text_reaches_a_terminal(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        controls = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
        marks = [each for each in map(chr, range(0x3000)) if unicodedata.bidirectional(each) in controls]
        marks += ["\u061c", "\u200e", "\u200f"]  # unseen, and of the class of a letter
        assert len(marks) == 12
        assert output.escape_controls("\u05d0") == "\u05d0"  # a letter of Hebrew is shown
        for mark in [*marks, "\x9b", "\x7f"]:
            assert output.escape_controls(mark) == mark.encode("unicode_escape").decode()
            output.print_json({"text": mark})
            printed = capsys.readouterr().out
            assert mark not in printed
            assert json.loads(printed) == {"text": mark}

    @pytest.mark.parametrize("edge", [80, 120])
    def test_table_keeps_within_the_edge_and_ids_whole(
        self, edge: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("COLUMNS", str(edge))
        job_id = "06h0ehe6b82hdkoi8l1epcnf0g"
        columns = [
            output.Column("job"),
            output.Column("lane", shrink=True),
            output.Column("details", shrink=True, prose=True),
        ]
        output.print_table(columns, [[job_id, "agent.tasks " + "t" * 64, "word " * 40]], below=["error " * 40])
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= edge
        assert job_id in lines[1]
        assert lines[1].count("…") == 2
        assert lines[2].endswith("…")

    def test_a_line_below_a_row_has_most_of_the_edge_however_long_the_id(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        output.print_table([output.Column("id"), output.Column("x")], [["i" * 60, "1"]], below=["x" * 60])
        assert capsys.readouterr().out.splitlines()[2].strip() == "x" * 60

    def test_long_values_of_fields_are_wrapped_between_words_on_a_terminal_only(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        fields = [("error", "word " * 10 + "w" * 50), ("job", "x-1")]
        monkeypatch.setenv("COLUMNS", "40")
        output.print_fields(fields)
        wrapped = [
            "  error  " + " ".join(["word"] * 6),
            " " * 9 + " ".join(["word"] * 4),
            " " * 9 + "w" * 50,
            "  job    x-1",
        ]
        assert capsys.readouterr().out.splitlines() == wrapped
        monkeypatch.delenv("COLUMNS")
        output.print_fields(fields)
        assert capsys.readouterr().out.splitlines() == [f"  error  {fields[0][1]}", "  job    x-1"]

    def test_table_in_a_pipe_is_not_cut(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.delenv("COLUMNS", raising=False)
        output.print_table([output.Column("x", shrink=True), output.Column("y")], [["a" * 300, "b"]])
        assert "a" * 300 + "  b" in capsys.readouterr().out


class TestRespond:
    def test_answers_until_it_is_told_to_stop(self, ready: Cli, processes: Processes, environment: Any) -> None:
        responder = processes.started("respond", says="responder: ai.gateway.responses, ai.rag.results of all tenants")

        async def ask() -> tuple[str, str]:
            settings = {"user": environment["AIQUEUE_USER"], "password": environment["AIQUEUE_PASSWORD"]}
            async with aiqueue.connect(environment["AIQUEUE_URL"], **settings) as client:
                answer = await client.connection.request("ai.rag.results.acme", b"not an id")
                return answer.headers["Nats-Service-Error-Code"], answer.data.decode()

        code, said = asyncio.run(ask())
        assert code == "400"
        assert "neither a request nor an id" in said
        responder.send_signal(signal.SIGTERM)
        assert responder.wait(40) == 0
        assert "responder: stopped" in processes.said(responder)

    @pytest.mark.parametrize(
        ("option", "complaint"),
        [
            (
                "--families=agent.tasks",
                "family agent.tasks answers no requests: set reply_within in aiqueue.toml, below [overlay",
            ),
            ("--families=no.such", "unknown family 'no.such'"),
            ("--families=", "--families is empty"),
            ("--tenants=a.b", "tenant"),
            ("--concurrency=0", "--concurrency"),
            ("--drain-timeout=soon", "soon"),
        ],
    )
    def test_wrong_options_are_told_in_a_line(
        self, place: Path, environment: dict[str, str], option: str, complaint: str
    ) -> None:
        done = run_main("respond", option)
        assert done.returncode == 2
        assert complaint in one_line(done)
