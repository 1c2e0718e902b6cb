"""`aiqueue gateway keys` adds, lists and revokes API keys; the token is shown once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import aiqueue
from aiqueue.gateway import ApiKeys, Budgets, UsageLedger, UsageStore

from .running import RunCommand


async def test_a_key_is_added_listed_without_its_token_and_revoked(run: RunCommand, client: aiqueue.Client) -> None:
    added = await run("keys",
        "add", "acme", "--name", "app", "--model", "small,large", "--priority", "low", "--requests", "60", "--tokens",
        "100000", "--budget", "2.50",
    )  # fmt: skip
    assert added.exit_code == 0, added.output
    said, token = added.stdout.splitlines()
    key_id = said.split()[2]
    assert said == f"API key {key_id} of tenant acme is added. Its token, which is not shown again:"
    plain = json.loads((await run("keys", "add", "globex", "--json")).stdout)
    assert plain["tenant"] == "globex"
    async with ApiKeys(client) as keys:
        found, other = keys.find(token), keys.find(plain["token"])
        assert found is not None
        assert other is not None
        assert (found.id, found.name, found.budget_micros) == (key_id, "app", 2_500_000)
        assert found.models == ("small", "large")
        assert (found.requests_per_minute, found.tokens_per_minute, found.priorities) == (60, 100_000, ("low",))
        assert (other.models, other.priorities, other.budget_micros) == (None, None, None)
    store = UsageStore(client.connection, client.topology)
    await Budgets(store, UsageLedger(store)).reserve("acme", "call", 1_000_000, of_key=found.budget)
    listed = await run("keys", "ls")
    assert listed.exit_code == 0, listed.output
    head, first, second = listed.stdout.splitlines()
    assert head.split() == ["id", "tenant", "name", "models", "priorities", "a", "minute", "budget", "left", "state"]
    assert " ".join(first.split()) == (
        f"{key_id} acme app small, large low 60 requests, 100,000 tokens $2.50 $1.50 valid"
    )
    assert second.split() == [plain["id"], "globex", "all", "all", "valid"]
    assert (await run("keys", "revoke", key_id)).stdout == f"API key {key_id} of tenant acme is revoked\n"
    (row,) = json.loads((await run("keys", "ls", "--tenant", "acme", "--json")).stdout)
    assert row["revoked_at"] is not None
    assert row["budget"]["reserved_micros"] == 1_000_000
    assert "revoked" in (await run("keys", "ls", "--tenant", "acme")).stdout
    assert json.loads((await run("keys", "revoke", plain["id"], "--json")).stdout)["revoked_at"] is not None
    for done in (listed, await run("keys", "ls", "--json")):
        assert token not in done.stdout
        assert found.hash not in done.stdout


@pytest.mark.parametrize("arguments", [("--requests", "0"), ("--tokens", "-1")])
async def test_a_limit_of_nothing_is_refused_by_the_name_of_its_option(
    run: RunCommand, client: aiqueue.Client, arguments: tuple[str, str]
) -> None:
    done = await run("keys", "add", "acme", *arguments)
    assert done.exit_code == 2
    assert f"'{arguments[0]}': Input should be greater than or equal to 1" in done.stderr


async def test_a_key_for_a_model_that_gateway_toml_does_not_name_is_refused(
    run: RunCommand, client: aiqueue.Client, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIQUEUE_GATEWAY", str(config))
    done = await run("keys", "add", "acme", "--model", "small,smal")
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"--model: unknown model 'smal'; did you mean small? ({config})" in done.stderr
    assert await ApiKeys(client).list() == []
    assert (await run("keys", "add", "acme", "--model", "small")).stderr == ""


@pytest.mark.parametrize("file", ["none.toml", ""])
async def test_without_gateway_toml_the_models_of_a_key_are_not_checked_and_add_says_so(
    run: RunCommand, client: aiqueue.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.setenv("AIQUEUE_GATEWAY", str(tmp_path / file) if file else "")
    done = await run("keys", "add", "acme", "--model", "nope", "--json")
    assert (done.exit_code, json.loads(done.stdout)["models"]) == (0, ["nope"])
    assert done.stderr.startswith("warning: --model is not checked: ")
    assert len(done.stderr.splitlines()) == 1
    assert (await run("keys", "add", "acme")).stderr == ""


async def test_wrong_arguments_of_keys_are_one_line(run: RunCommand, client: aiqueue.Client) -> None:
    for arguments, problem in (
        (("add", "a.b"), "tenant 'a.b' must be"),
        (("add", "acme", "--budget", "much"), "--budget must be an amount of US dollars from 0"),
        (("add", "acme", "--budget", "0"), "--budget must be above 0"),
        (("add", "acme", "--priority", "urgent"), "gateway.requests has no priority 'urgent'"),
        (("revoke", "nobody"), "there is no API key nobody"),
        (("ls", "--tenant", "a.b"), "tenant 'a.b' must be"),
    ):
        done = await run("keys", *arguments)
        assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1), done.output
        assert problem in done.stderr
    assert (await run("keys", "ls")).stdout == "no API keys; `aiqueue gateway keys add TENANT` adds one\n"
    await client.connection.api("STREAM.DELETE.KV_AI_API_KEYS")
    done = await run("keys", "ls")
    assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1)
    assert "run `aiqueue apply`" in done.stderr
