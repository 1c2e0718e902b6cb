"""What was ended, removed or has expired stays so when the server is killed -9 (docs/decisions/deleted-keys.md)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import aiqueue
from aiqueue import headers
from aiqueue.errors import Unavailable
from aiqueue.gateway.batches.store import BatchStore
from aiqueue.limits import Controls, Rules, controls
from aiqueue.schedules import store
from aiqueue.topology import provision

FAMILIES = ["agent.tasks", "agent.message", "gateway.requests", "gateway.batches"]
LIMIT = {"family": "gateway.requests", "key": "m"}


class Task(aiqueue.Message, kind="keys.task", family="agent.tasks"):
    n: int = 0


async def left_of(client: aiqueue.Client, stream: str, subject: str) -> list[Any]:
    """What is stored, once the connection is up again."""
    while True:
        try:
            return [each async for each in client.connection.read(stream, subject)]
        except Unavailable:
            await asyncio.sleep(0.05)


async def kill(server: Any, client: aiqueue.Client) -> None:
    server.kill()
    server.start()
    await left_of(client, "KV_AI_PRESENCE", "nobody")


@pytest.fixture
async def killed(own_server: Any) -> Any:
    """A client, and a function that kills its server -9 and starts it again."""
    server = own_server()
    async with aiqueue.connect(server.url, user=server.user, password=server.password, families=FAMILIES) as client:
        await provision.apply(client.connection, client.topology)
        yield client, lambda: kill(server, client)


async def test_the_server_brings_back_what_a_message_had_replaced_that_has_expired(killed: Any) -> None:
    """Why no marker here has a short lifetime: look again when a server does not."""
    client, kill_server = killed
    await client.connection.store("$KV.AI_PRESENCE.x.other", b"", {headers.MSG_ID: "other"})  # its block stays
    for fields in ({}, {headers.KV_OPERATION: "PURGE", headers.ROLLUP: "sub", headers.TTL: "1s"}):
        await client.connection.store("$KV.AI_PRESENCE.x.y", b"", {headers.MSG_ID: str(len(fields)), **fields})
    while await left_of(client, "KV_AI_PRESENCE", "$KV.AI_PRESENCE.x.y"):
        await asyncio.sleep(0.1)
    await kill_server()
    (back,) = await left_of(client, "KV_AI_PRESENCE", "$KV.AI_PRESENCE.x.y")
    assert headers.KV_OPERATION not in back.headers


async def test_pauses_that_were_resumed_or_have_ended_do_not_come_back(killed: Any) -> None:
    client, kill_server = killed
    await client.pause("agent.tasks", tenant="acme")
    assert await client.resume("agent.tasks", tenant="acme") is not None
    await client.pause("agent.tasks", tenant="globex")
    await client.pause("agent.tasks", tenant="globex", duration="1s")
    await client.pause(key="m", family="gateway.requests")
    assert await client.resume(key="m", family="gateway.requests") is not None
    while await client.pauses():
        await asyncio.sleep(0.1)
    assert await lifetimes(client, "KV_AI_PRESENCE", "$KV.AI_PRESENCE.pause.>") == {"864000s", "864001s"}
    assert await lifetimes(client, "KV_AI_LIMITS", "$KV.AI_LIMITS.pause.>") == {None}
    await kill_server()
    assert await client.pauses() == []


async def lifetimes(client: aiqueue.Client, stream: str, subject: str) -> set[str | None]:
    return {each.headers.get(headers.TTL) for each in await left_of(client, stream, subject)}


async def test_a_limit_that_expires_does_not_bring_back_the_one_that_it_has_replaced(
    killed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controls, "EXPIRED_TTL_S", 0)  # which decided until when one that expires was stored
    client, kill_server = killed
    given = Controls(client.connection, client.topology, Rules(), client.connection.clock.now)
    await client.connection.clock.ensure(given.stream)
    await given.set_rule({**LIMIT, "requests": 1}, author="a")
    await given.set_rule({**LIMIT, "requests": 2}, author="a", expires_in_s=1)
    await asyncio.sleep(2.5)  # beyond which a message of a second's lifetime is gone
    await kill_server()
    (stored,) = await left_of(client, "KV_AI_LIMITS", "$KV.AI_LIMITS.rule.>")
    assert b'"requests": 2' in stored.data
    await given.set_rule({**LIMIT, "requests": 3}, author="a")
    which = next(iter(await overrides(client)))
    assert await given.unset_rule(which)
    assert await lifetimes(client, "KV_AI_LIMITS", "$KV.AI_LIMITS.rule.>") == {None}
    await kill_server()
    assert await overrides(client) == {}


async def overrides(client: aiqueue.Client) -> Any:
    rules = Rules()
    read = Controls(client.connection, client.topology, rules, client.connection.clock.now)
    await read.reload()
    rules.expire(client.connection.clock.now())
    return rules.overrides


async def test_a_pause_of_a_key_lives_as_long_as_the_one_that_it_replaces(killed: Any) -> None:
    client, _ = killed
    given = Controls(client.connection, client.topology, Rules(), client.connection.clock.now)
    await client.connection.clock.ensure(given.stream)
    for for_s in (3_600, 5):
        await given.pause("gateway.requests", "m", for_s=for_s, author="a", replaces=True)
    (stored,) = await left_of(client, "KV_AI_LIMITS", "$KV.AI_LIMITS.pause.>")
    assert 3_600 < int(stored.headers[headers.TTL].rstrip("s")) <= 3_661
    await given.resume("gateway.requests", "m")
    assert await lifetimes(client, "KV_AI_LIMITS", "$KV.AI_LIMITS.pause.>") == {None}
    await given.pause("gateway.requests", "m", for_s=5, author="a")
    assert await lifetimes(client, "KV_AI_LIMITS", "$KV.AI_LIMITS.pause.>") == {None}
    await given.pause("gateway.requests", "other", for_s=5, author="a")
    assert {None, "65s"} == await lifetimes(client, "KV_AI_LIMITS", "$KV.AI_LIMITS.pause.>")


async def test_removed_schedules_stay_removed_and_leave_their_room_where_there_are_very_many(
    killed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, kill_server = killed
    monkeypatch.setattr(store, "KEYS_MANY", 2)
    await client.schedules.add("daily", aiqueue.Cron("0 3 * * *", tz="UTC"), Task(), tenant="acme")
    assert await client.schedules.remove("daily", tenant="acme")
    assert await lifetimes(client, "KV_AI_SCHEDULES", "$KV.AI_SCHEDULES.>") == {None}
    await kill_server()
    assert await client.schedules.list() == []
    for name in ("one", "two", "three"):
        await client.schedules.add(name, aiqueue.Cron("0 3 * * *", tz="UTC"), Task(), tenant="acme")
    assert await client.schedules.remove("one", tenant="acme")
    assert await lifetimes(client, "KV_AI_SCHEDULES", "$KV.AI_SCHEDULES.*.one") == {"240h"}


async def test_a_deleted_file_of_the_gateway_leaves_a_marker_for_as_long_as_it_would_have_been_kept(
    killed: Any,
) -> None:
    client, _ = killed
    kept = BatchStore(client.connection, client.topology)
    for name, keep_s in (("a", 3_600), ("b", None)):
        seq = await kept.put("file", "acme", name, {}, expected=0, keep_s=keep_s)
        await kept.delete("file", "acme", name, expected=seq)
    by_hour, for_good = [
        each.headers[headers.TTL] for each in await left_of(client, kept.stream, f"$KV.{kept.stream[3:]}.>")
    ]
    assert 4_100 < int(by_hour.rstrip("s")) <= 4_201
    assert for_good == "800h"
