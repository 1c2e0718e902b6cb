"""The stand-in for a provider: what it logs and bills, its orders over HTTP, and its own process."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import aiohttp
import pytest

from aiqueue.gateway import Provider, ProviderError, Usage
from aiqueue.gateway.standin import Behaviour, Fault, StandIn, count_tokens, embed

from .conftest import HELLO, make_call
from .running import KEY


async def test_orders_and_the_log_go_over_http_too(standin: StandIn, provider: Provider) -> None:
    root = standin.url.removesuffix("/v1")
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{root}/behaviour", json={"completion_tokens": 3}) as done:
            assert (await done.json())["completion_tokens"] == 3
        async with session.post(f"{root}/fault", json={"status": 500, "model": "other"}) as done:
            assert done.status == 200
        async with session.post(f"{root}/fault", json={"status": 503, "count": 2}) as done:
            assert done.status == 200
        for _ in range(2):
            with pytest.raises(ProviderError, match="503"):
                await provider.chat(make_call())
        reply = await provider.chat(make_call(id="c3"))
        async with session.get(f"{root}/log?since=1") as done:
            log: list[dict[str, Any]] = await done.json()
    assert reply.usage == Usage(8, 3)
    assert [(each["status"], each["outcome"], each["idempotency_key"], each["key"]) for each in log] == [
        (503, "refused", "", KEY), (200, "ok", "c3", KEY),
    ]  # fmt: skip
    assert log[1]["started_at"] <= log[1]["ended_at"]


async def test_a_stamped_stream_says_when_each_of_its_chunks_was_sent(standin: StandIn, provider: Provider) -> None:
    standin.behaviour = Behaviour(token_s=0.01, completion_tokens=3, stamped=True)
    sent: list[float] = []

    async def take(chunk: Mapping[str, Any]) -> None:
        sent.append(float(chunk["system_fingerprint"]))

    begun = time.time()
    await provider.chat(make_call(), take)
    assert begun - 1e-6 <= sent[0] <= sent[-1] - 0.02 <= time.time()
    assert sent == sorted(sent)


@pytest.mark.parametrize(
    ("path", "order", "problem"),
    [
        ("fault", '{"staus": 500}', "the body must be a JSON object with some of the fields status, retry_after_s"),
        ("fault", '{"status": "bad"}', "status: Input should be a valid integer"),
        ("behaviour", '{"rpm": "many"}', "rpm: Input should be a valid integer"),
        ("behaviour", "[]", "the body must be a JSON object"),
        ("behaviour", "{", "the body must be a JSON object"),
    ],
)
async def test_a_wrong_order_is_refused_in_one_line_and_changes_nothing(
    standin: StandIn, path: str, order: str, problem: str
) -> None:
    before = standin.behaviour
    url = f"{standin.url.removesuffix('/v1')}/{path}"
    async with aiohttp.ClientSession() as session, session.post(url, data=order) as done:
        text = await done.text()
    assert (done.status, len(text.splitlines())) == (400, 1)
    assert text.startswith(problem)
    assert standin.behaviour == before
    assert not standin._faults


async def test_the_bill_is_of_all_calls_but_the_refused_ones(standin: StandIn, provider: Provider) -> None:
    await provider.chat(make_call({**HELLO, "max_tokens": 5}))
    for fault in (Fault(429), Fault(abort_after=0), Fault(abort_after=3)):
        standin.order(fault)
        with pytest.raises(ProviderError):
            await provider.chat(make_call(), _keep if fault.abort_after else None)
    assert [each.outcome for each in standin.calls] == ["ok", "refused", "aborted", "aborted"]
    assert standin.billed() == (8 + 8 + 8, 5 + 2)


async def _keep(_chunk: dict[str, Any]) -> None:
    """Heed no chunk."""


async def test_stop_may_come_twice_and_before_start() -> None:
    standin = StandIn()
    await standin.stop()
    await standin.start()
    await standin.stop()
    await standin.stop()


def test_tokens_are_a_fourth_of_the_bytes_and_embeddings_are_of_length_one() -> None:
    assert [count_tokens(each) for each in ("", "abcd", "abcde", "\u00fc\u00fc\u00fc")] == [0, 1, 2, 2]
    assert sum(each * each for each in embed("x", 100)) == pytest.approx(1.0)
    assert embed("x", 8) == embed("x", 8) != embed("y", 8)


async def test_it_runs_in_a_process_of_its_own() -> None:
    words = [sys.executable, "-m", "aiqueue.gateway.standin", "--completion-tokens", "2", "--rpm", "5"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            body = {**HELLO, "model": "m"}
            async with aiohttp.ClientSession() as session, session.post(f"{url}/chat/completions", json=body) as done:
                assert (await done.json())["choices"][0]["message"]["content"] == "one two"
        finally:
            process.terminate()


def test_its_help_says_how_faults_are_ordered() -> None:
    words = [sys.executable, "-m", "aiqueue.gateway.standin", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert "/fault; fields: status, " in " ".join(done.stdout.split())


async def test_what_it_cannot_start_with_is_one_line(standin: StandIn) -> None:
    def start(code: str, *arguments: str) -> str:
        program = f"{code}; import runpy; runpy.run_module('aiqueue.gateway.standin', run_name='__main__')"
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1, done.stderr
        return done.stderr

    taken = start("import sys", "--port", str(standin.port))
    assert taken.startswith(f"error: cannot listen on 127.0.0.1:{standin.port}: address already in use; ")
    assert "choose another --host or --port" in taken
    assert "choose another --host or --port" in start("import sys", "--port", "70000")
    without = start("import sys; sys.modules['aiohttp'] = None")
    assert without == "error: the stand-in needs aiohttp: pip install 'aiqueue[gateway]'\n"
