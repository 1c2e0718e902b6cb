"""The queue in a web service: requests become jobs, and a page follows them."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import aiohttp
import pytest
import yarl

from ..gateway.front.fronts import Event, parse_events
from ..support import Eventually
from .apps import Served

pytestmark = pytest.mark.usefixtures("working")


async def events_of(served: Served, url: str, **headers: str) -> tuple[int, list[Event]]:
    async with served.http.get(f"{url}/events", headers=headers) as answer:
        if answer.status == 200:
            assert answer.content_type == "text/event-stream"
        return answer.status, [each for each in parse_events(await answer.text()) if each.data]


async def get(served: Served, url: str, **headers: str) -> tuple[int, Any]:
    async with served.http.get(url, headers=headers) as answer:
        return answer.status, await answer.json()


async def test_a_request_becomes_a_job_that_is_followed_from_any_event(served: Served) -> None:
    url = await served.start()
    status, events = await events_of(served, url)
    assert status == 200
    assert [each.name for each in events] == ["", "", "", "result"]
    assert [json.loads(each.data) for each in events] == ["0\n", "1\n", "2\n", 3]
    for place, each in enumerate(events[:-1]):
        assert await events_of(served, url, **{"last-event-id": each.id}) == (200, events[place + 1 :])
    assert await events_of(served, f"{url}", **{"last-event-id": events[-1].id}) == (204, [])
    status, shown = await get(served, url)
    assert (status, shown["state"], shown["result"]) == (200, "done", 3)
    assert await get(served, f"{url}/result") == (200, 3)
    assert served.state.streams.count == 0


async def test_a_key_makes_one_job_of_repetitions_of_one_request_and_of_no_other(served: Served) -> None:
    key = {"idempotency-key": "order 1"}

    async def post(path: str, **headers: str) -> tuple[str, bool]:
        async with served.http.post(path, json={}, headers=headers) as answer:
            found = await answer.json()
            assert answer.headers["location"] == f"/api/jobs/{found['id']}"
            return found["id"], found["duplicate"]

    first, is_duplicate = await post("/api/counts", **key)
    assert not is_duplicate
    assert await post("/api/counts", **key) == (first, True)
    assert (await post("/api/others", **key))[0] != first
    assert (await post("/api/counts"))[0] != first
    for wrong in ("", "x" * 257, "ä"):
        async with served.http.post("/api/counts", json={}, headers={"idempotency-key": wrong}) as answer:
            assert answer.status == 422


async def test_a_job_of_another_tenant_is_404_as_one_that_there_is_not(served: Served) -> None:
    url = await served.start(to=1, ends="wait")
    verbs = [("GET", ""), ("GET", "/result"), ("GET", "/events"), ("DELETE", "")]
    told = set()
    for place in (url, "/api/jobs/nobodys"):
        for verb, part in verbs:
            async with served.http.request(verb, place + part, headers={"x-user": "globex"}) as answer:
                assert answer.status == 404
                assert answer.content_type == "application/problem+json"
                told.add(await answer.text())
    assert len(told) == 1
    assert (await get(served, url))[1]["state"] in ("queued", "in_flight")
    async with served.http.delete(url) as answer:
        assert await answer.json() is True
    status, problem = await get(served, f"{url}/result")
    assert (status, problem["reason"]) == (410, "cancelled")


async def test_an_id_that_can_be_no_job_s_is_404(served: Served) -> None:
    ids = ["%00", "%2e%2e", "..%2f..", "*", "%3E", "a.b", "x" * 5_000, "%f0%9f%90%88", "%ed%a0%80", "%0d%0aA:b", "%20"]
    for job_id in ids:
        for part in ("", "/events", "/result"):
            url = yarl.URL(f"{served.url}/api/jobs/{job_id}{part}", encoded=True)
            async with served.http.get(url) as answer:
                assert answer.status == 404, await answer.text()


async def test_a_wrong_last_event_id_is_422_before_a_stream_begins(served: Served) -> None:
    url, other = await served.start(), await served.start()
    _, events = await events_of(served, url)
    job_id, cursor = events[0].id.split(".")
    wrong = ["x", "a.b.c", f"{job_id}.", f"{job_id}.1-2", f"{job_id}.{cursor}.end", "x" * 10_000, "0"]
    wrong += [f"{job_id}.{cursor.replace('-', '-9', 1)}", f"{other.rpartition('/')[2]}.{cursor}", f"{job_id}x.end"]
    for each in wrong:
        async with served.http.get(f"{url}/events", headers={"last-event-id": each}) as answer:
            assert (answer.status, answer.content_type) == (422, "application/problem+json"), each
        async with served.http.get(f"{url}/events", params={"after": each}) as answer:
            assert answer.status == 422, each
    async with served.http.get(f"{other}/events", headers={"last-event-id": events[0].id}) as answer:
        assert answer.status == 422
    ahead = re.sub(r"-(\d+)-(\d+)-(\d+)-(\d+)-", r"-\g<1>-9999999999-0-0-", cursor, count=1)
    assert await events_of(served, url, **{"last-event-id": f"{job_id}.{ahead}"}) == (204, [])


async def test_the_id_in_the_url_counts_only_without_the_header(served: Served) -> None:
    url = await served.start()
    _, events = await events_of(served, url)
    params = {"after": events[0].id}
    for headers, left in (({}, events[1:]), ({"last-event-id": events[1].id}, events[2:])):
        async with served.http.get(f"{url}/events", params=params, headers=headers) as answer:
            assert [each for each in parse_events(await answer.text()) if each.data] == left


async def test_users_see_no_traceback_and_no_text_of_an_exception(served: Served) -> None:
    url = await served.start(ends="fail")
    _, events = await events_of(served, url)
    assert [each.name for each in events] == [*[""] * 3, "retry", "restart", "started", *[""] * 3, "failed"]
    assert json.loads(events[-1].data) == {"reason": "attempts"}
    async with served.http.get(url) as shown, served.http.get(f"{url}/result") as result:
        assert (shown.status, result.status) == (200, 502)
        told = "".join([each.data for each in events]) + await shown.text() + await result.text()
    assert "hunter2" not in told
    assert "Traceback" not in told
    rejected = await served.start(ends="reject")
    _, events = await events_of(served, rejected)
    assert json.loads(events[-1].data) == {"reason": "rejected", "error": "we count up to 3 only"}
    status, problem = await get(served, f"{rejected}/result")
    assert status == 422
    assert "we count up to 3 only" in problem["detail"]


async def test_a_client_that_leaves_is_followed_no_more(served: Served, eventually: Eventually) -> None:
    url = await served.start(ends="wait")

    def followers() -> int:
        subscriptions = served.state.client.connection._client._subs.values()
        return sum(url.rpartition("/")[2] in each.subject for each in subscriptions)

    async with served.http.get(f"{url}/events") as answer:
        await answer.content.readuntil(b"\n\n")
        assert (served.state.streams.count, followers()) == (1, 1)
    await eventually(lambda: (served.state.streams.count, followers()) == (0, 0))
    url = await served.start(to=0, ends="wait")
    for _ in range(3):  # before the status, too
        asking = asyncio.create_task(served.http.get(f"{url}/events").__aenter__())
        await eventually(lambda: served.state.streams.count == 1)
        asking.cancel()
        await eventually(lambda: (served.state.streams.count, followers()) == (0, 0))
    ours = ("EventStream", "EventFlow", "OutcomeWatch", "_wait_gone")
    assert not [each for each in asyncio.all_tasks() if each.get_coro().__qualname__.startswith(ours)]


async def test_silence_is_broken_by_comments_that_are_no_events(served: Served) -> None:
    url = await served.start(to=0, ends="wait")
    async with served.http.get(f"{url}/events") as answer:
        text = await answer.content.readuntil(b": ping\n: ping\n")
    assert [each for each in parse_events(text.decode() + "\n\n") if each.data] == []


async def test_a_head_request_is_answered_without_a_stream(served: Served) -> None:
    url = await served.start(to=0, ends="wait")
    async with asyncio.timeout(5), served.http.head(f"{url}/events") as answer:
        assert answer.status in (200, 405)  # FastAPI has no HEAD of its own
    assert served.state.streams.count == 0


async def test_without_a_user_there_is_nothing(served: Served) -> None:
    url = await served.start()
    async with aiohttp.ClientSession(served.url) as nobody:
        for part in ("", "/events", "/result"):
            async with nobody.get(url + part) as answer:
                assert answer.status == 401
