"""Tenants' API keys: only hashes are stored, a revoked key is refused soon and everywhere, limits hold together."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

import aiqueue
from aiqueue.errors import BadInput, NotFound, QueueFull, Unavailable
from aiqueue.gateway import ApiKeys, KeyLimited, KeyRevoked
from aiqueue.topology import provision

from ..support import Account, Eventually, create_streams

BUCKET = "KV_AI_API_KEYS"


@pytest.fixture
async def client(account: Account) -> AsyncIterator[aiqueue.Client]:
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await create_streams(client)
        yield client


@contextlib.asynccontextmanager
async def another(account: Account) -> AsyncIterator[ApiKeys]:
    """The keys as another process has them."""
    async with (
        aiqueue.connect(account.url, user=account.user, password=account.password) as client,
        ApiKeys(client) as keys,
    ):
        yield keys


async def test_a_key_is_found_by_its_token_and_neither_token_nor_hash_is_shown(
    client: aiqueue.Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with ApiKeys(client) as keys:
        key, token = await keys.add("acme", name="app", models=["small"], priorities=["low"], budget_micros=5)
        assert token.startswith("aiq-")
        assert len(token) == 4 + 43  # 32 bytes in base64url
        assert keys.find(token) == key
        assert (key.tenant, key.name, key.budget_micros) == ("acme", "app", 5)
        assert key.allows("small")
        assert not key.allows("large")
        assert key.allows_priority("low")
        assert not key.allows_priority("high")
        for wrong in (token[:-1], token + "x", f" {token}", "", "aiq-", key.id, key.hash, "x" * 100_000, "\ud800"):
            assert keys.find(wrong) is None
        stored = await client.connection.last(BUCKET, f"$KV.AI_API_KEYS.{key.id}")
        assert stored is not None
        shown = [repr(key), str(key), json.dumps(key.plain()), caplog.text]
        assert not [each for each in shown if token in each or key.hash in each]
        assert token.encode() not in stored.data
        assert json.loads(stored.data) == {
            "v": 1, "id": key.id, "tenant": "acme", "name": "app", "models": ["small"], "priorities": ["low"],
            "budget_micros": 5, "requests_per_minute": None, "tokens_per_minute": None,
            "created_at": key.created_at, "revoked_at": None, "hash": key.hash,
        }  # fmt: skip


async def test_a_revoked_key_is_refused_by_other_processes_within_a_second(
    client: aiqueue.Client, account: Account, eventually: Eventually
) -> None:
    own = ApiKeys(client)
    key, token = await own.add("acme")
    _, kept = await own.add("acme")
    async with another(account) as one, another(account) as two:
        assert one.find(token) == two.find(token) == key
        begun = time.monotonic()
        revoked = await own.revoke(key.id)
        await eventually(lambda: one.find(token) is None and two.find(token) is None)
        assert time.monotonic() - begun < 1
        with pytest.raises(KeyRevoked, match=f"API key {key.id} was revoked"):
            await one.admit(key)
        assert revoked.revoked_at is not None
        assert await own.revoke(key.id) == revoked
        assert one.find(kept) is not None
    assert await own.get(key.id) == revoked
    assert [each.is_revoked for each in await own.list("acme")].count(True) == 1


async def test_what_is_not_heard_is_read_within_a_second_also_a_deleted_key(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    own = ApiKeys(client)
    key, token = await own.add("acme")
    other, other_token = await own.add("acme")
    async with ApiKeys(client) as keys:
        assert keys._watch._subscription is not None
        await keys._watch._subscription.close()  # notices are lost
        begun = time.monotonic()
        await own.revoke(key.id)
        await client.connection.store(
            f"$KV.AI_API_KEYS.{other.id}", b"", {"Nats-Msg-Id": "d", "KV-Operation": "PURGE", "Nats-Rollup": "sub"}
        )
        await eventually(lambda: keys.find(token) is None and keys.find(other_token) is None)
        assert time.monotonic() - begun < 1.5
    assert [each.id for each in await own.list()] == [key.id]


async def test_a_key_whose_message_was_deleted_without_a_marker_is_forgotten_at_the_next_full_look(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    own = ApiKeys(client)
    _, token = await own.add("acme")
    _, kept = await own.add("acme")
    stored = [each async for each in client.connection.read(BUCKET, "$KV.AI_API_KEYS.>")]
    monkeypatch.setattr("aiqueue.gateway.api_keys.FULL_LOOK_S", 0.3)
    async with ApiKeys(client) as keys:
        assert keys.find(token) is not None
        await client.connection.delete(BUCKET, stored[0].seq)
        await eventually(lambda: keys.find(token) is None)
        assert keys.find(kept) is not None


async def test_while_the_server_is_away_revoked_keys_stay_out_and_others_stay_in(
    own_server: Any, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiqueue.gateway.api_keys.LOOK_WAIT_S", 0.3)
    monkeypatch.setattr("aiqueue.gateway.api_keys.STALE_S", 0.1)
    server = own_server()
    async with aiqueue.connect(server.url, user=server.user, password=server.password) as client:
        await provision.apply(client.connection, client.topology)
        async with ApiKeys(client) as keys:
            key, token = await keys.add("acme", requests_per_minute=1_000)
            revoked, revoked_token = await keys.add("acme")
            await keys.revoke(revoked.id)
            assert keys.find(token) == key
            assert keys.find(revoked_token) is None
            (await keys.admit(key)).settle()
            server.kill()
            await eventually(lambda: not client.connection.connected)
            assert keys.find(token) == key
            assert keys.find(revoked_token) is None
            await asyncio.sleep(0.1)  # until what was read last is too old to admit by
            with pytest.raises(Unavailable):
                await keys.admit(key)
            await asyncio.to_thread(server.start)
            monkeypatch.setattr("aiqueue.gateway.api_keys.LOOK_WAIT_S", 20)
            (await keys.admit(key)).settle()
            assert keys.find(revoked_token) is None


async def test_a_key_that_was_revoked_while_this_process_was_cut_off_is_not_admitted_afterwards(
    client: aiqueue.Client, account: Account, eventually: Eventually
) -> None:
    """A request may come between the reconnection and the next look."""
    own = ApiKeys(client)
    key, token = await own.add("acme")
    async with another(account) as cut:
        await cut._watch.stop()  # cut off: it hears nothing, and looks no more
        await own.revoke(key.id)
        assert cut.find(token) == key  # as far as it knows
        cut._watch.on_regained()
        asking = asyncio.create_task(cut.admit(key))
        await eventually(cut._watch.wake.is_set)
        assert not asking.done()
        await cut._watch.start()
        with pytest.raises(KeyRevoked):
            await asking


async def test_requests_a_minute_hold_over_all_processes_and_say_when_to_come_again(
    client: aiqueue.Client, account: Account
) -> None:
    key, _ = await ApiKeys(client).add("acme", requests_per_minute=6)
    free, _ = await ApiKeys(client).add("acme")
    async with another(account) as one, another(account) as two:
        asked = await asyncio.gather(
            *(each.admit(key) for each in (one, two) * 5), return_exceptions=True
        )  # fmt: skip
        refused = [each for each in asked if isinstance(each, KeyLimited)]
        assert (len(asked), len(refused)) == (10, 4)
        for each in refused:
            assert (each.what, each.limit) == ("requests", 6)
            assert 55 < each.retry_after_s < 64
            assert str(each).startswith(f"API key {key.id} is at its limit: requests of this minute are used (limit 6)")
        late, _ = await ApiKeys(client).add("acme")
        for keys in (one, two):
            (await keys.admit(free)).settle()
            (await keys.admit(late)).settle()  # perhaps not heard of yet


async def test_tokens_a_minute_are_reserved_and_what_was_not_used_is_given_back(client: aiqueue.Client) -> None:
    async with ApiKeys(client) as keys:
        key, _ = await keys.add("acme", tokens_per_minute=1_000)
        first = await keys.admit(key, tokens=900)
        with pytest.raises(KeyLimited, match="tokens of this minute are used") as caught:
            await keys.admit(key, tokens=200)
        assert (caught.value.what, caught.value.limit) == ("tokens", 1_000)
        first.settle(100)
        second = await keys.admit(key, tokens=800)
        second.settle(0)
        with pytest.raises(BadInput, match=r"can use 1,001 tokens, and API key \w+ has 1,000 a minute: lower max_tok"):
            await keys.admit(key, tokens=1_001)


async def test_tokens_of_a_key_that_limits_requests_alone_are_no_use_above_a_reservation(
    client: aiqueue.Client, caplog: pytest.LogCaptureFixture
) -> None:
    async with ApiKeys(client) as keys:
        key, _ = await keys.add("acme", requests_per_minute=2)
        (await keys.admit(key, tokens=100)).settle(100)
        (await keys.admit(key, tokens=100)).settle(0)
        with pytest.raises(KeyLimited):
            await keys.admit(key)
    assert "above its reservation" not in caplog.text


async def test_wrong_keys_are_one_line(client: aiqueue.Client) -> None:
    keys = ApiKeys(client)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"tenant": "a.b"}, "tenant 'a.b' must be"),
        ({"tenant": "a", "name": "x\n"}, "the name of an API key is a line"),
        ({"tenant": "a", "models": []}, "models of an API key are 1 to 100 names"),
        ({"tenant": "a", "models": "small"}, "models are several names: give a list"),
        ({"tenant": "a", "priorities": ["urgent"]}, "gateway.requests has no priority 'urgent'"),
        ({"tenant": "a", "budget_micros": 0}, "budget_micros of an API key is a whole number from 1"),
        ({"tenant": "a", "requests_per_minute": True}, "requests_per_minute of an API key is a whole number"),
        ({"tenant": "a", "tokens_per_minute": 1.5}, "tokens_per_minute of an API key is a whole number"),
    ]
    for given, problem in wrong:
        with pytest.raises(BadInput) as caught:
            await keys.add(**given)
        assert problem in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="there is no API key nobody; `aiqueue gateway keys ls` lists them"):
        await keys.revoke("nobody")
    with pytest.raises(BadInput, match="before start"):
        keys.find("aiq-x")
    assert await keys.list() == []
    await client.connection.api(f"STREAM.DELETE.{BUCKET}")
    for call in (keys.add("acme"), keys.list(), keys.revoke("x"), keys.start()):
        with pytest.raises(NotFound, match=f"stream {BUCKET}.* run `aiqueue apply`"):
            await call


async def test_what_cannot_be_read_opens_no_door_and_is_logged(
    client: aiqueue.Client, caplog: pytest.LogCaptureFixture
) -> None:
    own = ApiKeys(client)
    key, token = await own.add("acme")
    stored = await client.connection.last(BUCKET, f"$KV.AI_API_KEYS.{key.id}")
    assert stored is not None
    document = json.loads(stored.data)
    for body in ("[1]", "{", json.dumps({**document, "v": 2}), json.dumps({**document, "id": "other"}),
                 json.dumps({**document, "tenant": "a.b"}), json.dumps({**document, "revoked_at": "x"}),
                 json.dumps({**document, "hash": None})):  # fmt: skip
        await client.connection.store(stored.subject, body.encode(), {"Nats-Msg-Id": str(hash(body))})
        caplog.clear()
        async with ApiKeys(client) as keys:
            assert keys.find(token) is None
        assert f"what is stored as API key {key.id} cannot be read" in caplog.text
        assert key.hash not in caplog.text
        with pytest.raises(BadInput, match="cannot be read"):
            await own.revoke(key.id)
    later = json.dumps({**document, "later": [1]})
    await client.connection.store(stored.subject, later.encode(), {"Nats-Msg-Id": "later"})
    async with ApiKeys(client) as keys:
        assert keys.find(token) == key


async def test_a_full_bucket_takes_no_new_key_and_still_revokes(client: aiqueue.Client) -> None:
    keys = ApiKeys(client)
    config = (await client.connection.api(f"STREAM.INFO.{BUCKET}"))["config"]
    await client.connection.api(f"STREAM.UPDATE.{BUCKET}", {**config, "max_bytes": 10_000})
    made: list[str] = []
    problem = ""
    while not problem and len(made) < 100:
        try:
            made.append((await keys.add("acme", name="x" * 100))[0].id)
        except QueueFull as error:
            problem = str(error)
    assert "is full: " in problem
    assert "its last tenth is for revocations (limit 10,000)" in problem
    assert len(made) > 10
    for each in made:
        assert (await keys.revoke(each)).is_revoked


async def test_a_request_is_counted_also_if_another_key_is_new_to_the_process_at_that_moment(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule of a new key voids what was granted to others and has not begun."""
    async with ApiKeys(client) as keys:
        (key, _), (new, _) = [await keys.add("acme", requests_per_minute=1) for _ in range(2)]
        acquire = keys._acquire

        async def late(limiter: Any, *arguments: Any) -> Any:
            credit = await acquire(limiter, *arguments)
            if keys._acquire is late and new.id not in {each.key for each in limiter.controls.rules.overrides}:
                keys._use_rule(limiter, new)
                assert limiter.try_acquire("gateway.keys", key.id, "acme", weight=1.0) is None  # another request
            return credit

        monkeypatch.setattr(keys, "_acquire", late)
        (await keys.admit(key)).settle()
        with pytest.raises(KeyLimited):
            await keys.admit(key)
