"""Limits are set and shown where an operator looks: which rules hold, who has set them, what uses them, what waits."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import aiqueue
from aiqueue import headers, subjects
from aiqueue.cli.app import app
from aiqueue.errors import BadInput, NotFound, TopologyError
from aiqueue.inspect import Finding, LimitStats, Subject, examine, stats
from aiqueue.lanes import WorkerRecords
from aiqueue.limits import Limiter
from aiqueue.topology import files, provision

from ..limits.provider import FAMILY, NAME
from ..support import Account, create_streams, eventually

RULES = """
[[limit]]
family = "llm.calls"
key = "gpt-*"
requests = 100
cost = 10_000

[[limit]]
family = "llm.calls"
key = "gpt-4o"
tenant = "acme"
in_flight = 3
"""


class Call(aiqueue.Message, kind="llm.call", family=NAME):
    model: str


@pytest.fixture
def streams(tmp_path: Path) -> Path:
    """A directory of stream files with a family that has limits, and their rules."""
    directory = tmp_path / "streams"
    directory.mkdir()
    (directory / "llm.toml").write_text(FAMILY)
    (directory / "limits.toml").write_text(RULES)
    return directory


@pytest.fixture
async def client(account: Account, streams: Path) -> AsyncIterator[aiqueue.Client]:
    async with aiqueue.connect(account.url, user=account.user, password=account.password, streams=streams) as client:
        await create_streams(client)
        yield client


@pytest.fixture
async def limiter(client: aiqueue.Client) -> AsyncIterator[Limiter]:
    """The limiter of another process."""
    limiter = Limiter(client.connection, client.topology, client.limit_rules)
    await limiter.open()
    yield limiter
    await limiter.close()


@pytest.fixture
def run(client: aiqueue.Client, account: Account, streams: Path) -> Any:
    """Run a command on the test's account."""
    environment = {
        "AIQUEUE_URL": account.url, "AIQUEUE_USER": account.user, "AIQUEUE_PASSWORD": account.password,
        "AIQUEUE_STREAMS": str(streams), "COLUMNS": "200",
    }  # fmt: skip

    async def run(*arguments: str) -> Result:
        return await asyncio.to_thread(CliRunner().invoke, app, arguments, env=environment)

    return run


async def doctor(client: aiqueue.Client) -> list[Finding]:
    subject = Subject(client.connection, client.topology, rules=client.limit_rules)
    return [each async for each in examine(subject) if each.check in ("limits", "pauses")]


async def named(client: aiqueue.Client, key: str, tenant: str | None = None) -> LimitStats:
    return next(each for each in await client.limits() if (each.key, each.tenant) == (key, tenant))


async def queue(client: aiqueue.Client, tenant: str, key: str, count: int) -> None:
    """Store jobs in the lane of a key, as a producer does that knows the rules."""
    lane = subjects.work(NAME, tenant, "normal", subjects.hashed(key))
    told = {headers.LIMIT_KEY: headers.encode_key(key)}
    for _ in range(count):
        await client.connection.store(lane, b"{}", {headers.MSG_ID: subjects.new_id(), **told})


async def test_the_rules_beside_the_streams_are_the_clients(client: aiqueue.Client) -> None:
    assert [str(each) for each in client.limit_rules.declared] == [
        "llm.calls, key 'gpt-*', all tenants together",
        "llm.calls, key 'gpt-4o', tenant acme",
    ]
    assert client.limit_rules is not client.limit_rules  # whoever follows the overrides has its own


@pytest.mark.parametrize("command", ["plan", "apply", "doctor", "work"])
async def test_a_wrong_file_is_one_line_wherever_streams_are_named(
    account: Account, streams: Path, command: str
) -> None:
    (streams / "limits.toml").write_text('[[limit]]\nfamily = "llm.calls"\nrequests = nan\n')
    with pytest.raises(TopologyError, match=r"limits.toml: limit 1.requests: must be a whole number"):
        aiqueue.connect(account.url, streams=streams)
    arguments = [command, *(["nothing:here"] if command == "work" else []), "--streams", str(streams)]
    done = await asyncio.to_thread(CliRunner().invoke, app, arguments, env={"AIQUEUE_URL": account.url})
    assert done.exit_code == 2
    if command != "work":
        assert done.stderr.count("\n") == 1
        assert "limits.toml: limit 1.requests" in done.stderr


