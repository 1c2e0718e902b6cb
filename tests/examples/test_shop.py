"""The example in examples/shop, asked what operators ask Flower: each command of docs/guides/from-flower.md is run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aiqueue.cli.app import app

from .. import forks
from ..support import ROOT, NatsProcess

PAGE = (ROOT / "docs/guides/from-flower.md").read_text()
EXAMPLE = ROOT / "examples/shop"


class Shop:
    """The moved app with its worker, and an operator's command line."""

    def __init__(self, server: NatsProcess, directory: Path) -> None:
        self.directory = directory
        self.asked: set[str] = set()  # commands, as the page writes them
        self._server = server
        self._worker: forks.Program | None = None

    def environment(self) -> dict[str, str]:
        server = self._server
        return {"AIQUEUE_URL": server.url, "AIQUEUE_USER": server.user, "AIQUEUE_PASSWORD": server.password}

    def work(self) -> None:
        with (self.directory / "log").open("ab") as log:
            environment = {**os.environ, **self.environment(), "PYTHONPATH": str(ROOT)}
            self._worker = forks.start(
                "aiqueue", "work", "shop:worker", cwd=self.directory, env=environment, stdout=log, stderr=log
            )

    def end(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait()

    def run(self, *arguments: str) -> str:
        """Run a command, and return what it prints; its exit code is 0."""
        done = CliRunner().invoke(app, list(arguments), env={**self.environment(), "COLUMNS": "120"})
        assert done.exit_code == 0, (arguments, done.output)
        return done.stdout

    def ask(self, command: str, **named: str) -> str:
        """Run a command as the page writes it, with the values of its words in capitals."""
        self.asked.add(command)
        words = [named.get(each, each) for each in shlex.split(command)[1:]]
        return self.run(*words)

    def read(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json"))

    def enqueue(self, kind: str, family: str, *options: str, **message: Any) -> str:
        words = ("enqueue", kind, json.dumps(message), "--tenant", "shop", "--family", family, *options)
        return id_in(self.run(*words))

    def until(self, job: str, state: str) -> None:
        """Wait until a job is in a state."""
        wait_until(lambda: self.read("inspect", job)["state"] == state)

    def until_running(self, *jobs: str) -> None:
        """Wait until the worker's record says that it runs these jobs."""
        wait_until(lambda: [{job["job_id"] for job in each["jobs"]} for each in self.read("workers")] == [set(jobs)])


def id_in(text: str) -> str:
    """The job id in what `enqueue` prints."""
    found = re.search(r"\b[0-9a-v]{26}\b", text)
    assert found, text
    return found[0]


def wait_until(is_so: Callable[[], bool], within_s: float = 60.0) -> None:
    """Each call of `is_so` asks the server, by a command."""
    ends_at = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < ends_at
        time.sleep(0.1)


@pytest.fixture
def shop(own_server: Callable[..., NatsProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    directory = tmp_path / "shop"
    shutil.copytree(EXAMPLE, directory)
    for name, short, long in (("shop.py", 'first="1m"', 'first="9m"'), ("streams/limits.toml", '"1m"', '"1h"')):
        text = (directory / name).read_text()  # what waits for a time still waits on a slow machine
        assert text.count(short) == 1
        (directory / name).write_text(text.replace(short, long))
    monkeypatch.chdir(directory)
    shop = Shop(own_server(), directory)
    try:
        yield shop
    finally:
        shop.end()


def commands_of_the_page() -> set[str]:
    """Each command in the tables of the page that has no placeholder of a kind of its own."""
    cells = [line for line in PAGE.splitlines() if line.startswith("|")]
    return {found for line in cells for found in re.findall(r"`(aiqueue [^`]+)`", line)}


def test_the_moved_shop_answers_what_is_asked_of_flower(shop: Shop) -> None:
    ask = shop.ask
    shop.run("apply")
    fetched = shop.enqueue("fetch", "shop.jobs", url="https://example.org")
    refused = shop.enqueue("fetch", "shop.jobs", url="ftp://example.org")
    retried = shop.enqueue("fetch", "shop.jobs", url="https://down.example")
    later = shop.enqueue("fetch", "shop.jobs", "--delay", "10h", url="https://later.example")
    chord = shop.enqueue("total", "shop.reports", customers=["acme", "globex"])
    mails = [shop.enqueue("mail", "shop.jobs", to=f"anna{n}@example.org", account="smtp") for n in range(8)]
    shop.work()
    shop.until(chord, "done")
    shop.until(refused, "failed")
    shop.until(retried, "retrying")
    long = [shop.enqueue("report", "shop.reports", customer=each, seconds=600) for each in ("slowco", "hugeco")]
    shop.until_running(*long)
    waiting = shop.enqueue("report", "shop.reports", customer="waits")

    _ask_of_workers(shop, long, waiting)
    _ask_of_jobs(shop, {"fetched": fetched, "refused": refused, "retried": retried, "later": later, "chord": chord})
    assert waiting in ask("aiqueue jobs ls --state queued")
    assert all(each in ask("aiqueue jobs ls --state in_flight") for each in long)
    assert long[0] in ask("aiqueue jobs ls --kind report --where customer=slowco")
    families = ask("aiqueue inspect")
    assert "shop.jobs" in families
    assert "shop.reports" in families
    assert "smtp" in ask("aiqueue inspect FAMILY", FAMILY="shop.jobs")
    assert "6 requests in 1h" in ask("aiqueue limits ls")
    assert "6/6" in ask("aiqueue limits ls")
    counts = {each["family"]: each for each in json.loads(ask("aiqueue inspect --json"))}
    assert (counts["shop.jobs"]["pending"], counts["shop.jobs"]["dead"]) == (2, 1)
    assert {"oldest_age_s", "rate_in", "rate_done"} <= counts["shop.jobs"].keys()

    _act(shop, mails, later, refused, long)
    assert commands_of_the_page() == shop.asked


def _ask_of_workers(shop: Shop, long: list[str], waiting: str) -> None:
    listed = shop.ask("aiqueue workers")
    (one,) = json.loads(shop.ask("aiqueue workers --json"))
    assert (one["state"], one["running"], one["slots"], one["waiting"]) == ("running", 2, 2, 0)
    assert one["name"] in listed
    shown = shop.ask("aiqueue workers WORKER", WORKER=one["name"])
    for part in ("2 of 2 in use", "shop.jobs: fetch, mail", "shop.reports: report, total", *long, str(one["pid"])):
        assert part in shown
    running = " ".join(shop.ask("aiqueue explain JOB", JOB=long[0]).split())
    assert f"by worker {one['name']} on {one['host']}, pid {one['pid']}, in a child process" in running
    assert "timeout of 10m" in running
    explained = shop.ask("aiqueue explain JOB", JOB=waiting)
    assert "(slots_busy)" in explained
    assert "2 of 2 slots in use" in explained
    assert "nats-server" in shop.ask("aiqueue doctor")
    assert "shop.jobs" in shop.ask("aiqueue top")
    assert "as declared" in shop.ask("aiqueue plan")


def _ask_of_jobs(shop: Shop, jobs: dict[str, str]) -> None:
    ask = shop.ask
    assert jobs["retried"] in ask("aiqueue jobs ls --state retrying")
    parked = ask("aiqueue jobs ls --state parked")
    assert jobs["later"] in parked
    assert "in 9h" in parked
    outcomes = {each["job_id"]: each for each in json.loads(ask("aiqueue jobs outcomes --json"))["outcomes"]}
    fetched, refused = outcomes[jobs["fetched"]], outcomes[jobs["refused"]]
    assert (fetched["kind"], fetched["state"], fetched["result"]) == (
        "fetch",
        "done",
        "the page of https://example.org",
    )
    assert fetched["run_s"] >= 0
    assert (refused["kind"], refused["state"], bool(refused["worker"])) == ("fetch", "failed", True)
    assert (outcomes[jobs["chord"]]["kind"], outcomes[jobs["chord"]]["result"]) == ("total", 10)
    assert sum(each["kind"] == "report" and each["job_id"].startswith(jobs["chord"]) for each in outcomes.values()) == 2
    assert "the page of https://example.org" in ask("aiqueue jobs outcomes")
    failed = ask("aiqueue jobs outcomes --state failed --newer 2h")
    assert "ValueError: only https: ftp://example.org" in failed
    assert jobs["fetched"] not in failed
    assert jobs["fetched"] not in ask("aiqueue jobs outcomes --slower 2s")
    assert jobs["refused"] in ask("aiqueue dead ls")
    letter = ask("aiqueue dead show SEQ", SEQ="1")
    assert 'raise ValueError(f"only https: {url}")' in letter
    assert '"url": "ftp://example.org"' in letter
    timeline = ask("aiqueue inspect JOB", JOB=jobs["retried"])
    assert "OSError: no answer from https://down.example" in timeline
    assert "retried" in timeline
    assert "for 2 children" in ask("aiqueue inspect JOB", JOB=jobs["chord"])
    assert json.loads(ask("aiqueue inspect JOB --json", JOB=jobs["chord"]))["result"] == 10
    assert "the page of https://example.org" in ask("aiqueue tail JOB", JOB=jobs["fetched"])


def _act(shop: Shop, mails: list[str], later: str, refused: str, long: list[str]) -> None:
    """Each act, and what is seen of it afterwards."""
    ask = shop.ask
    limited = shop.read("explain", mails[-1])
    assert (limited["state"], limited["reason"]) == ("queued", "limit")
    assert "2 jobs would be cancelled" in ask("aiqueue jobs cancel --kind mail --dry-run")
    ask("aiqueue limits set shop.jobs smtp --requests 30")
    assert "30 requests in 1h" in shop.run("limits", "ls")
    for family in ("shop.jobs", "shop.reports"):
        ask("aiqueue pause FAMILY", FAMILY=family)
    assert shop.read("explain", mails[-1])["reason"] == "paused"
    ask("aiqueue cancel JOB", JOB=long[0])
    shop.until(long[0], "cancelled")
    assert shop.read("jobs", "outcomes", "--state", "cancelled")["outcomes"][0]["job_id"] == long[0]
    ask("aiqueue resume FAMILY", FAMILY="shop.jobs")
    shop.until(mails[-1], "done")
    ask("aiqueue reschedule JOB --now", JOB=later)
    shop.until(later, "done")
    ask("aiqueue dead replay SEQ", SEQ="1")
    failed = ("jobs", "outcomes", "--state", "failed")
    wait_until(lambda: [each["job_id"] for each in shop.read(*failed)["outcomes"]].count(refused) == 2)
    ask("aiqueue jobs replay --kind fetch --yes")
    ask("aiqueue pause FAMILY --now", FAMILY="shop.reports")
    shop.until_running()
    shop.run("cancel", long[1])
    ask("aiqueue resume FAMILY", FAMILY="shop.reports")
    sent = id_in(ask("""aiqueue enqueue report '{"customer": "acme"}' --tenant shop"""))
    shop.until(sent, "done")
    audit = ask("aiqueue audit")
    for act in ("cancel", "limits.set", "pause", "resume", "reschedule", "dead.replay", "jobs.replay"):
        assert act in audit
