"""The application around requests: its lifespan, tenants, errors of its own, and what is imported."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from fastapi import Request, Response
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

import aiqueue
from aiqueue import starlette as plain
from aiqueue.errors import BadInput, JobGone, Unavailable
from aiqueue.journal import StreamItem

from .. import support
from ..gateway.front.fronts import parse_events
from ..support import Account, Eventually, NatsProcess
from .apps import Count, HeaderUsers, Served, fastapi_app, serving, worker


async def whose(request: Request) -> Response:
    return JSONResponse(plain.queue(request).tenant)


def bare(**options: Any) -> Starlette:
    app = Starlette(routes=[Route("/", whose)], **options)
    plain.install_errors(app)
    return app


async def ask(served: Served, path: str = "/") -> tuple[int, Any]:
    async with served.http.get(path) as answer:
        return answer.status, await answer.json()


async def test_a_service_of_one_tenant_says_so_once(queue: aiqueue.Client, caplog: pytest.LogCaptureFixture) -> None:
    app = bare(lifespan=plain.lifespan(queue, tenant="shop"))
    async with serving(app, "") as served:
        assert await ask(served) == (200, "shop")
    async with serving(HeaderUsers(app), "acme") as served:  # type: ignore[arg-type]
        assert (await served.http.get("/")).status == 500
    assert "the lifespan has one tenant for all requests: leave out its tenant=" in caplog.text
    with pytest.raises(BadInput, match="tenant"):
        plain.lifespan(tenant="a b")
    with pytest.raises(BadInput, match="open client"):
        plain.lifespan("nats://")  # type: ignore[arg-type]


async def test_a_request_without_a_tenant_fails_closed(queue: aiqueue.Client, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(bare(lifespan=plain.lifespan(queue)), "") as served:
        status, problem = await ask(served)
    assert (status, problem["detail"]) == (500, "the service has failed")
    assert "the request has no tenant: call set_tenant" in caplog.text


async def test_a_tenant_that_can_be_none_is_the_service_s_fault(
    queue: aiqueue.Client, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(fastapi_app(queue), "acme.*") as served:
        status, problem = await ask(served, "/api/jobs/1")
    assert (status, problem["detail"]) == (500, "the service has failed")
    assert "tenant 'acme.*' must be 1 to 64 characters" in caplog.text


async def test_a_stream_that_is_missing_is_the_service_s_fault_and_no_404(
    account: Account, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        aiqueue.connect(account.url, user=account.user, password=account.password) as client,
        serving(fastapi_app(client), "acme") as served,
        served.http.post("/api/counts", json={}) as answer,
    ):
        assert (answer.status, (await answer.json())["error"]) == (500, "ConfigMismatch")
    assert "aiqueue apply" in caplog.text


async def test_a_route_without_the_job_s_id_is_told(queue: aiqueue.Client, caplog: pytest.LogCaptureFixture) -> None:
    async def show(request: Request) -> Response:
        return JSONResponse(await plain.describe(await plain.the_job(request)))

    app = Starlette(routes=[Route("/{id}", show)], lifespan=plain.lifespan(queue, tenant="t"))
    plain.install_errors(app)
    async with serving(app, "") as served:
        assert (await ask(served, "/x"))[0] == 500
    assert "/x: the route has no {job_id} in its path: add it, or pass param=" in caplog.text


async def test_an_application_without_the_lifespan_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(bare(), "") as served:
        assert (await ask(served))[0] == 500
    assert "the application has not opened the queue: pass lifespan=lifespan() to it" in caplog.text


async def test_a_client_that_is_open_stays_open_and_another_one_is_closed(shared: Account) -> None:
    client = aiqueue.connect(shared.url, user=shared.user, password=shared.password)
    for _ in range(2):
        async with serving(bare(lifespan=plain.lifespan(client, tenant="t")), "") as served:
            assert (await ask(served))[0] == 200
        with pytest.raises(BadInput, match="not open"):
            _ = client.connection
    async with client:
        async with serving(bare(lifespan=plain.lifespan(client, tenant="t")), "") as served:
            assert (await ask(served))[0] == 200
        assert client.connection is not None


async def test_a_lifespan_of_one_s_own_passes_the_queue_on_to_mounted_applications(queue: aiqueue.Client) -> None:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Any]]:
        async with plain.lifespan(queue, tenant="shop")(app) as state:
            yield {**state, "mine": 1}

    app = Starlette(routes=[Mount("/in", bare())], lifespan=lifespan)
    async with serving(app, "") as served:
        assert await ask(served, "/in/") == (200, "shop")


async def test_a_server_that_is_away_is_503_and_the_next_request_finds_it_again(own_server: Any) -> None:
    server: NatsProcess = own_server()
    client = aiqueue.connect(server.url, user=server.user, password=server.password)
    async with client, serving(fastapi_app(client), "acme") as served:
        await support.create_streams(client)
        server.kill()
        async with served.http.post("/api/counts", json={"timeout": 0.2}) as answer:
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            problem = await answer.json()
        assert (problem["detail"], problem["maybe_stored"]) == ("the queue does not answer now", False)
        server.start()
        assert await served.start()


async def test_an_application_does_not_start_without_a_server() -> None:
    client = aiqueue.connect("nats://127.0.0.1:1", connect_timeout=0.2)
    with pytest.raises(Unavailable):
        async with plain.lifespan(client)(Starlette()):
            pass


async def test_a_stream_needs_no_lifespan_but_a_handle(queue: aiqueue.Client) -> None:
    handle = await queue.enqueue(Count(), tenant="acme")

    async def events(request: Request) -> Response:
        return plain.sse(handle, plain.last_event_id(request))

    app = Starlette(routes=[Route("/", events)])
    async with worker.running(queue), serving(app, "") as served, served.http.get("/") as answer:
        assert [each.data for each in parse_events(await answer.text())][-1] == "3"


async def test_a_stream_with_details_has_the_texts_of_exceptions(queue: aiqueue.Client) -> None:
    handle = await queue.enqueue(Count(ends="fail"), tenant="acme")

    async def events(request: Request) -> Response:
        return plain.sse(handle, details=True)

    app = Starlette(routes=[Route("/", events)])
    async with worker.running(queue), serving(app, "") as served, served.http.get("/") as answer:
        failed = json.loads(parse_events(await answer.text())[-1].data)
    assert "password=hunter2 is wrong" in failed["error"]
    assert "Traceback" in json.dumps(failed) or "raise RuntimeError" in json.dumps(failed)


@pytest.mark.parametrize(
    "error", [JobGone("x"), ValueError("secret"), Unavailable("no server")], ids=lambda error: type(error).__name__
)
async def test_a_stream_that_fails_after_its_status_ends_with_a_problem_or_else_the_browser_comes_back(
    queue: aiqueue.Client, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing:
        id = "x"

        async def stream_batches(self, *, after: str | None) -> AsyncIterator[list[StreamItem]]:
            yield [StreamItem("chunk", "first", attempt=1, run=1, time=0.0, cursor="1")]
            raise error

    async def events(request: Request) -> Response:
        return plain.sse(cast("Any", Failing()))

    async with serving(Starlette(routes=[Route("/", events)]), "") as served, served.http.get("/") as answer:
        assert answer.status == 200
        found = [each for each in parse_events(await answer.text()) if each.data]
    assert found[0].data == '"first"'
    assert "secret" not in str(found)
    if isinstance(error, Unavailable):
        assert len(found) == 1
    else:
        problem = json.loads(found[1].data)
        assert (found[1].name, found[1].id, problem["status"]) == (
            "problem",
            "",
            410 if isinstance(error, JobGone) else 500,
        )
    assert str(error) in caplog.text


async def test_streams_end_when_the_server_is_told_to_stop(queue: aiqueue.Client) -> None:
    heard: list[int] = []

    def ours(number: int, _: object) -> None:
        heard.append(number)

    former = signal.signal(signal.SIGTERM, ours)
    try:
        async with worker.running(queue), serving(fastapi_app(queue), "acme") as served:
            url = await served.start(ends="wait")
            async with served.http.get(f"{url}/events") as answer:
                await answer.content.readuntil(b"\n\n")
                signal.raise_signal(signal.SIGTERM)
                text = (await answer.content.read()).decode()
            assert [json.loads(each.data) for each in parse_events(text)] == ["0\n", "1\n", "2\n"]
            assert heard == [signal.SIGTERM]
            async with served.http.get(f"{url}/events") as answer:  # one that had come before
                assert parse_events(await answer.text())[1:] == []
            assert signal.getsignal(signal.SIGTERM) is not ours
        assert signal.getsignal(signal.SIGTERM) is ours
        async with plain.lifespan(queue)(bare()):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN  # what somebody else has set meanwhile stays
    finally:
        signal.signal(signal.SIGTERM, former)


async def test_a_middleware_around_the_response_hides_no_leaving_client(
    queue: aiqueue.Client, eventually: Eventually
) -> None:
    app = fastapi_app(queue)

    async def passes(request: Request, call_next: Any) -> Response:
        found: Response = await call_next(request)
        return found

    app.add_middleware(BaseHTTPMiddleware, dispatch=passes)
    async with worker.running(queue), serving(app, "acme") as served:
        url = await served.start(ends="wait")
        async with served.http.get(f"{url}/events") as answer:
            await answer.content.readuntil(b'0\\n"\n\n')
            assert served.state.streams.count == 1
        await eventually(lambda: served.state.streams.count == 0)


@pytest.mark.parametrize("to", [0, 2])
async def test_a_job_that_keeps_no_result_ends_its_stream_once(
    queue: aiqueue.Client, tenant: str, eventually: Eventually, to: int
) -> None:
    mute, is_followed = aiqueue.Worker(), asyncio.Event()

    @mute.handle(Count, result=False)
    async def count(job: aiqueue.Job[Count]) -> None:
        for _ in range(job.message.to):
            await job.chunk("x")
        await is_followed.wait()

    async with mute.running(queue), serving(fastapi_app(queue), tenant) as served:
        url = await served.start(to=to)
        following = asyncio.create_task(served.http.get(f"{url}/events").__aenter__())
        await eventually(lambda: served.state.streams.count == 1)
        is_followed.set()
        events = [each for each in parse_events(await (await following).text()) if each.data]
        assert [each.name for each in events] == [*[""] * to, "ended"]
        async with served.http.get(f"{url}/events", headers={"last-event-id": events[-1].id}) as answer:
            assert answer.status == (204 if to else 404)  # nothing is left of a job without output


def test_the_schema_has_what_the_dependencies_ask_for() -> None:
    paths = fastapi_app(aiqueue.connect("nats://127.0.0.1:1")).openapi()["paths"]
    start, events = paths["/api/counts"]["post"], paths["/api/jobs/{job_id}/events"]["get"]
    assert {"idempotency-key", "x-user"} == {each["name"] for each in start["parameters"]}
    assert {"job_id", "last-event-id", "after", "x-user"} == {each["name"] for each in events["parameters"]}


def test_a_framework_is_imported_only_where_it_is_used() -> None:
    code = """
import sys
def imported(): print([each for each in ("starlette", "fastapi", "uvicorn") if each in sys.modules])
import aiqueue; aiqueue.Worker; aiqueue.connect; imported()
from aiqueue.starlette import TenantClient, problem_of; imported()
import aiqueue.starlette as plain; [getattr(plain, each) for each in plain.__all__]; imported()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == ["[]", "[]", "['starlette']"]


WITHOUT = """
import sys

sys.modules.update(dict.fromkeys(sys.argv[1:]))
for each in ("import aiqueue.fastapi", "from aiqueue.starlette import lifespan"):
    try:
        exec(each)
    except ModuleNotFoundError as error:
        print(error)
"""


def test_without_the_framework_the_import_says_what_to_install() -> None:
    command = [sys.executable, "-c", WITHOUT, "fastapi", "starlette"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == [
        "aiqueue.fastapi needs fastapi: pip install 'aiqueue[fastapi]'",
        "aiqueue.starlette needs starlette: pip install 'aiqueue[starlette]'",
    ]
