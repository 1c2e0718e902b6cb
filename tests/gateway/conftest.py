"""A stand-in for a provider on a free port, and what calls it; the ledger of a test's client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

import aiqueue
from aiqueue.cli.app import app
from aiqueue.gateway import ModelConfig, Provider, ProviderCall, ProviderConfig, UsageLedger, UsageStore
from aiqueue.gateway.opening import open_provider
from aiqueue.gateway.standin import StandIn

from ..support import Account
from .running import KEY, KEY_VARIABLE, RunCommand, write_config

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "one two three"}]}


def make_call(body: dict[str, Any] | None = None, **fields: Any) -> ProviderCall:
    """A call of the model "m", which the provider names "up", with short time limits."""
    provider = ProviderConfig("p", "openai")
    model = ModelConfig("m", provider, "up", context=8_000, max_output_tokens=1_000)
    return ProviderCall(**{"model": model, "body": body or HELLO, "first_token_s": 5.0, "total_s": 5.0, **fields})


@pytest.fixture
def store(client: aiqueue.Client) -> UsageStore:
    return UsageStore(client.connection, client.topology)


@pytest.fixture
def ledger(store: UsageStore) -> UsageLedger:
    return UsageLedger(store)


@pytest.fixture
async def standin() -> AsyncIterator[StandIn]:
    async with StandIn() as standin:
        yield standin


@pytest.fixture
def config(tmp_path: Path, standin: StandIn, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A gateway.toml whose models the stand-in answers, which is called with KEY."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    return write_config(tmp_path, standin.url)


@pytest.fixture
async def provider(standin: StandIn, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Provider]:
    """A provider of the kind openai that calls the stand-in with KEY."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    provider = open_provider(ProviderConfig("p", "openai", base_url=standin.url, key_env=KEY_VARIABLE))
    yield provider
    await provider.close()
    await provider.close()


@pytest.fixture
def run(account: Account) -> RunCommand:
    """Runs the commands `aiqueue gateway …` on the test's account."""
    environment = {
        "AIQUEUE_URL": account.url, "AIQUEUE_USER": account.user, "AIQUEUE_PASSWORD": account.password,
        "COLUMNS": "200",
    }  # fmt: skip

    async def run(*arguments: object) -> Result:
        words = ["gateway", *map(str, arguments)]
        return await asyncio.to_thread(CliRunner().invoke, app, words, env=environment)

    return run
