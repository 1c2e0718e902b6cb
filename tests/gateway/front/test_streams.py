"""A stream over HTTP: cut and resumed, over fronts that restart and workers that die, each token once."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import aiohttp
import pytest

import aiqueue
from aiqueue.gateway.standin import Behaviour, Fault, StandIn

from ...support import Account
from ..running import child, running, shorten_leases
from .fronts import Event, RunningFront, Tokens, bearer, chat_body, open_front, parse_events, text_of_events

CHATS = "/chat/completions"
WORDS = " ".join(str(number) for number in range(100))


async def read_some(
    http: aiohttp.ClientSession, url: str, token: str, body: object, *, after: str = "", count: int = 10_000
) -> list[Event]:
    """Read so many events of a stream, then cut the connection."""
    headers = bearer(token, **({"last_event_id": after} if after else {}))
    text = ""
    async with http.post(url + CHATS, json=body, headers=headers) as response:
        assert response.status == 200, await response.text()
        async for part in response.content.iter_any():
            text += part.decode()
            if len(parse_events(text)) >= count:
                response.close()
                break
    return parse_events(text)[:count]


async def test_a_stream_that_is_cut_twenty_times_has_each_token_once_over_fronts_that_restart(
    client: aiqueue.Client, config: Path, http: aiohttp.ClientSession, standin: StandIn, tokens: Tokens
) -> None:
    standin.behaviour = Behaviour(token_s=0.01, completion_tokens=100)
    body = chat_body(WORDS, max_tokens=100, stream=True)
    events: list[Event] = []
    cuts = 0
    async with running(client, config):
        while not events or events[-1].data != "[DONE]":
            async with open_front(client, config) as front:
                for _ in range(5):  # of each front
                    after = events[-1].id if events else ""
                    events += await read_some(http, front.url, tokens.mine, body, after=after, count=4)
                    cuts += 1
                    if events[-1].data == "[DONE]":
                        break
    assert text_of_events(events) == WORDS
    assert cuts > 20
    assert len({each.id for each in events}) == len(events)
    assert len(standin.calls) == 1


async def test_behind_the_end_there_is_only_the_end(
    served: RunningFront, http: aiohttp.ClientSession, standin: StandIn, tokens: Tokens
) -> None:
    body = chat_body(stream=True)
    events = await read_some(http, served.url, tokens.mine, body)
    assert [each.data for each in await read_some(http, served.url, tokens.mine, body, after=events[-1].id)] == [
        "[DONE]"
    ]
    assert [each.data for each in await read_some(http, served.url, tokens.mine, body, after=events[-2].id)] == [
        "[DONE]"
    ]
    assert len(standin.calls) == 1


async def test_a_stream_goes_on_where_its_worker_dies_after_the_last_chunk(
    account: Account,
    client: aiqueue.Client,
    config: Path,
    http: aiohttp.ClientSession,
    standin: StandIn,
    tmp_path: Path,
    tokens: Tokens,
) -> None:
    """Another worker makes the answer of the stored chunks, and writes them again: the client has them."""
    await shorten_leases(client)
    body = chat_body(stream=True, stream_options={"include_usage": True})
    async with open_front(client, config) as front:
        asking = http.post(front.url + CHATS, json=body, headers=bearer(tokens.mine))
        with child(account, config, tmp_path / "log", {"GATEWAY_TEST_HANG": "end"}) as worker:
            async with asking as response:
                text = (await response.content.readuntil(b'"usage":{')).decode()  # it is stored
                worker.kill()
                async with running(client, config):
                    text += (await response.read()).decode()
    events = parse_events(text)
    assert text_of_events(events) == "one two three one two"
    assert events[-1].data == "[DONE]"
    assert len({each.id for each in events}) == len(events) == 9
    assert len(standin.calls) == 1


async def test_a_stream_whose_call_is_made_anew_ends_in_an_error_unless_the_client_understands_a_restart(
    served: RunningFront, http: aiohttp.ClientSession, standin: StandIn, tokens: Tokens
) -> None:
    for header in ("", "event"):
        standin.order(Fault(abort_after=3))
        headers = bearer(tokens.mine, **({"x_aiqueue_on_restart": header} if header else {}))
        async with http.post(served.url + CHATS, json=chat_body(stream=True), headers=headers) as response:
            events = parse_events(await response.text())
        if not header:
            assert json.loads(events[-1].data)["error"]["code"] == "stream_restarted"
            assert text_of_events(events[:-1]) == "one two"
        else:
            (place,) = [number for number, each in enumerate(events) if each.name == "restart"]
            assert json.loads(events[place].data)["attempt"] == 2
            assert text_of_events(events[place + 1 :]) == "one two three one two"
            assert events[-1].data == "[DONE]"


async def test_a_request_that_is_sent_again_has_the_stream_of_the_newest_call_alone(
    served: RunningFront, http: aiohttp.ClientSession, standin: StandIn, tokens: Tokens
) -> None:
    """As the error of the first one says. Its chunks of two calls are in one journal."""
    standin.order(Fault(abort_after=3))
    headers = bearer(tokens.mine, idempotency_key="mine")
    for number in range(2):
        async with http.post(served.url + CHATS, json=chat_body(stream=True), headers=headers) as response:
            events = parse_events(await response.text())
        if number == 0:
            assert json.loads(events[-1].data)["error"]["code"] == "stream_restarted"
    assert text_of_events(events) == "one two three one two"
    assert events[-1].data == "[DONE]"
    assert len(standin.calls) == 2


async def test_a_request_that_is_sent_again_has_no_chunk_of_a_worker_that_died(
    account: Account,
    client: aiqueue.Client,
    config: Path,
    http: aiohttp.ClientSession,
    standin: StandIn,
    tmp_path: Path,
    tokens: Tokens,
) -> None:
    """Such a run of the handler counts as no attempt: the next one has the same number."""
    await shorten_leases(client)
    standin.behaviour = Behaviour(token_s=0.05)
    body, headers = chat_body(stream=True), bearer(tokens.mine, idempotency_key="mine")
    async with open_front(client, config) as front:
        with child(account, config, tmp_path / "log") as worker:
            async with http.post(front.url + CHATS, json=body, headers=headers) as response:
                text = await response.content.readuntil(b'"content":"one"')
                worker.kill()
                async with running(client, config):
                    events = parse_events((text + await response.read()).decode())
        assert json.loads(events[-1].data)["error"]["code"] == "stream_restarted"
        async with running(client, config), http.post(front.url + CHATS, json=body, headers=headers) as response:
            events = parse_events(await response.text())
    assert text_of_events(events) == "one two three one two"
    assert events[-1].data == "[DONE]"
    assert len(standin.calls) == 2


async def test_a_resumed_stream_whose_call_is_made_anew_ends_in_the_same_error(
    client: aiqueue.Client, config: Path, http: aiohttp.ClientSession, standin: StandIn, tokens: Tokens
) -> None:
    standin.behaviour = Behaviour(token_s=0.02)
    standin.order(Fault(abort_after=5))
    body = chat_body(stream=True)
    async with open_front(client, config) as front, running(client, config):
        events = await read_some(http, front.url, tokens.mine, body, count=3)
        rest = await read_some(http, front.url, tokens.mine, body, after=events[-1].id)
    assert json.loads(rest[-1].data)["error"]["code"] == "stream_restarted"


async def test_silence_is_filled_with_comments_that_end_no_event(
    client: aiqueue.Client, config: Path, http: aiohttp.ClientSession, standin: StandIn, tokens: Tokens
) -> None:
    standin.behaviour = Behaviour(first_token_s=0.3, token_s=0.15, completion_tokens=2)
    async with (
        open_front(client, config, status_s=0.05, ping_s=0.05) as front,
        running(client, config),
        http.post(front.url + CHATS, json=chat_body(stream=True), headers=bearer(tokens.mine)) as response,
    ):
        text = await response.text()
    assert text.startswith(": ping\n")
    assert ": ping\n\n" not in text
    assert text_of_events(parse_events(text)) == "one two"


async def test_an_error_after_the_status_was_sent_is_an_event(
    client: aiqueue.Client, config: Path, http: aiohttp.ClientSession, standin: StandIn, tokens: Tokens
) -> None:
    standin.order(Fault(400))
    async with (
        open_front(client, config, status_s=0.05) as front,
        http.post(front.url + CHATS, json=chat_body(stream=True), headers=bearer(tokens.mine)) as response,
        running(client, config),
    ):
        events = parse_events(await response.text())
    assert response.status == 200
    assert json.loads(events[-1].data)["error"]["code"] == "refused"


@pytest.mark.parametrize(
    ("change", "status"),
    [("body", 409), ("tenant", 404), ("job", 404), ("cursor", 400), ("text", 400)],
)
async def test_a_wrong_last_event_id_is_refused(
    served: RunningFront, http: aiohttp.ClientSession, standin: StandIn, change: str, status: int, tokens: Tokens
) -> None:
    body = chat_body(stream=True)
    after = (await read_some(http, served.url, tokens.mine, body))[0].id
    if change == "body":
        body = chat_body("another", stream=True)
    job, rest = after.split(".", 1)
    other = await read_some(http, served.url, tokens.mine, chat_body("x", stream=True)) if change == "cursor" else []
    after = {
        "job": f"none{job}.{rest}", "cursor": f"{job}.{other[0].id.split('.', 1)[1]}" if other else "",
        "text": "7; DROP TABLE",
    }.get(change, after)  # fmt: skip
    headers = bearer(tokens.foreign if change == "tenant" else tokens.mine, last_event_id=after)
    calls = len(standin.calls)
    async with http.post(served.url + CHATS, json=body, headers=headers) as response:
        answer = await response.json()
    assert (response.status, set(answer["error"])) == (status, {"message", "type", "param", "code"})
    assert len(standin.calls) == calls


async def test_a_drain_ends_what_is_under_way_and_cuts_what_does_not_end(
    client: aiqueue.Client, config: Path, http: aiohttp.ClientSession, standin: StandIn, tokens: Tokens,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    standin.behaviour = Behaviour(token_s=0.02, completion_tokens=10)
    body = chat_body(stream=True, max_tokens=10)
    async with running(client, config):
        async with open_front(client, config, drain_timeout_s=5) as front:
            reading = asyncio.create_task(read_some(http, front.url, tokens.mine, body))
            await _until_called(standin, 1)
            front.stop.set()
            events = await reading
            assert events[-1].data == "[DONE]"
            assert await front.served
        standin.behaviour = Behaviour(token_s=0.2, completion_tokens=10)
        async with open_front(client, config, drain_timeout_s=0.1) as front:
            headers = bearer(tokens.mine, idempotency_key="k")
            async with http.post(front.url + CHATS, json=body, headers=headers) as response:
                first = await response.content.readuntil(b"\n\n")
                front.stop.set()
                *_, last = parse_events((await response.content.read()).decode())
            assert (last.id, json.loads(last.data)["error"]["code"]) == ("", "draining")
            assert not await front.served
        assert "without completing response" not in caplog.text
        async with open_front(client, config) as front:
            standin.behaviour = Behaviour()
            rest = await read_some(http, front.url, tokens.mine, body, after=parse_events(first.decode())[0].id)
    assert rest[-1].data == "[DONE]"
    assert len(standin.calls) == 2


async def test_a_request_that_a_drain_cuts_is_to_be_sent_again(
    client: aiqueue.Client, config: Path, http: aiohttp.ClientSession, standin: StandIn, tokens: Tokens
) -> None:
    standin.behaviour = Behaviour(first_token_s=0.5)
    headers = bearer(tokens.mine, x_stainless_retry_count="0")
    async with running(client, config):
        async with open_front(client, config, drain_timeout_s=0.1) as front:
            asking = asyncio.create_task(http.post(front.url + CHATS, json=chat_body(), headers=headers))
            await _until_called(standin, 1)
            front.stop.set()
            response = await asking
        assert (response.status, response.headers["x-should-retry"]) == (503, "true")
        async with open_front(client, config) as front:
            headers = bearer(tokens.mine, x_stainless_retry_count="1")
            async with http.post(front.url + CHATS, json=chat_body(), headers=headers) as response:
                assert response.status == 200
    assert len(standin.calls) == 1


async def _until_called(standin: StandIn, count: int) -> None:
    async with asyncio.timeout(5):
        while len(standin.calls) < count:
            await asyncio.sleep(0.005)
