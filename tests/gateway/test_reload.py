"""gateway.toml is read again on SIGHUP, also by each process of a pool; a bad one changes nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import JobFailed
from aiqueue.errors import BadInput, TopologyError
from aiqueue.gateway import GatewayWorker
from aiqueue.gateway.standin import Fault, StandIn

from .. import forks
from ..support import ROOT, Account, Eventually, children
from .running import KEY, KEY_VARIABLE, ask, running

THIRD = """
[[model]]
name = "third"
provider = "p"
context = 8_000
max_output_tokens = 100
price = { input = 1, output = 2 }
"""


async def test_a_new_file_and_a_new_key_hold_for_the_next_call_while_others_go_on(
    client: aiqueue.Client, config: Path, standin: StandIn, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    standin.order(Fault(delay_s=0.5))
    async with running(client, config) as worker:
        slow = await client.enqueue(ask(), tenant="acme")
        await eventually(lambda: len(standin.calls) == 1)
        monkeypatch.setenv(KEY_VARIABLE, "sk-another-key-8")
        config.write_text(config.read_text() + THIRD)
        await worker.reload(client)
        await (await client.enqueue(ask(model="third"), tenant="acme")).result(timeout=10)
        await slow.result(timeout=10)
    assert [(each.model, each.key) for each in standin.calls] == [("small-1", KEY), ("third", "sk-another-key-8")]
    assert [each.outcome for each in standin.calls] == ["ok", "ok"]


async def test_a_bad_file_is_logged_in_one_line_and_the_former_one_stays(
    client: aiqueue.Client, config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(client, config) as worker:
        config.write_text(config.read_text().replace('kind = "openai"', 'kind = "other"'))
        await worker.reload(client)
        await (await client.enqueue(ask(), tenant="acme")).result(timeout=10)
    (problem,) = [each.message for each in caplog.records if each.levelname == "ERROR"]
    assert "the former one stays" in problem
    assert "provider 1.kind" in problem
    assert "\n" not in problem


async def test_a_worker_starts_only_with_a_good_file(client: aiqueue.Client, tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match="no such file"):
        async with GatewayWorker(tmp_path / "none.toml").running(client):
            pass


async def test_a_worker_runs_on_one_client_at_a_time(client: aiqueue.Client, config: Path) -> None:
    async with running(client, config) as worker:
        with pytest.raises(BadInput, match="runs already"):
            async with worker.running(client):
                pass
    async with worker.running(client):  # and again afterwards
        await (await client.enqueue(ask(), tenant="acme")).result(timeout=10)


@pytest.mark.parametrize("processes", [1, 2])
async def test_aiqueue_work_reads_the_file_again_on_sighup(
    client: aiqueue.Client, account: Account, config: Path, standin: StandIn, eventually: Eventually, processes: int
) -> None:
    log = config.with_suffix(".log")
    settings = {"AIQUEUE_URL": account.url, "AIQUEUE_USER": account.user, "AIQUEUE_PASSWORD": account.password}
    env = {**os.environ, **settings, "AIQUEUE_GATEWAY": str(config)}
    command = ["aiqueue", "work", "aiqueue.gateway:worker", "--processes", str(processes)]
    with (
        log.open("wb") as out,
        forks.start(*command, cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True) as process,
    ):
        try:
            handle = await client.enqueue(ask(), tenant="acme")
            await handle.result(timeout=20)
            with pytest.raises(JobFailed, match="unknown model 'third'"):
                await (await client.enqueue(ask(model="third"), tenant="acme")).result(timeout=10)
            members = children(process.pid)
            await eventually(lambda: log.read_text().count("slots, gateway.batches, gateway.requests") == processes)
            config.write_text(config.read_text() + THIRD)
            process.send_signal(signal.SIGHUP)
            await eventually(lambda: log.read_text().count("is reloaded: 4 models") == processes)
            answer: Any = await (await client.enqueue(ask(model="third"), tenant="acme")).result(timeout=10)
            assert answer["model"] == "third"
            assert children(process.pid) == members
        finally:
            process.terminate()
            process.wait(20)
    assert KEY not in log.read_text()
