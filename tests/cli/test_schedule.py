"""``aiqueue schedule`` as its users meet it: what it stores, prints and refuses."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import time
from dataclasses import replace
from typing import Any

import pytest

import aiqueue
from aiqueue import codec, headers, subjects
from aiqueue.cli import output
from aiqueue.schedules import FiredTick

from ..support import ROOT
from .test_cli import Cli, cli, data, environment, one_line, place, ready

__all__ = ["cli", "environment", "place", "ready"]  # fixtures

REPORT = ("add", "report", "agent.task", '{"text": "hello"}', "--tenant", "acme")
BERLIN = ("--cron", "0 6 * * mon-fri", "--tz", "Europe/Berlin")


def in_client(work: Any) -> Any:
    async def run() -> Any:
        async with aiqueue.connect() as client:
            return await work(client)

    return asyncio.run(run())


def test_a_schedule_is_added_listed_shown_and_removed(ready: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert ready("schedule", "ls").stdout.startswith("no schedules: `aiqueue schedule add --help`")
    added = ready("schedule", *REPORT, *BERLIN)
    assert added.stdout.startswith("added schedule report of acme: at 06:00 on Monday to Friday, Europe/Berlin\nnext: ")
    assert ready("schedule", *REPORT, *BERLIN).stdout.startswith("unchanged schedule report")
    assert ready("schedule", *REPORT, *BERLIN, "--misfire", "skip").stdout.startswith("changed schedule report")
    listed = ready("schedule", "ls", "--tenant", "acme").stdout
    assert [line.split()[:3] for line in listed.splitlines()[:2]] == [
        ["id", "tenant", "next"],
        ["report", "acme", "in"],
    ]
    assert "at 06:00 on Monday to Friday, Europe/Berlin" in listed
    assert all(len(line) <= 80 for line in listed.splitlines())
    shown = ready("schedule", "show", "report", "--tenant", "acme").stdout
    assert shown.count(" 06:00:00 +0") == 5
    assert '"text": "hello"' in shown
    assert "misfire  skip" in shown
    found = data(ready("schedule", "show", "report", "--tenant", "acme", "--json"))
    assert len(found["next_times"]) == 5
    assert found["message"] == {"text": "hello"}
    (listed_one,) = data(ready("schedule", "ls", "--json"))
    assert listed_one["id"] == "report"
    assert listed_one["recurrence"]["line"] == "0 6 * * mon-fri"
    assert ready("schedule", "rm", "report", "--tenant", "acme").stdout == "removed schedule report of acme\n"
    again = ready("schedule", "rm", "report", "--tenant", "acme")
    assert again.exit_code == 1
    assert "there is no schedule report of acme" in one_line(again)


def test_the_commands_of_the_page_run_in_its_order(ready: Cli) -> None:
    page = (ROOT / "docs/guides/schedules.md").read_text()
    lines = re.findall(
        r"^aiqueue (.+)$", "".join(re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)), re.MULTILINE
    )
    commands = [shlex.split(line) for line in lines if " prune " not in line]  # which needs a worker of the owner
    assert {command[1] for command in commands} >= {"add", "ls", "show", "run", "pause", "resume", "backfill", "rm"}
    for command in commands:
        done = ready(*command)
        assert done.exit_code == 0, (command, done.stderr)


@pytest.mark.parametrize(
    ("when", "said"),
    [
        (["--cron", "@daily"], "acme: every day at 00:00, UTC"),
        (["--every", "90s"], "every 1m30s"),
        (["--every", "1h", "--starting", "2026-01-01T00:30:00Z"], "counted from 2026-01-01T00:30:00Z"),
        (["--at", "2199-01-01T08:00+01:00"], "once at 2199-01-01T07:00:00Z"),
        (
            ["--months", "1", "--starting", "2027-01-31", "--time", "06:00", "--tz", "Europe/Berlin"],
            "every month at 06:00",
        ),
        (["--weeks", "2", "--jitter", "30s", "--end", "2190-01-01T00:00Z"], "up to 30s later"),
    ],
)
def test_each_form_of_recurrence_can_be_given(ready: Cli, when: list[str], said: str) -> None:
    added = ready("schedule", *REPORT, *when)
    assert added.exit_code == 0, added.stderr
    assert said in added.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*REPORT], "give one of --cron, --every"),
        ([*REPORT, "--every", "90s", "--days", "1"], "not --every and --days"),
        ([*REPORT, "--cron", "0 25 * * *"], "hour"),
        ([*REPORT, "--cron", "0 0 30 2 *"], "never"),
        ([*REPORT, "--cron", "0 6 * * mon-fri", "--tz", "Europe/Berln"], "did you mean 'Europe/Berlin'"),
        ([*REPORT, "--every", "0.2s"], "at least 1 second"),
        ([*REPORT, "--every", "-5s"], "--every"),
        ([*REPORT, "--every", "90s", "--tz", "UTC"], "--tz belongs to --cron"),
        ([*REPORT, "--cron", "@daily", "--time", "06:00"], "--time belongs to --days"),
        ([*REPORT, "--at", "1970-01-02T00:00Z"], "never fires"),
        ([*REPORT, "--at", "2027-01-01 08:00"], "has no time zone"),
        ([*REPORT, "--months", "0"], "exactly one of"),
        ([*REPORT, "--months", "1", "--starting", "31.1.2027"], "starting"),
        ([*REPORT, "--every", "1h", "--starting", "2027-01-31"], "'--starting': '2027-01-31' has no time zone"),
        ([*REPORT, "--every", "1h", "--start", "2027-01-02T00:00Z", "--end", "2027-01-01T00:00Z"], "before start"),
        ([*REPORT, "--every", "1h", "--bound", "3"], "--bound belongs to --misfire all"),
        ([*REPORT, "--every", "1h", "--misfire", "all", "--overlap", "skip"], "contradict each other"),
        ([*REPORT, "--every", "1h", "--misfire", "later"], "later"),
        ([*REPORT, "--every", "1h", "--header", "trace"], "must be NAME=VALUE"),
        ([*REPORT, "--every", "1h", "--priority", "urgent"], "urgent"),
        ([*REPORT, "--every", "1h", "--family", "agent.tsks"], "agent.tsks"),
        (["add", "a b", "agent.task", "{}", "--tenant", "acme", "--every", "1h"], "schedule 'a b'"),
        (["add", "x", "agent.task", "{}", "--tenant", "a.b", "--every", "1h"], "tenant 'a.b'"),
        (["add", "x", "a b", "{}", "--tenant", "acme", "--every", "1h"], "a b"),
        (["add", "x", "agent.task", "[]", "--tenant", "acme", "--every", "1h"], "one JSON object"),
        (["add", "x", "agent.task", "{", "--tenant", "acme", "--every", "1h"], "not JSON"),
        (["add", "x", "agent.task", "@none.json", "--tenant", "acme", "--every", "1h"], "cannot read 'none.json'"),
        (["ls", "--tenant", "a.b"], "tenant 'a.b'"),
        (["show", "a.b", "--tenant", "acme"], "schedule 'a.b'"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_one_line_and_stores_nothing(
    ready: Cli, arguments: list[str], said: str
) -> None:
    done = ready("schedule", *arguments)
    assert done.exit_code == 2
    assert said in done.stderr
    assert done.stdout == ""
    if "Usage" not in done.stderr:
        one_line(done)
    assert data(ready("schedule", "ls", "--json")) == []


def test_a_schedule_of_an_owner_is_removed_by_its_name_only_and_may_come_again(ready: Cli) -> None:
    ready("schedule", *REPORT, "--every", "1h")

    async def own(client: aiqueue.Client) -> None:
        engine = client.schedules.engine
        await engine.store.put(replace(await engine.get("acme", "report"), owner="billing"))

    in_client(own)
    remove = ("schedule", "rm", "report", "--tenant", "acme")
    for owner in ((), ("--owner", "biling")):
        assert "is declared by 'billing': name that owner to remove it all the same" in one_line(ready(*remove, *owner))
    said = "removed schedule report of acme; running workers of billing that declare it add it again\n"
    assert ready(*remove, "--owner", "billing").stdout == said


@pytest.mark.parametrize("verb", ["show", "pause", "resume", "run", "next"])
def test_a_schedule_that_is_not_there_is_said_in_one_line(ready: Cli, verb: str) -> None:
    done = ready("schedule", verb, "report", "--tenant", "acme")
    assert done.exit_code == 1
    assert "there is no schedule report of acme: `aiqueue schedule ls` lists all" in one_line(done)


def test_a_schedule_is_paused_run_and_resumed(ready: Cli) -> None:
    ready("schedule", *REPORT, "--every", "1h")
    assert ready("schedule", "pause", "report", "--tenant", "acme", "--reason", "books").exit_code == 0
    shown = ready("schedule", "show", "report", "--tenant", "acme").stdout
    assert ": books" in shown
    assert "next times" not in shown
    assert " paused " in ready("schedule", "ls").stdout
    assert "1 schedule, 1 of them paused: `aiqueue schedule ls` lists them" in ready("inspect").stdout
    assert isinstance(data(ready("inspect", "--json")), list)
    asked = data(ready("schedule", "run", "report", "--tenant", "acme", "--json"))
    assert asked["job_id"].endswith("-now")
    inspected = ready("inspect", asked["job_id"]).stdout
    assert re.search(r"^  schedule +report, for 20[-0-9]{8} [:0-9]{8}$", inspected, re.MULTILINE)
    job = data(ready("inspect", asked["job_id"], "--json"))
    assert (job["schedule"], job["scheduled_for"]) == ("report", asked["tick"])
    assert "; next: " in ready("schedule", "resume", "report", "--tenant", "acme").stdout
    assert data(ready("schedule", "ls", "--json"))[0]["paused"] is None


def test_next_shows_the_offsets_over_a_change_of_the_clock(ready: Cli) -> None:
    ready("schedule", *REPORT, "--cron", "30 2 * * *", "--tz", "Europe/Berlin")
    arguments = ("schedule", "next", "report", "--tenant", "acme", "--count", "2", "--after", "2027-03-27T12:00Z")
    lines = ready(*arguments).stdout.splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        "Sun 2027-03-28 03:30:00 +02:00", "Mon 2027-03-29 02:30:00 +02:00",
    ]  # fmt: skip
    assert data(ready(*arguments, "--json"))[0] == "2027-03-28T03:30:00+02:00"


def test_a_backfill_says_how_many_jobs_there_are_now(ready: Cli) -> None:
    ready("schedule", *REPORT, "--every", "1h")
    times = ("--from", "2026-01-01T00:00Z", "--to", "2026-01-01T05:00Z")
    assert ready("schedule", "backfill", "report", "--tenant", "acme", *times).stdout == "enqueued 5 jobs\n"
    again = ready("schedule", "backfill", "report", "--tenant", "acme", *times)
    assert again.stdout == "enqueued 0 jobs; 5 ticks had one\n"
    few = ready("schedule", "backfill", "report", "--tenant", "acme", *times, "--limit", "3")
    assert few.exit_code == 2
    assert "more than 3 ticks" in one_line(few)
    ahead = ("--from", "2026-01-01T00:00Z", "--to", "2198-01-01T00:00Z")
    assert "end in the past" in one_line(ready("schedule", "backfill", "report", "--tenant", "acme", *ahead))


def test_what_was_missed_and_what_failed_is_shown(ready: Cli) -> None:
    ready("schedule", *REPORT, "--every", "1h")

    async def spoil(client: aiqueue.Client) -> None:
        from aiqueue.schedules import Missed  # noqa: PLC0415

        engine = client.schedules.engine
        document = await engine.get("acme", "report")
        missed = Missed(1_700_000_000_000, 1_700_036_000_000, 10, 1, time.time())
        last = FiredTick(1_700_036_000_000, "report-x", "agent.tasks", 999, time.time())
        changes = {"missed": missed, "misfired": 9, "last": last, "fired": 1, "error": "ValueError: no books"}
        await engine.store.put(replace(document, **changes, failed=1))

    in_client(spoil)
    shown = ready("schedule", "show", "report", "--tenant", "acme").stdout
    assert "9; the last time 10 ticks from 2023-11-1" in shown
    assert "1: ValueError: no books" in shown
    assert "outcome    unknown" in shown
    listed = ready("schedule", "ls").stdout
    assert "1 tick failed, the last by ValueError: no books; every 1h" in listed
    assert json.loads(ready("schedule", "ls", "--json").stdout)[0]["missed"]["ticks"] == 10


def test_a_tick_that_no_worker_has_fired_is_shown_as_due(ready: Cli) -> None:
    ready("schedule", *REPORT, "--every", "1h")
    assert "due" not in ready("schedule", "show", "report", "--tenant", "acme").stdout

    async def be_late(client: aiqueue.Client) -> None:
        engine = client.schedules.engine
        document = await engine.get("acme", "report")
        await engine.store.put(replace(document, next_ms=round((time.time() - 7_200) * 1000)))

    in_client(be_late)
    shown = ready("schedule", "show", "report", "--tenant", "acme").stdout
    assert re.search(r"^  due tick  2h\S* ago \(.*\), not fired yet$", shown, re.MULTILINE)
    assert " due 2h" in ready("schedule", "ls").stdout


def test_a_failure_before_the_last_job_is_counted_and_no_problem_of_the_list(ready: Cli) -> None:
    ready("schedule", *REPORT, "--every", "1h")

    async def spoil(client: aiqueue.Client) -> None:
        engine = client.schedules.engine
        await engine.store.put(replace(await engine.get("acme", "report"), failed=1, fired=1))

    in_client(spoil)
    assert "1, none since the last job" in ready("schedule", "show", "report", "--tenant", "acme").stdout
    assert "failed" not in ready("schedule", "ls").stdout


def test_a_schedule_of_a_newer_version_or_an_unknown_zone_is_listed_with_the_reason(ready: Cli) -> None:
    ready("schedule", *REPORT, *BERLIN)

    async def spoil(client: aiqueue.Client) -> None:
        engine = client.schedules.engine
        document = await engine.get("acme", "report")
        recurrence = {**document.recurrence_document, "tz": "Mars/Olympus"}
        await engine.store.put(replace(document, recurrence_document=recurrence))
        await engine.store.write(engine.store.key("acme", "newer"), 0, b"\xa1avi\xff", {}, 5)

    in_client(spoil)
    listed = ready("schedule", "ls")
    assert listed.exit_code == 0
    assert "this host has no time zone 'Mars/Olympus'" in listed.stdout
    assert "schedule newer of acme cannot be read" in listed.stderr
    assert ready("schedule", "show", "report", "--tenant", "acme").exit_code == 0
    assert ready("schedule", "rm", "newer", "--tenant", "acme").exit_code == 0


def test_prune_shows_what_it_would_remove_and_removes_it_with_yes(ready: Cli) -> None:
    for each in ("gone", "kept"):
        ready("schedule", "add", each, *REPORT[2:], "--every", "1h")

    async def declare(client: aiqueue.Client) -> None:
        from aiqueue.schedules import DeclaredSet, DeclaredSets  # noqa: PLC0415

        engine, now = client.schedules.engine, time.time()
        for each in ("gone", "kept"):
            await engine.store.put(replace(await engine.get("acme", each), owner="billing"))
        sets = DeclaredSets(engine.store)
        both = frozenset({("acme", "gone"), ("acme", "kept")})
        await sets.refresh("billing", DeclaredSet("old", 0, now - 9_000, now - 7_200, both))
        await sets.refresh("billing", DeclaredSet("new", 0, now - 7_200, now, frozenset({("acme", "kept")})))

    in_client(declare)
    prune = ("schedule", "prune", "--owner", "billing")
    why = "gone of acme: no running worker of billing declares it; the last one that did was seen 2h"
    shown = ready(*prune).stdout
    assert shown.startswith(f"would remove {why}")
    assert shown.endswith("\nnothing was removed: `aiqueue schedule prune --owner billing --yes` removes 1 schedule\n")
    found = data(ready(*prune, "--json"))
    assert (found["removed"], [each["id"] for each in found["schedules"]]) == (False, ["gone"])
    assert len(data(ready("schedule", "ls", "--json"))) == 2
    assert ready(*prune, "--yes").stdout.startswith(f"removed {why}")
    assert [each["id"] for each in data(ready("schedule", "ls", "--json"))] == ["kept"]
    assert ready(*prune, "--yes").stdout == "nothing to prune: workers of billing declare all its schedules\n"
    assert data(ready(*prune, "--yes", "--json")) == {"owner": "billing", "removed": True, "schedules": []}


@pytest.mark.parametrize(
    ("owner", "code", "said"),
    [
        ("billing", 1, "so what it declares is unknown: start one, or remove its schedules one by one"),
        ("biling", 1, "and it has no schedules: check the name (owners with schedules: billing)"),
        ("a.b", 2, "owner 'a.b'"),
    ],
)
def test_prune_says_in_one_line_why_it_cannot_know(ready: Cli, owner: str, code: int, said: str) -> None:
    ready("schedule", *REPORT, "--every", "1h")

    async def own(client: aiqueue.Client) -> None:
        engine = client.schedules.engine
        await engine.store.put(replace(await engine.get("acme", "report"), owner="billing"))

    in_client(own)
    for more in ((), ("--yes",), ("--json",)):
        done = ready("schedule", "prune", "--owner", owner, *more)
        assert done.exit_code == code
        assert said in one_line(done)
    assert len(data(ready("schedule", "ls", "--json"))) == 1


def test_what_enqueue_has_too_is_the_same_option(ready: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    pages = [ready(*command, "--help").stdout for command in (["enqueue"], ["schedule", "add"])]
    for option in ("--family", "--priority"):
        mine, other = (" ".join(page.partition(option)[2].partition("--")[0].split()) for page in pages)
        assert mine.startswith(option[2:].upper())
        assert mine == other


def test_on_a_terminal_with_colours_the_outcome_is_a_word(ready: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    ready("schedule", *REPORT, "--every", "1h")

    async def fail(client: aiqueue.Client) -> None:
        engine, journal = client.schedules.engine, client.topology.family("agent.tasks").journal or ""
        last = FiredTick(1_700_036_000_000, "report-x", "agent.tasks", 999, time.time())
        await engine.store.put(replace(await engine.get("acme", "report"), last=last, fired=1))
        fields = {headers.MSG_ID: "x", headers.EVENT: "failed", headers.CONTENT_TYPE: codec.CBOR}
        subject = subjects.journal(journal, "acme", "report-x")
        await client.connection.store(subject, codec.encode({"error": "ValueError: no books"}), fields)

    in_client(fail)
    monkeypatch.setattr(output, "supports_colour", lambda stream: True)
    shown = ready("schedule", "show", "report", "--tenant", "acme").stdout
    assert "failed: ValueError: no books" in shown
    assert "\\x1b" not in shown
