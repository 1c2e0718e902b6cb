"""What operators and handlers set: pauses of a key that never shorten each other, and what is stored of them."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import pytest

from aiqueue import headers, subjects
from aiqueue.connection import Connection
from aiqueue.errors import BadInput
from aiqueue.limits import Controls, RuleId, Rules

from ..support import Account, Eventually
from .provider import NAME, TOPOLOGY, limiters, rules

STREAM = "KV_AI_LIMITS"


def controls_of(connection: Connection) -> Controls:
    """Controls that follow nothing, as a client's."""
    return Controls(connection, TOPOLOGY, Rules(), connection.clock.now)


async def stored(connection: Connection, what: str, key: str, tenant: str | None = None) -> dict[str, Any]:
    found = await connection.last(STREAM, subjects.limit(STREAM, what, NAME, key, subjects.limit_scope(tenant)))
    assert found is not None
    plain: dict[str, Any] = json.loads(found.data)
    return plain


async def test_a_pause_without_an_end_holds_until_it_is_resumed(shared: Account, eventually: Eventually) -> None:
    key = subjects.new_id()
    async with limiters(shared, 1, lambda: rules("requests = 100")) as (limiter,):
        operator = controls_of(limiter._connection)
        pause = await operator.pause(NAME, key, for_s=None, author="anna", why="no more", replaces=True)
        assert pause.until == math.inf
        assert (await stored(limiter._connection, "pause", key))["until"] is None
        await eventually(lambda: limiter.controls.paused_until(NAME, key, "a") == math.inf)
        assert pause in limiter.controls.pauses()
        assert await operator.resume(NAME, key) == pause
        await eventually(lambda: limiter.controls.paused_until(NAME, key, "a") == 0)


async def test_a_handlers_pause_never_shortens_one_of_which_its_process_has_not_heard(shared: Account) -> None:
    key = subjects.new_id()
    async with limiters(shared, 1, lambda: rules("requests = 100")) as (limiter,):
        handlers, operator = controls_of(limiter._connection), controls_of(limiter._connection)
        long = await operator.pause(NAME, key, for_s=None, author="anna", replaces=True)
        assert await handlers.pause(NAME, key, for_s=20, author="worker 1", why="429") == long
        assert (await stored(limiter._connection, "pause", key))["author"] == "anna"
        assert handlers.paused_until(NAME, key, "a") == math.inf
        await operator.resume(NAME, key)
        short = await controls_of(limiter._connection).pause(NAME, key, for_s=20, author="worker 1")
        longer = await controls_of(limiter._connection).pause(NAME, key, for_s=60, author="worker 2")
        assert longer.until > short.until
        assert (await stored(limiter._connection, "pause", key))["author"] == "worker 2"


async def test_an_operator_replaces_a_pause_and_its_beginning_is_kept(shared: Account) -> None:
    key = subjects.new_id()
    async with limiters(shared, 1, lambda: rules("requests = 100")) as (limiter,):
        operator = controls_of(limiter._connection)
        first = await operator.pause(NAME, key, "acme", for_s=600, author="anna", replaces=True)
        second = await operator.pause(NAME, key, "acme", for_s=60, author="bert", replaces=True)
        assert second.until < first.until
        assert (second.author, second.set_at) == ("bert", first.set_at)


@pytest.mark.parametrize(
    "body",
    [
        b"nonsense", b"[]", b'{"v": 2}', b'{"v": 1, "until": 5}',
        {"until": "soon"}, {"until": float("nan")}, {"set_at": None}, {"tenant": "acme"}, {"key": "other"},
    ],
)  # fmt: skip
async def test_what_is_no_pause_of_its_subject_pauses_nothing(
    shared: Account, body: bytes | dict[str, Any], eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    key = subjects.new_id()
    if isinstance(body, dict):
        pause = {
            "v": 1,
            "family": NAME,
            "key": key,
            "tenant": None,
            "until": None,
            "author": "",
            "why": "",
            "set_at": 1,
        }
        body = json.dumps(pause | body).encode()
    async with limiters(shared, 1, lambda: rules("requests = 100")) as (limiter,):
        subject = subjects.limit(STREAM, "pause", NAME, key, "all")
        await limiter._connection.store(subject, body, {headers.MSG_ID: subjects.new_id()})
        await eventually(lambda: subject in caplog.text)
        assert not any(each.key == key for each in limiter.controls.pauses())
        assert limiter.controls.paused_until(NAME, "other", "a") == 0
        await limiter._connection.store(
            subject, b"", {headers.MSG_ID: subjects.new_id(), headers.KV_OPERATION: "PURGE"}
        )


@pytest.mark.parametrize("change", [{"requests": -1}, {"cost": float("nan")}, {"window_s": 0}, {"tenant": "acme"}])
async def test_a_stored_rule_that_is_wrong_overrides_nothing(
    shared: Account, change: dict[str, Any], eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    async with limiters(shared, 1, lambda: rules('key = "fixed"\nrequests = 100')) as (limiter,):
        subject = subjects.limit(STREAM, "rule", NAME, "fixed", "all")
        rule = {"v": 1, "family": NAME, "key": "fixed", "tenant": None, "requests": 5, "cost": None, "in_flight": None}
        plain = {**rule, "window_s": 60, "author": "anna", "set_at": 1.0, "expires_at": None}
        await limiter._connection.store(subject, json.dumps(plain).encode(), {headers.MSG_ID: subjects.new_id()})
        which = RuleId(NAME, "fixed", None)
        await eventually(lambda: which in limiter.controls.rules.overrides)
        assert await limiter.controls.unset_rule(which)
        data = json.dumps(plain | change).encode()
        await limiter._connection.store(subject, data, {headers.MSG_ID: subjects.new_id()})
        await eventually(lambda: subject in caplog.text)
        assert not limiter.controls.rules.overrides
        await limiter.controls.unset_rule(which)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("no.such", "k"), "unknown family 'no.such'"),
        (("agent.tasks", "k"), "agent.tasks has no limit_key"),
        ((NAME, ""), "a key is a text"),
        ((NAME, "k" * 1_025), "a key is a text of 1 to 1,024 characters"),
        ((NAME, "k", "a.b"), "tenant 'a.b'"),
    ],
)
async def test_a_pause_of_nothing_is_refused(shared: Account, arguments: tuple[Any, ...], problem: str) -> None:
    async with limiters(shared, 1, Rules) as (limiter,):
        before = limiter.controls.pauses()
        for call in (limiter.controls.pause(*arguments, for_s=1, author="x"), limiter.controls.resume(*arguments)):
            with pytest.raises(BadInput, match=problem):
                await call
        assert limiter.controls.pauses() == before


async def test_pauses_that_have_ended_are_forgotten(shared: Account) -> None:
    async with limiters(shared, 1, Rules) as (limiter,):
        for number in range(5):
            await limiter.controls.pause(NAME, f"{subjects.new_id()}", for_s=0.01, author=f"{number}")
            await asyncio.sleep(0.02)
        now = limiter.clock()
        assert sum(each.until <= now for each in limiter.controls._pauses.values()) <= 1
        assert len(limiter.controls._paused) == len(limiter.controls._pauses)