def test_without_a_file_there_are_no_rules(streams: Path) -> None:
    (streams / "limits.toml").unlink()
    assert not aiqueue.connect("nats://127.0.0.1:1", streams=streams).limit_rules.declared
    assert not aiqueue.connect("nats://127.0.0.1:1").limit_rules.declared


def test_rules_beside_the_bundled_streams_are_read_once_also_if_their_directory_is_named(
    streams: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an installation, or a checkout, whose own files were changed."""
    for file in files.bundled_directory().glob("*.toml"):
        (streams / file.name).write_text(file.read_text())
    monkeypatch.setattr(files, "bundled_directory", lambda: streams)
    for named_too in (None, streams, streams / "." / ".." / streams.name):
        assert len(aiqueue.connect("nats://127.0.0.1:1", streams=named_too).limit_rules.declared) == 2


async def test_a_limit_is_set_for_all_processes_and_unset(client: aiqueue.Client, limiter: Limiter) -> None:
    def requests() -> int | None:
        wide, _ = limiter.controls.rules.choose(NAME, "gpt-4o", "acme", limiter.clock())
        return None if wide is None else wide.requests

    assert requests() == 100
    found = await client.set_limit(NAME, "gpt-*", requests=50, duration="2h", by="anna")
    assert (found.limit, found.declared) == ("50 requests and cost 10,000 in 1m", "100 requests and cost 10,000 in 1m")
    assert (found.by, found.whom) == ("anna", "all tenants together")
    assert found.expires_at is not None
    assert found.set_at is not None
    assert found.expires_at - found.set_at == pytest.approx(7200)
    await eventually(lambda: requests() == 50)
    assert await named(client, "gpt-*") == found
    assert await client.unset_limit(NAME, "gpt-*")
    await eventually(lambda: requests() == 100)
    assert not await client.unset_limit(NAME, "gpt-*")
    assert (await named(client, "gpt-*")).is_override is False


async def test_what_is_not_given_stays_as_it_is_now(client: aiqueue.Client) -> None:
    await client.set_limit(NAME, "gpt-*", cost=5)
    await client.set_limit(NAME, "gpt-*", in_flight=7)
    assert (await named(client, "gpt-*")).limit == "100 requests and cost 5 in 1m, 7 in flight"
    lifted = await client.set_limit(NAME, "gpt-*", unlimited=True)
    assert (lifted.limit, lifted.requests, lifted.cost, lifted.in_flight) == ("no limit", None, None, None)
    assert (await client.set_limit(NAME, "gpt-*", requests=1)).limit == "1 request in 1m"
    assert (await client.set_limit(NAME, "o1", tenant="*", in_flight=2)).declared is None


async def test_a_limit_of_one_value_keeps_what_a_pattern_says_of_it(client: aiqueue.Client) -> None:
    """Else, whoever lowers the requests of a value would lift the limit of its cost without a word."""
    await client.set_limit(NAME, "gpt-*", requests=100, cost=5, window="30s")
    assert (await client.set_limit(NAME, "gpt-4o", requests=7)).limit == "7 requests and cost 5 in 30s"
    assert (await client.set_limit(NAME, "gpt-4*", in_flight=2)).limit == "100 requests and cost 5 in 30s, 2 in flight"
    assert (await client.set_limit(NAME, "claude", requests=7)).limit == "7 requests in 1m"


@pytest.mark.parametrize(
    ("now", "given", "problem"),
    [
        (
            {"cost": 50_000, "window": "1d"}, {"requests": 2},
            ("cost 50,000 of llm.calls, key 'o1', tenant acme would change from 1d to 1m: give cost for 1m, too, or "
            "requests for 1d, with the window 1d"),
        ),
        (
            {"cost": 50_000, "window": "1d"}, {"requests": 60, "window": "1m"},
            ("cost 50,000 of llm.calls, key 'o1', tenant acme would change from 1d to 1m: give cost for 1m, too, or "
            "requests for 1d, with the window 1d"),
        ),
        (
            {"requests": 5, "cost": 9, "window": "1h"}, {"in_flight": 2, "window": "2h"},
            ("requests 5 and cost 9 of llm.calls, key 'o1', tenant acme would change from 1h to 2h: give requests and "
            "cost for 2h, too"),
        ),
    ],
)  # fmt: skip
async def test_a_limit_that_is_not_given_never_gets_another_window(
    client: aiqueue.Client, now: dict[str, Any], given: dict[str, Any], problem: str
) -> None:
    """Else a budget of tokens a day would become one of each minute, or the requests of a minute those of a day."""
    before = await client.set_limit(NAME, "o1", tenant="acme", **now)
    with pytest.raises(BadInput) as caught:
        await client.set_limit(NAME, "o1", tenant="acme", **given)
    assert str(caught.value) == f"window: requests and cost of a rule share one window, and {problem}"
    assert (await named(client, "o1", "acme")).limit == before.limit
    figures = {"requests": 60, "cost": 80_000, "window": "1m"}
    assert (await client.set_limit(NAME, "o1", tenant="acme", **figures)).limit == "60 requests and cost 80,000 in 1m"


async def test_one_value_can_be_exempted_from_a_pattern(client: aiqueue.Client, limiter: Limiter) -> None:
    for _ in range(2):
        assert (await client.set_limit(NAME, "gpt-4o", unlimited=True)).limit == "no limit"
    await eventually(lambda: not limiter.is_limited(NAME, "gpt-4o", "globex"))
    assert limiter.is_limited(NAME, "gpt-4o-mini", "globex")
    assert limiter.is_limited(NAME, "gpt-4o", "acme")  # by the rule of this tenant


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "give at least one of requests, cost and in_flight"),
        ({"requests": 0}, "requests: must be a whole number from 1"),
        ({"requests": -5}, "not -5"),
        ({"requests": 10**10}, "up to|to 1,000,000,000"),
        ({"cost": float("nan")}, "cost: must be a number above 0"),
        ({"cost": float("inf")}, "not inf"),
        ({"in_flight": 1.5}, "in_flight: must be a whole number"),
        ({"requests": 1, "window": "0s"}, "window: must be a duration from 1s"),
        ({"requests": 1, "duration": "400d"}, "an override expires after 1s to 366d, not 400d"),
        ({"requests": 1, "tenant": "a.b"}, "tenant: must be a tenant"),
        ({"requests": 1, "unlimited": True}, "give no limit"),
        ({"unlimited": True, "key": "o1"}, "there is no rule to lift"),
        ({"requests": 1, "by": "x" * 501}, "author is above the limit of 500"),
        (
            {"requests": 1, "family": "no.such"},
            "unknown family 'no.such'; families with a limit_key: gateway.requests, llm.calls",
        ),
        ({"requests": 1, "family": "agent.tasks"}, "agent.tasks has no limit_key"),
        ({"requests": 1, "key": "k" * 1_025}, "key: must be a text of 1 to 1,024 characters"),
        ({"requests": 1, "key": 5}, 'key: must be a text of 1 to 1,024 characters, such as "gpt-\\*", not 5'),
        ({"requests": 1, "key": None}, "key: must be a text"),
        ({"requests": 1, "tenant": ["a"]}, "tenant: must be a tenant"),
        ({"requests": 1, "window": 2_764_800.0}, "window: must be a duration from 1s to 31d, such as .*, not 32d"),
        ({"window": "5s", "key": "o1"}, "window: is of requests or cost"),
    ],
)
async def test_a_wrong_limit_is_refused_in_one_line_and_nothing_is_stored(
    client: aiqueue.Client, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(BadInput, match=problem) as caught:
        await client.set_limit(**{"family": NAME, "key": "gpt-*", **options})
    assert "\n" not in str(caught.value)
    assert not any(each.is_override for each in await client.limits())


async def test_the_use_of_each_value_is_shown_with_what_waits_and_is_paused(
    client: aiqueue.Client, limiter: Limiter
) -> None:
    for cost in (300, 400):
        credit = await limiter.acquire(NAME, "gpt-4o", "acme", cost=cost)
        assert credit.begin()
    await queue(client, "acme", "gpt-4o", 3)
    await queue(client, "globex", "gpt-4o", 2)
    await queue(client, "globex", "gpt-4/x:y ü", 4)
    pause = await client.pause(NAME, key="gpt-4o", tenant="acme", by="anna", reason="too slow")
    wide, narrow = await named(client, "gpt-*"), await named(client, "gpt-4o", "acme")
    assert [(each.key, each.tenant, each.waiting) for each in wide.uses] == [
        ("gpt-4o", None, 5),
        ("gpt-4/x:y ü", None, 4),
    ]
    assert wide.uses[0].requests >= 2
    assert wide.uses[0].cost >= 700
    (use,) = narrow.uses
    assert (use.key, use.tenant, use.in_flight, use.waiting, use.pause) == ("gpt-4o", "acme", 2, 3, pause)
    assert await client.limits(NAME) == await client.limits()


async def test_a_key_is_paused_and_resumed_as_families_are(client: aiqueue.Client, limiter: Limiter) -> None:
    pause = await client.pause(NAME, key="gpt-4o", reason="429", by="anna")
    other = await client.pause(NAME, key="o1", tenant="acme", duration="10m")
    assert (pause.key, pause.until, pause.kind) == ("gpt-4o", None, None)
    assert str(pause) == "llm.calls, key 'gpt-4o' is paused by anna: 429"
    assert other.until is not None
    assert other.until - other.since == pytest.approx(600)
    await eventually(lambda: limiter.is_limited(NAME, "gpt-4o", "any"))
    assert await client.pauses() == [pause, other]
    families = {each.family: each.pauses for each in await stats.overview(client.connection, client.topology)}
    assert families[NAME] == (pause, other)
    assert not await client.resume(NAME, key="o1")
    assert await client.resume(NAME, key="o1", tenant="acme")
    assert await client.resume(NAME, key="gpt-4o")
    assert await client.pauses() == []
    for options in ({"kind": "llm.call"}, {"now": True}):
        with pytest.raises(BadInput):
            await client.pause(NAME, key="gpt-4o", **options)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="not of a pattern"):
        await client.pause(NAME, key="gpt-*")


async def test_the_lanes_of_a_paused_key_say_so(client: aiqueue.Client) -> None:
    await queue(client, "acme", "gpt-4o", 1)
    await queue(client, "globex", "gpt-4o", 1)
    pause = await client.pause(NAME, key="gpt-4o", tenant="acme")
    lanes = {each.tenant: each.pause for each in await stats.lanes(client.connection, client.topology, NAME)}
    assert lanes == {"acme": pause, "globex": None}


async def test_workers_heed_what_operators_set(client: aiqueue.Client) -> None:
    """A paused key waits, with its state; other keys run. A limit that is set holds for workers that run already."""
    started: list[str] = []
    worker = aiqueue.Worker()

    @worker.handle(Call)
    async def call(job: aiqueue.Job[Call]) -> None:
        started.append(job.message.model)

    async with worker.running(client):
        pause = await client.pause(NAME, key="gpt-4o")
        waiting = await client.enqueue(Call(model="gpt-4o"), tenant="acme")
        other = await client.enqueue(Call(model="gpt-4.1"), tenant="acme")
        await other.result(timeout=20)

        async def is_shown() -> None:
            assert (await waiting.status()).pause == pause

        await eventually(is_shown)
        assert started == ["gpt-4.1"]
        assert await client.resume(NAME, key="gpt-4o")
        await waiting.result(timeout=20)
        await client.set_limit(NAME, "o1", requests=3, window="1h")
        await asyncio.gather(*(client.enqueue(Call(model="o1"), tenant="acme") for _ in range(6)))
        await eventually(lambda: started.count("o1") == 3)

        async def waits() -> None:
            (use,) = (await named(client, "o1")).uses
            assert (use.requests, use.waiting) == (3, 3)

        await eventually(waits)
        await client.set_limit(NAME, "o1", requests=5)
        await eventually(lambda: started.count("o1") == 5)
        await client.unset_limit(NAME, "o1")
        await eventually(lambda: started.count("o1") == 6)


async def test_doctor_says_what_is_wrong_with_limits(client: aiqueue.Client, account: Account) -> None:
    assert [each.text for each in await doctor(client)] == ["2 rules hold, 0 of them set by operators"]
    await client.set_limit(NAME, "gpt-*", requests=50, by="anna")
    assert {each.code for each in await doctor(client)} == {""}
    subject = subjects.limit("KV_AI_LIMITS", "rule", NAME, "gpt-*", "all")
    stored = await client.connection.last("KV_AI_LIMITS", subject)
    assert stored is not None
    old = json.dumps(json.loads(stored.data) | {"set_at": stored.time - 90_000}).encode()
    await client.connection.store(subject, old, {headers.MSG_ID: subjects.new_id()})
    await client.pause(NAME, key="it's", by="bert")
    await WorkerRecords(client.connection, client.topology).write(
        "former", {"worker": "former", "kinds": {NAME: ["x"]}}
    )
    config = client.topology.streams["LLM_CALLS"].config
    former = [each for each in config["subjects"] if each.count(".") < 5]
    await client.connection.api("STREAM.UPDATE.LLM_CALLS", {**config, "subjects": former})
    found = {each.code: each for each in await doctor(client)}
    assert set(found) == {"", "limit-override-old", "paused", "limit-lanes", "limit-unheeded"}
    assert found["limit-override-old"].text.endswith("set by anna 1d1h ago, without an end")
    assert "`aiqueue limits unset llm.calls 'gpt-*'`" in found["limit-override-old"].remedy
    assert "--key 'it'\"'\"'s'`" in found["paused"].remedy
    assert found["limit-unheeded"].text.endswith(": former")
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as without:
        assert "limit-unmatched" in {each.code for each in await doctor(without)}


async def test_plan_shows_overrides_and_apply_keeps_them(client: aiqueue.Client, run: Any) -> None:
    assert "set by" not in (await run("plan")).stdout
    await client.set_limit(NAME, "gpt-*", requests=50, duration="2h", by="anna")
    await client.set_limit(NAME, "o1", in_flight=2, by="bert")
    done = await run("plan")
    assert done.exit_code == 0
    first, second = done.stdout.splitlines()[-2:]
    assert first.startswith(
        "llm.calls, key 'gpt-*', all tenants together: 100 requests and cost 10,000 in 1m -> 50 requests and cost "
        "10,000 in 1m, set by anna "
    )
    assert " until 20" in first
    assert second.startswith("llm.calls, key 'o1', all tenants together: not declared -> 2 in flight, set by bert ")
    assert [each["by"] for each in json.loads((await run("plan", "--json")).stdout)["overrides"]] == ["anna", "bert"]
    assert (await run("apply")).exit_code == 0
    assert [each.by for each in await client.limits() if each.is_override] == ["anna", "bert"]


async def test_the_commands_set_list_and_unset(client: aiqueue.Client, run: Any, limiter: Limiter) -> None:
    listed = (await run("limits", "ls")).stdout
    assert "100 requests and cost 10,000 in 1m" in listed
    assert "no limited key is in use" in listed
    done = await run("limits", "set", NAME, "gpt-*", "--requests", "50", "--for", "2h", "--author", "anna")
    assert done.exit_code == 0
    assert done.stdout.startswith(
        "llm.calls, key 'gpt-*', all tenants together: 50 requests and cost 10,000 in 1m, set by anna "
    )
    assert ", declared: 100 requests and cost 10,000 in 1m" in done.stdout
    (rule,) = [line for line in (await run("limits", "ls")).stdout.splitlines() if " gpt-* " in line]
    assert re.search("for another (2h|1h59m), set by anna ", rule)  # first, because a narrow terminal cuts the end off
    assert (await run("limits", "set", NAME, "o1", "--each-tenant", "--in-flight", "2")).exit_code == 0
    credit = await limiter.acquire(NAME, "gpt-4o", "globex", cost=12.5)
    assert credit.begin()
    await queue(client, "globex", "gpt-4o", 3)
    await client.pause(NAME, key="gpt-4o", by="anna", reason="429")
    rows = [line.split() for line in (await run("limits", "ls", NAME)).stdout.splitlines()]
    (use,) = [row for row in rows if row[-1:] == ["paused"]]
    assert use[:2] == ["llm.calls", "gpt-4o"]
    assert use[-2] == "3"
    assert rows[-1][:4] == ["llm.calls,", "key", "'gpt-4o':", "paused"]
    shown = json.loads((await run("limits", "ls", "--json")).stdout)
    assert [(each["key"], each["tenant"], each["is_override"]) for each in shown] == [
        ("gpt-*", None, True), ("gpt-4o", "acme", False), ("o1", "*", True),
    ]  # fmt: skip
    assert "@" in shown[2]["by"]
    done = await run("limits", "unset", NAME, "o1")
    assert done.exit_code == 1
    assert done.stderr.startswith(
        "error: llm.calls, key 'o1', all tenants together: there is no such override; there are: llm.calls, key 'gpt-*'"
    )
    assert (await run("limits", "unset", NAME, "o1", "--each-tenant")).stdout == (
        "llm.calls, key 'o1', each tenant: the override is removed; now: no limit\n"
    )
    await client.set_limit(NAME, "gpt-4o", requests=7)
    assert (await run("limits", "unset", NAME, "gpt-4o")).stdout.endswith(
        "now: 50 requests and cost 10,000 in 1m, by the rule for llm.calls, key 'gpt-*', all tenants together\n"
    )
    done = await run("limits", "unset", NAME, "gpt-*")
    assert done.stdout.endswith("removed; now: 100 requests and cost 10,000 in 1m\n")
    assert not any(each.is_override for each in await client.limits())


async def test_a_limit_of_an_unknown_key_or_tenant_is_set_with_a_note(client: aiqueue.Client, run: Any) -> None:
    await queue(client, "acme", "gpt-4o", 1)
    for key, options in (("gpt-4o", ["--tenant", "acme"]), ("gpt-*", ["--each-tenant"])):
        assert (await run("limits", "set", NAME, key, *options, "--requests", "5")).stderr == ""
    done = await run("limits", "set", NAME, "gpt4o", "--tenant", "acmee", "--requests", "5")
    assert done.exit_code == 0
    assert done.stderr == (
        "note: no job of llm.calls with such a key is known; known: gpt-4o\n"
        "note: no job of tenant acmee is known in llm.calls; known: acme\n"
    )


async def test_ls_names_workers_that_have_read_other_rules(client: aiqueue.Client, run: Any, streams: Path) -> None:
    worker = aiqueue.Worker(name="w1")

    @worker.handle(Call)
    async def handle(job: aiqueue.Job[Call]) -> None: ...

    async with worker.running(client):

        async def known() -> bool:
            return bool(await client.workers())

        await eventually(known)
        assert (await run("limits", "ls")).stderr == ""
        (streams / "limits.toml").write_text(RULES.replace("10_000", "20_000"))
        said = (await run("limits", "ls")).stderr
        assert said.startswith("note: other rules hold in worker w1 until a restart: llm.calls, key ")
        assert "llm.calls, key 'gpt-*', all tenants together: 100 requests and cost 10,000 in 1m; llm.calls" in said


async def test_the_commands_pause_and_resume_a_key(client: aiqueue.Client, run: Any) -> None:
    done = await run("pause", NAME, "--key", "gpt-4o", "--for", "10m", "--reason", "429")
    assert done.stdout.startswith("llm.calls, key 'gpt-4o': paused ")
    for arguments in (["pause"], ["inspect"], ["inspect", NAME], ["limits", "ls"]):
        assert "llm.calls, key 'gpt-4o': paused " in (await run(*arguments)).stdout, arguments
    assert json.loads((await run("pause", "--json")).stdout)[0]["key"] == "gpt-4o"
    done = await run("resume", NAME, "--key", "gpt-4", "--json")
    assert (done.exit_code, json.loads(done.stdout)["resumed"]) == (1, False)
    assert (await run("resume", NAME, "--key", "gpt-4o")).stdout == "resumed llm.calls, key 'gpt-4o'\n"
    assert await client.pauses() == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["limits", "set", NAME, "k"], "give at least one of requests, cost and in_flight"),
        (["limits", "set", NAME, "k", "--cost", "nan"], "cost: must be a number above 0"),
        (["limits", "set", NAME, "k", "--requests", "0"], "requests: must be a whole number from 1"),
        (["limits", "set", NAME, "k", "--requests", "1", "--tenant", "a", "--each-tenant"], "give one of them"),
        (["limits", "set", "agent.tasks", "k", "--requests", "1"], "set limit_key in aiqueue.toml, below [overlay"),
        (["limits", "ls", "no.such"], "unknown family 'no.such'"),
        (["limits", "unset", "no.such", "k"], "unknown family 'no.such'"),
        (["limits", "unset", NAME, "k", "--tenant", "a.b"], "tenant 'a.b'"),
        (["pause", NAME, "--key", "k", "--now"], "jobs of a key that run go on"),
        (["pause", NAME, "--key", "k", "--kind", "llm.call"], "of a kind or of a key"),
        (["pause", "agent.tasks", "--key", "k"], "agent.tasks has no limit_key"),
        (["pause", NAME, "--key", "k", "--for", "0"], "must be above 0"),
        (["pause", "--key", "k"], "name the family to pause"),
        (["resume", NAME, "--key", "k", "--kind", "llm.call"], "of a kind or of a key"),
    ],
)
async def test_what_is_wrong_on_the_command_line_is_one_line(
    client: aiqueue.Client, run: Any, arguments: list[str], told: str
) -> None:
    done = await run(*arguments)
    assert done.exit_code == 2
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert await client.pauses() == []
    assert not any(each.is_override for each in await client.limits())


@pytest.mark.parametrize(
    "arguments",
    [
        ["limits", "ls"], ["limits", "set", NAME, "k", "--requests", "1"], ["limits", "unset", NAME, "k"],
        ["pause", NAME, "--key", "k"], ["resume", NAME, "--key", "k"],
    ],
)  # fmt: skip
async def test_a_missing_bucket_is_one_line_that_says_what_to_run(
    client: aiqueue.Client, run: Any, arguments: list[str]
) -> None:
    await client.connection.api("STREAM.DELETE.KV_AI_LIMITS")
    done = await run(*arguments)
    assert done.exit_code == 1
    assert "KV_AI_LIMITS" in done.stderr
    assert "aiqueue apply" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (await run("plan")).exit_code == 3
    assert (await run("inspect")).exit_code == 0
    assert (await run("doctor")).exit_code in (0, 1)
    with pytest.raises(NotFound):
        await client.pauses()


def test_a_client_without_asyncio_sets_and_unsets_limits(account: Account, streams: Path) -> None:
    with aiqueue.connect_sync(account.url, user=account.user, password=account.password, streams=streams) as client:
        client._run_on_loop(provision.apply(client._client.connection, client._client.topology))
        assert client.set_limit(NAME, "gpt-*", requests=5).requests == 5
        assert [each.requests for each in client.limits(NAME)] == [5, None]
        assert client.unset_limit(NAME, "gpt-*")
        assert client.pause(NAME, key="gpt-4o").key == "gpt-4o"
        assert client.resume(NAME, key="gpt-4o")
