"""What tests of explanations share: jobs that wait, workers that exist only as records, and what `explain` says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from typer.testing import CliRunner

import aiqueue
from aiqueue.cli.app import app
from aiqueue.lanes import WorkerRecords

from ..support import Account

Why = Callable[..., Awaitable[dict[str, Any]]]
FAMILY, STREAM = "agent.tasks", "AI_AGENT_TASKS"


class Hold(aiqueue.Message, kind="hold"):
    n: int = 0


class Other(aiqueue.Message, kind="other"):
    pass


def holder(entered: asyncio.Event, left: asyncio.Event, **options: Any) -> aiqueue.Worker:
    """A worker whose jobs run until they are let go."""
    worker = aiqueue.Worker(**{"concurrency": 1, "name": "one", "drain_timeout": "20s", **options})

    @worker.handle(Hold)
    async def hold(job: aiqueue.Job[Hold]) -> None:
        entered.set()
        await left.wait()

    return worker


async def announce(client: aiqueue.Client, name: str = "ghost", **fields: Any) -> None:
    """A worker of which there is only the record."""
    record = {
        "worker": name, "state": "ok", "slots": 10, "running": 0, "families": [FAMILY], "kinds": {FAMILY: ["hold"]},
        "tenants": None, "host": "h", "pid": 1, "version": "0.1.0", "answers": True, **fields,
    }  # fmt: skip
    await WorkerRecords(client.connection, client.topology).write(name, record)


async def make_consumer(client: aiqueue.Client, tenant: str = "acme", priority: str = "normal", **other: Any) -> str:
    """Create the consumer of a lane, as a worker does. Returns its name in the API's subjects."""
    family = client.topology.family(FAMILY)
    config = family.lane_config(tenant, priority) | other
    name = f"{family.stream}.{config['durable_name']}"
    subject = f"CONSUMER.CREATE.{name}.{config['filter_subject']}"
    await client.connection.api(subject, {"stream_name": family.stream, "config": config})
    return name


async def take(client: aiqueue.Client, consumer: str) -> Any:
    """Have a job delivered, as to a worker that is lost with it."""
    inbox, got = client.connection.new_inbox(), asyncio.Event()
    found: list[Any] = []

    def on_message(message: Any) -> None:
        found.append(message)
        got.set()

    await client.connection.subscribe(inbox, on_message)
    request = json.dumps({"batch": 1, "expires": 5_000_000_000}).encode()
    await client.connection.publish(f"$JS.API.CONSUMER.MSG.NEXT.{consumer}", request, reply=inbox)
    await asyncio.wait_for(got.wait(), 20)
    return found[0]


def make_why(account: Account, monkeypatch: pytest.MonkeyPatch, **environment: str) -> Why:
    """Returns what `aiqueue explain` prints with --json; as text it must say the same."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("aiqueue.worker.announcer.EVERY_S", 0.2)
    values = {"url": account.url, "user": account.user, "password": account.password, **environment}
    for name, value in values.items():
        monkeypatch.setenv(f"AIQUEUE_{name.upper()}", value)

    async def why(job: aiqueue.Handle[Any] | str, *options: str, once: bool = False) -> dict[str, Any]:
        arguments = ["explain", job if isinstance(job, str) else job.id, *options]
        done = await asyncio.to_thread(CliRunner().invoke, app, [*arguments, "--json"])
        assert done.exit_code == 0, done.output
        found: dict[str, Any] = json.loads(done.stdout)
        if once:  # the reason may be another one a moment later
            return found
        shown = await asyncio.to_thread(CliRunner().invoke, app, arguments)
        assert f"({found['reason']})" in shown.stdout, (found, shown.stdout)
        assert found["remedy"]
        assert found["remedy"] in shown.stdout
        return found

    return why


@pytest.fixture
def why(account: Account, monkeypatch: pytest.MonkeyPatch) -> Why:
    return make_why(account, monkeypatch)
