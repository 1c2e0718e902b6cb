"""What can never be answered is refused before it is stored, and requests that ask the same may share one call."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import JobFailed
from aiqueue.errors import BadInput
from aiqueue.gateway import Gateway, GatewayRequest, GatewayWorker, load
from aiqueue.gateway.standin import Behaviour, Fault, StandIn
from aiqueue.inspect import stats

from ..support import Account
from .running import KEY_VARIABLE, ask, running


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model": "smal"}, "did you mean small"),
        ({"options": {"top_k": 3}}, "option 'top_k' is not allowed"),
        ({"tenant_id": "globex"}, "is not the tenant"),
        ({"max_tokens": 1000}, "is above what model small has"),
    ],
)
async def test_a_request_that_can_never_be_answered_is_not_stored(
    client: aiqueue.Client, config: Path, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(BadInput, match=reason):
        await Gateway(client, load(config)).enqueue(ask(**fields), tenant="acme")
    assert await _waiting(client) == 0


async def test_a_missing_key_is_refused_unless_only_workers_have_it(
    client: aiqueue.Client, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(BadInput, match=f"provider p has no key: environment variable {KEY_VARIABLE}"):
        await Gateway(client, load(config)).enqueue(ask(), tenant="acme")
    assert await _waiting(client) == 0
    await Gateway(client, load(config), needs_keys=False).enqueue(ask(), tenant="acme")
    assert await _waiting(client) == 1


async def test_a_tenant_with_a_budget_is_refused_a_model_without_a_price(client: aiqueue.Client, config: Path) -> None:
    text = config.read_text().replace("price = { input = 1, output = 2 }", "", 1)
    config.write_text(text + '[[budget]]\ntenant = "acme"\nmonth = 1\n')
    gateway = Gateway(client, load(config))
    with pytest.raises(BadInput, match="price"):
        await gateway.enqueue(ask(), tenant="acme")
    await gateway.enqueue(ask(), tenant="globex")


async def test_the_file_is_that_beside_the_client_s_own_streams_as_for_a_worker(
    account: Account, client: aiqueue.Client, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AIQUEUE_GATEWAY", raising=False)
    access = {"user": account.user, "password": account.password}
    async with aiqueue.connect(account.url, **access, streams=config.parent) as other, GatewayWorker().running(other):
        handle = await Gateway(other).enqueue(ask(), tenant="acme")
        await handle.result(timeout=10)


async def test_requests_of_a_tenant_that_ask_the_same_share_one_call_if_they_want_to(
    client: aiqueue.Client, config: Path, standin: StandIn
) -> None:
    standin.behaviour = Behaviour(first_token_s=0.1)
    gateway = Gateway(client, load(config))
    wanted = [(ask(), "acme"), (ask(), "acme"), (ask(timestamp=7), "acme"), (ask(), "globex"), (ask("other"), "acme")]
    short = GatewayRequest.model_validate({"model": "small", "prompt": "one two three", "max_tokens": 5})
    async with running(client, config):
        handles = [await gateway.enqueue(each, tenant=tenant, share=True) for each, tenant in wanted]
        answers = await asyncio.gather(*(each.result(timeout=10) for each in handles))
        assert len(standin.calls) == 3
        assert [each["id"] for each in answers[:3]] == [answers[0]["id"]] * 3
        assert len({each["id"] for each in answers}) == 3
        await (await gateway.enqueue(ask(), tenant="acme")).result(timeout=10)
        assert len(standin.calls) == 4
        answer: Any = await (await gateway.enqueue(short, tenant="acme", share=True)).result(timeout=10)
        assert answer["response"] == "one two three one two"  # another form is another answer
        with pytest.raises(BadInput, match="leave out request_id"):
            await gateway.enqueue(ask(request_id="r"), tenant="acme", share=True)


async def test_a_shared_call_that_has_failed_is_made_again(
    client: aiqueue.Client, config: Path, standin: StandIn
) -> None:
    standin.order(Fault(400))
    gateway = Gateway(client, load(config))
    async with running(client, config):
        with pytest.raises(JobFailed):
            await (await gateway.enqueue(ask(), tenant="acme", share=True)).result(timeout=10)
        await (await gateway.enqueue(ask(), tenant="acme", share=True)).result(timeout=10)
    assert len(standin.calls) == 2


async def _waiting(client: aiqueue.Client) -> int:
    return sum(each.pending for each in await stats.lanes(client.connection, client.topology, "gateway.requests"))
