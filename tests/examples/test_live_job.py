"""The example in examples/live_job, in a real browser: its page follows a job over all that may break."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

import aiqueue
from aiqueue.server import supervisor

from .. import forks, support
from ..gateway.front.fronts import parse_events
from ..support import ROOT, NatsProcess
from .browser import Page, find_browser, open_page

EXAMPLE = ROOT / "examples/live_job"
BROWSER = find_browser()
LINES = 200


class Service:
    """The example as services: its web server, its worker, and a nats-server."""

    def __init__(self, server: NatsProcess, directory: Path) -> None:
        self.server, self.directory = server, directory
        self.port = supervisor.free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "AIQUEUE_URL": server.url,
            "AIQUEUE_USER": server.user, "AIQUEUE_PASSWORD": server.password,
        }  # fmt: skip
        self._started: list[forks.Program] = []

    async def serve(self) -> None:
        self.web = self._start("uvicorn", "app:app", "--port", str(self.port))
        await support.eventually(self._accepts)

    def _accepts(self) -> bool:
        assert self.web.poll() is None, (self.directory / "log").read_text()
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", self.port)):
            return True
        return False

    def work(self, pause_s: float) -> forks.Program:
        return self._start("aiqueue", "work", "tasks:worker", PAUSE_S=str(pause_s))

    def _start(self, *words: str, **more: str) -> forks.Program:
        environment = {**self._environment, **more}
        with (self.directory / "log").open("ab") as log:
            process = forks.start(
                *words, cwd=EXAMPLE, env=environment, stdout=log, stderr=log, imports=("uvicorn", "aiqueue.fastapi")
            )
        self._started.append(process)
        return process

    def client(self) -> aiqueue.Client:
        """A client that knows the example's streams."""
        server, streams = self.server, EXAMPLE / "streams"
        return aiqueue.connect(server.url, user=server.user, password=server.password, streams=streams)

    def end(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()


@pytest.fixture
async def service(own_server: Any, tmp_path: Path) -> AsyncIterator[Service]:
    service = Service(own_server(), tmp_path)
    user, password = service.server.user, service.server.password
    async with aiqueue.connect(service.server.url, user=user, password=password, streams=EXAMPLE / "streams") as client:
        await support.create_streams(client)
    try:
        await service.serve()
        yield service
    finally:
        service.end()


@pytest.fixture
async def page() -> AsyncIterator[Page]:
    if BROWSER is None:
        pytest.skip("no Chromium on PATH: apt-get install chromium")
    async with open_page(BROWSER) as page:
        yield page


def lines_of(text: str) -> list[int]:
    """The numbers of a report's lines."""
    return [int(each.partition(".")[0]) for each in text.splitlines() if each]


async def wait_for_lines(page: Page, count: int) -> None:
    """Wait until the page shows so many lines, which are each there once and in order."""

    async def are_there() -> bool:
        shown = lines_of(await page.text("#text"))
        assert shown == list(range(1, len(shown) + 1))
        return len(shown) >= count

    await support.eventually(are_there)


async def log_in(page: Page, service: Service, tenant: str) -> None:
    await page.open(service.url)
    await page.fill("#login [name=tenant]", tenant)
    await page.click("#login button")
    await support.eventually(lambda: page.run('!document.querySelector("#start").hidden'))


async def start(page: Page, lines: int) -> None:
    await page.fill("#start [name=lines]", str(lines))
    await page.click("#start button")
    await support.eventually(lambda: page.run("location.hash.length > 1"))


async def wait_for_state(page: Page, state: str) -> None:
    await support.eventually(lambda: page.run(f'document.querySelector("#state").innerText === {state!r}'))


async def answer_503(service: Service, count: int) -> None:
    """Answer in place of the service, as a proxy does whose server is away, so many times."""
    asked = 0

    async def answer(_: web.BaseRequest) -> web.Response:
        nonlocal asked
        asked += 1
        return web.Response(status=503)

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", service.port, reuse_address=True).start()
    await support.eventually(lambda: asked >= count)
    await runner.cleanup()


async def test_the_service_is_used_with_a_cookie_and_without_a_browser(service: Service) -> None:
    service.work(pause_s=0.01)
    jar = aiohttp.CookieJar(unsafe=True)  # of an IP address
    async with aiohttp.ClientSession(service.url, cookie_jar=jar) as http:
        async with http.post("/jobs", json={"topic": "rain"}) as answer:
            assert answer.status == 401
        async with http.post("/login", json={"tenant": "acme"}) as answer:
            cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        async with http.post("/jobs", json={"topic": "rain", "lines": 3}) as answer:
            assert answer.status == 202
            url = answer.headers["location"]
        async with http.get(f"{url}/events") as answer:
            events = [each for each in parse_events(await answer.text()) if each.data]
        assert lines_of("".join(json.loads(each.data) for each in events if not each.name)) == [1, 2, 3]
        assert events[-1].name == "result"
        jar.clear()
        for wrong in ("globex.", "globex." + "0" * 64, "", "\xe4"):
            async with http.get(url, headers={"cookie": f"session={wrong}"}) as answer:
                assert answer.status == 401, wrong
        async with http.get("/") as answer:
            assert "EventSource" in await answer.text()


async def test_a_page_follows_a_job_over_all_that_may_break_and_shows_each_line_once(
    page: Page, service: Service
) -> None:
    worker = service.work(pause_s=0.2)
    await log_in(page, service, "acme")
    await start(page, LINES)
    await wait_for_lines(page, 3)
    await page.reload()
    await wait_for_lines(page, 8)

    service.web.send_signal(signal.SIGTERM)  # it ends although a stream is open
    assert service.web.wait(timeout=10) in (0, -signal.SIGTERM)
    await support.eventually(lambda: page.run('document.querySelector("#problem").innerText.includes("lost")'))
    await service.serve()
    await wait_for_lines(page, 12)
    service.web.kill()
    service.web.wait()
    await answer_503(service, 3)
    await service.serve()
    await wait_for_lines(page, 16)

    service.server.kill()
    service.server.start()
    await wait_for_lines(page, len(lines_of(await page.text("#text"))) + 3)

    worker.kill()
    worker.wait()
    service.work(pause_s=0)
    await wait_for_state(page, "done")
    assert lines_of(await page.text("#text")) == list(range(1, LINES + 1))
    assert await page.run("following === null && problem.innerText === ''")
    async with service.client() as client:
        job = await client.job((await page.run("location.hash"))[1:], tenant="acme")
        events = [each.event async for each in job.stream(timeout="5s")]
    assert (events.count("restart"), events.count("chunk") > LINES) == (1, True)

    await page.run(  # who does not close it, either, is not sent the stream again
        "raw = new EventSource(`/jobs/${location.hash.slice(1)}/events`); raw.count = 0; "
        "raw.onmessage = () => raw.count++"
    )
    await support.eventually(lambda: page.run("raw.readyState === EventSource.CLOSED"))
    assert await page.run("raw.count") == events.count("chunk")


async def test_a_job_is_cancelled_on_its_page_and_is_nobody_else_s(page: Page, service: Service) -> None:
    service.work(pause_s=0.2)
    await log_in(page, service, "acme")
    await start(page, LINES)
    await wait_for_lines(page, 1)
    job = await page.run("location.hash")
    await page.click("#cancel")
    await wait_for_state(page, "cancelled")
    await page.reload()
    await wait_for_state(page, "cancelled")

    await page.run(
        "fetch('/login', {method: 'POST', headers: {'content-type': 'application/json'}, "
        "body: JSON.stringify({tenant: 'globex'})})"
    )
    await page.reload()
    await wait_for_state(page, "there is no such job (any more)")
    await page.call("Network.clearBrowserCookies")
    await page.open(f"{service.url}/?again{job}")
    await wait_for_state(page, "log in first")
    assert await page.run("start.hidden && !login.hidden")
