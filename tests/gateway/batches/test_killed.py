"""A batch whose worker is killed goes on in another one: each line is called once, or its record says that it may have
been called before.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue.documents import Documents
from aiqueue.errors import Unavailable
from aiqueue.gateway import Batches
from aiqueue.gateway.batches import BatchStore, engine, finishing
from aiqueue.gateway.batches.engine import BatchLines
from aiqueue.gateway.batches.run import BatchRun
from aiqueue.gateway.standin import Behaviour, Fault, StandIn

from ...support import Account, Eventually
from ..running import child, running
from .lines import chat_line, create, reported


async def test_a_batch_whose_worker_is_killed_twice_ends_complete_and_no_line_is_paid_for_unreported(
    client: aiqueue.Client, account: Account, config: Path, standin: StandIn, eventually: Eventually
) -> None:
    lines = 60
    standin.behaviour = Behaviour(first_token_s=0.1)
    batch = await create(client, map(chat_line, range(lines)))
    log = config.with_suffix(".log")
    for share in (3, 1.5):
        with child(account, config, log, {"GATEWAY_TEST_CONCURRENCY": "8"}) as process:
            await eventually(lambda share=share: len(standin.calls) >= lines / share)
            process.kill()
            await asyncio.to_thread(process.wait)
    with child(account, config, log):
        batch = await Batches(client).wait(batch.id, tenant="acme")
    assert (batch.status, batch.completed, batch.failed) == ("completed", lines, 0), log.read_text()[-3_000:]
    found = await reported(client, batch)
    assert len(found) == lines
    calls = Counter(each.body["messages"][0]["content"] for each in standin.calls)
    for number in range(lines):
        about = found[f"c{number}"]["response"]["body"]["aiqueue"]
        assert calls[f"line {number}"] <= 1 + about["possibly_billed"]
    assert max(calls.values()) <= 2


async def test_lines_whose_worker_went_amid_their_calls_before_their_batch_expired_are_not_said_to_be_uncalled(
    client: aiqueue.Client, config: Path, standin: StandIn, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiqueue.gateway.batches.client.WINDOW_S", 2)
    standin.behaviour = Behaviour(first_token_s=30)
    async with running(client, config, concurrency=2, drain_timeout=0.1):
        batch = await create(client, map(chat_line, range(6)))
        await eventually(lambda: len(standin.calls) == 2)
    await eventually(lambda: time.time() > batch.expires_at)
    async with running(client, config):
        batch = await Batches(client).wait(batch.id, tenant="acme")
    assert (batch.status, batch.failed, len(standin.calls)) == ("expired", 6, 2)
    told = {name: each["error"]["message"] for name, each in (await reported(client, batch)).items()}
    called = {f"c{each.body['messages'][0]['content'].split()[1]}" for each in standin.calls}
    assert {name for name, text in told.items() if text.endswith("an earlier call may be billed")} == called
    assert {text for name, text in told.items() if name not in called} == {"not called before the batch expired"}


async def test_a_stopping_worker_hands_its_batch_back_and_another_one_calls_no_line_again(
    client: aiqueue.Client, config: Path, standin: StandIn, eventually: Eventually
) -> None:
    standin.behaviour = Behaviour(first_token_s=0.1)
    standin.order(Fault(delay_s=2))  # lines behind the first one end, and are written, before it
    batch = await create(client, map(chat_line, range(40)))
    async with running(client, config, concurrency=4):
        await eventually(lambda: len(standin.calls) >= 20)
    assert not (await Batches(client).batch(batch.id, tenant="acme")).has_ended
    async with running(client, config):
        batch = await Batches(client).wait(batch.id, tenant="acme")
    assert (batch.status, batch.completed) == ("completed", 40)
    assert len(await reported(client, batch)) == 40
    assert len(standin.calls) == 40


Faulty = Callable[..., Awaitable[Any]]


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (BatchLines, "_store_part"),
        (BatchRun, "save"),
        (BatchStore, "put"),
        (finishing, "join_parts"),
        (Documents, "forget"),
    ],
)
async def test_a_crash_between_two_writes_loses_no_line_and_doubles_none(
    client: aiqueue.Client, config: Path, standin: StandIn, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    """The handler fails behind a write, as a worker that dies there does: at the second one of its kind, and so on."""
    batch = await create(client, map(chat_line, range(60)))
    monkeypatch.setattr(engine, "PART_BYTES", 4_000)
    monkeypatch.setattr(engine, "_BACKOFF", aiqueue.Backoff(first="10ms", cap="20ms"))
    write: Faulty = getattr(owner, name)
    number = 0

    async def write_then_fail(*arguments: Any, **options: Any) -> Any:
        nonlocal number
        written = await write(*arguments, **options)
        number += 1
        if number in (2, 4, 5):
            raise Unavailable("as ordered")
        return written

    monkeypatch.setattr(owner, name, write_then_fail)
    async with running(client, config):
        batch = await Batches(client).wait(batch.id, tenant="acme")
    assert number > 1
    assert (batch.status, batch.completed, batch.failed) == ("completed", 60, 0)
    assert len(await reported(client, batch)) == 60
    assert len(standin.calls) == 60
