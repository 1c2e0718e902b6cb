"""What `aiqueue work` logs, as text and JSON, and how it restarts when a file changes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import watchfiles

import aiqueue
from aiqueue.cli.reload import _SourceFilter
from aiqueue.server import EmbeddedServer

from .. import forks
from ..support import Account, whole_lines
from .test_cli import run_main

pytestmark = pytest.mark.families("agent.tasks")
APP = """
    import logging
    import aiqueue

    log = logging.getLogger("shop")
    worker = aiqueue.Worker(drain_timeout="1s")

    class Here(aiqueue.Message, kind="here"):
        pass

    class There(aiqueue.Message, kind="there"):
        pass

    @worker.handle(Here)
    async def here(job: aiqueue.Job[Here]) -> str:
        log.info("in the worker", extra={"step": 3})
        return "first"

    @worker.handle(There, process=True)
    def there(job: aiqueue.Job[There]) -> str:
        log.info("in a child")
        return "there"
    """


class Here(aiqueue.Message, kind="here"):
    pass


class There(aiqueue.Message, kind="there"):
    pass


class Work:
    """`aiqueue work app:worker`, with its output in files."""

    def __init__(self, directory: Path, account: Account | None, *options: str) -> None:
        self._directory = directory
        where = {}
        if account is not None:
            where = {"AIQUEUE_URL": account.url, "AIQUEUE_USER": account.user, "AIQUEUE_PASSWORD": account.password}
        with (directory / "out").open("w") as out, (directory / "err").open("w") as err:
            self.process = forks.start(
                *("aiqueue", "work", "app:worker", *options), cwd=directory, env={**os.environ, **where},
                stdout=out, stderr=err,
            )  # fmt: skip

    @property
    def out(self) -> list[str]:
        return whole_lines(self._directory / "out")

    @property
    def err(self) -> list[str]:
        return whole_lines(self._directory / "err")

    async def says(self, text: str, *, times: int = 1) -> None:
        end = time.monotonic() + 60
        while sum(text in line for line in self.out + self.err) < times:
            assert self.process.poll() is None, self.out + self.err
            assert time.monotonic() < end, self.out + self.err
            await asyncio.sleep(0.02)

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "app.py").write_text(textwrap.dedent(APP))
    return tmp_path


@contextlib.contextmanager
def working(place: Path, account: Account | None, *options: str) -> Iterator[Work]:
    work = Work(place, account, *options)
    try:
        yield work
    finally:
        work.process.kill()
        work.process.wait()


async def test_with_json_each_line_is_an_object_and_handlers_in_children_log_like_others(
    place: Path, account: Account, client: aiqueue.Client
) -> None:
    with working(place, account, "--log-format=json") as work:
        here = await client.enqueue(Here(), tenant="acme")
        there = await client.enqueue(There(), tenant="acme")
        assert (await here.result(60), await there.result(60)) == ("first", "there")
        assert work.end() == 0
        assert work.out == []
        records: list[dict[str, Any]] = [json.loads(line) for line in work.err]
    (in_worker,) = (each for each in records if each["message"] == "in the worker")
    (in_child,) = (each for each in records if each["message"] == "in a child")
    assert (in_worker["job_id"], in_worker["step"], in_worker["logger"]) == (here.id, 3, "shop")
    assert (in_child["job_id"], in_child["tenant"], in_child["kind"]) == (there.id, "acme", "there")
    assert in_child["process"] not in (in_worker["process"], work.process.pid)
    assert any("all jobs finished" in each["message"] for each in records)


async def test_lines_of_text_of_the_application_are_heard_from_info_on_and_name_the_job(
    place: Path, account: Account, client: aiqueue.Client
) -> None:
    with working(place, account) as work:
        handle = await client.enqueue(Here(), tenant="acme")
        await handle.result(60)
        assert work.end() == 0
        (line,) = (line for line in work.err if "in the worker" in line)
    assert line.endswith(f"INFO shop: in the worker job={handle.id} tenant=acme kind=here attempt=1")


async def test_an_application_that_sets_up_logging_itself_is_told_that_json_has_no_effect(
    place: Path, account: Account, client: aiqueue.Client
) -> None:
    app = place / "app.py"
    app.write_text(f"import logging\nlogging.basicConfig(level=20, format='mine %(message)s')\n{app.read_text()}")
    with working(place, account, "--log-format=json") as work:
        handle = await client.enqueue(Here(), tenant="acme")
        await handle.result(60)
        assert work.end() == 0
    assert "mine in the worker" in work.err
    assert sum("--log-format json has no effect" in line for line in work.err) == 1


async def test_a_changed_file_restarts_the_worker_and_a_broken_one_waits_for_the_next_change(
    place: Path, account: Account, client: aiqueue.Client
) -> None:
    app = place / "app.py"
    first = app.read_text()
    with working(place, account, "--reload") as work:
        await work.says("slots, agent.tasks of all tenants")
        assert await (await client.enqueue(Here(), tenant="acme")).result(60) == "first"
        app.write_text(first.replace('"first"', '"second"'))
        await work.says("slots, agent.tasks of all tenants", times=2)
        assert await (await client.enqueue(Here(), tenant="acme")).result(60) == "second"
        app.write_text("this is no Python")
        await work.says("exit code 2; waiting for a change")
        assert any("error: cannot import app" in line for line in work.err)
        app.write_text(first.replace('"first"', '"third"'))
        await work.says("slots, agent.tasks of all tenants", times=3)
        assert await (await client.enqueue(Here(), tenant="acme")).result(60) == "third"
        assert work.end() == 0


async def test_an_embedded_server_is_kept_between_two_workers(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NATS_URL", *(name for name in os.environ if name.startswith("AIQUEUE_"))):
        monkeypatch.delenv(name, raising=False)
    with working(place, None, "--reload", "--directory=data") as work:
        await work.says("slots, agent.tasks of all tenants")
        with EmbeddedServer.acquire(place / "data", start=False) as server:
            pid = server.pid
        app = place / "app.py"
        app.write_text(app.read_text() + "\n")
        await work.says("slots, agent.tasks of all tenants", times=2)
        with EmbeddedServer.acquire(place / "data", start=False) as server:
            assert server.pid == pid
        assert work.end() == 0


async def test_a_killed_reloader_takes_its_worker_with_it(
    place: Path, account: Account, client: aiqueue.Client
) -> None:
    app = place / "app.py"
    app.write_text(app.read_text().replace('return "first"', "import os; return os.getpid()"))
    with working(place, account, "--reload") as work:
        worker = await (await client.enqueue(Here(), tenant="acme")).result(60)
        assert worker != work.process.pid
        work.process.send_signal(signal.SIGKILL)
        end = time.monotonic() + 30
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < end:
                os.kill(worker, 0)
                await asyncio.sleep(0.02)
            raise AssertionError(f"process {worker} goes on")


async def test_a_reloader_that_is_stopped_while_its_worker_starts_has_not_failed(place: Path, account: Account) -> None:
    (place / "app.py").write_text("import sys, time\nprint('starting', file=sys.stderr, flush=True)\ntime.sleep(60)")
    with working(place, account, "--reload") as work:
        await work.says("starting")
        assert work.end() == 0


def test_reload_watches_sources_and_no_environments(tmp_path: Path) -> None:
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "pyvenv.cfg").touch()
    watched = {
        name: _SourceFilter()(watchfiles.Change.modified, str(tmp_path / name))
        for name in ("app.py", "aiqueue.toml", "shop/a.py", "notes.md", "env/lib/x.py", ".venv/x.py", ".aiqueue/x.py")
    }
    assert [name for name in watched if watched[name]] == ["app.py", "aiqueue.toml", "shop/a.py"]


@pytest.mark.parametrize("option", ["--processes=2", "--health-file=h"])
def test_reload_is_refused_with_what_is_for_production(option: str) -> None:
    ended: subprocess.CompletedProcess[str] = run_main("work", "app:worker", "--reload", option)
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1)
    assert "leave out --processes and --health-file" in ended.stderr
