"""A gateway in a test: a gateway.toml whose models a stand-in answers, and a worker on the test's account."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from click.testing import Result

import aiqueue
from aiqueue.gateway import GatewayRequest, GatewayWorker, UsageLedger, UsageRecord, UsageStore
from aiqueue.gateway.standin import StandIn

from .. import forks
from ..support import ROOT, Account

KEY = "sk-key-of-the-tests-7"
KEY_VARIABLE = "GATEWAY_TEST_KEY"
IMPORTS = ("tests.gateway.running", "aiqueue.gateway.http_provider")  # of workers
PRICE = "{ input = 1, output = 2 }"  # micro-dollars a token
FILE = """
[[provider]]
name = "p"
kind = "openai"
base_url = "{url}"
key_env = "GATEWAY_TEST_KEY"

[[model]]
name = "small"
provider = "p"
upstream = "small-1"
context = 8_000
max_output_tokens = 100
price = {price}
first_token_timeout = "5s"
timeout = "10s"
{small}

[[model]]
name = "large"
provider = "p"
upstream = "large-1"
context = 8_000
max_output_tokens = 100
price = {price}
timeout = "10s"

[[model]]
name = "vectors"
provider = "p"
upstream = "vectors-1"
kind = "embedding"
price = {{ input = 1 }}
{more}
"""
RunCommand = Callable[..., Awaitable[Result]]  # `aiqueue gateway`, with these arguments


def write_config(directory: Path, url: str, *, small: str = "", more: str = "", file: str = FILE) -> Path:
    """Write a gateway.toml. `small`: more keys of the model "small". `more`: more tables."""
    path = directory / "gateway.toml"
    path.write_text(file.format(url=url, price=PRICE, small=small, more=more))
    return path


@asynccontextmanager
async def running(client: aiqueue.Client, path: Path, **options: Any) -> AsyncIterator[GatewayWorker]:
    """Run a gateway worker."""
    worker = GatewayWorker(path, **options)
    async with worker.running(client):
        yield worker


def ask(text: str = "one two three", **fields: Any) -> GatewayRequest:
    """A request of the model "small"."""
    messages = [{"role": "user", "content": text}]
    return GatewayRequest(**{"model": "small", "messages": messages, "max_tokens": 5, **fields})


async def records(client: aiqueue.Client) -> list[UsageRecord]:
    """All records of usage, in the order of their calls' starts."""
    ledger = UsageLedger(UsageStore(client.connection, client.topology))
    found = [record async for _, record in ledger.records()]
    return sorted(found, key=lambda each: each.started_at)


def billed(standin: StandIn) -> int:
    """What the stand-in bills for all calls, in micro-dollars."""
    prompt, completion = standin.billed()
    return prompt + 2 * completion


async def shorten_leases(client: aiqueue.Client, ack_wait_s: float = 1.0) -> None:
    """Have the jobs of a dead worker redelivered soon, by lanes that workers on this client create."""
    topology = client.topology
    families = {name: dataclasses.replace(each, ack_wait_s=ack_wait_s) for name, each in topology.families.items()}
    client.topology = dataclasses.replace(topology, families=families)


@contextmanager
def child(
    account: Account, path: Path, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[forks.Program]:
    """Run a gateway worker in a process of its own. It is killed at the end."""
    arguments = [account.url, account.user, account.password, str(path)]
    env = {**os.environ, **(environment or {})}
    with (
        log.open("ab") as out,
        forks.start(
            "tests.gateway.answering", *arguments, cwd=ROOT, env=env, stdout=out, stderr=out, imports=IMPORTS
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


__all__ = [
    "KEY", "KEY_VARIABLE", "RunCommand", "ask", "billed", "child", "records", "running", "shorten_leases",
    "write_config",
]  # fmt: skip
