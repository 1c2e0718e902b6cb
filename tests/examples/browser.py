"""A real browser, headless, driven over the DevTools protocol: nothing else is installed for it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from .. import support

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = (
    "--headless=new", "--disable-gpu", "--no-first-run", "--no-default-browser-check", "--no-proxy-server",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--remote-debugging-port=0",
)  # fmt: skip


def find_browser() -> str | None:
    """The command of a Chromium on PATH; None: there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One page: `run` evaluates JavaScript in it, and returns its value."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._session: str | None = None

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol. Raises AssertionError with what the browser says."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        await self._socket.send_json(message)
        async with asyncio.timeout(20):
            while True:
                answer = await self._socket.receive_json()
                if answer.get("id") == number:
                    assert "error" not in answer, answer
                    result: dict[str, Any] = answer["result"]
                    return result

    async def attach(self) -> None:
        target = await self.call("Target.createTarget", url="about:blank")
        found = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = found["sessionId"]
        await self.call("Page.enable")

    async def run(self, code: str) -> Any:
        answer = await self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def open(self, url: str) -> None:
        await self.call("Page.navigate", url=url)
        await self.loaded()

    async def reload(self) -> None:
        await self.run("window.isOld = true")
        await self.call("Page.reload")
        await support.eventually(lambda: self.run("!window.isOld"))
        await self.loaded()

    async def loaded(self) -> None:
        await support.eventually(
            lambda: self.run('location.href !== "about:blank" && document.readyState === "complete"')
        )

    async def text(self, selector: str) -> str:
        return str(await self.run(f"document.querySelector({selector!r}).innerText"))

    async def click(self, selector: str) -> None:
        await self.run(f"document.querySelector({selector!r}).click()")

    async def fill(self, selector: str, text: str) -> None:
        await self.run(f"document.querySelector({selector!r}).value = {text!r}")

    async def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode((await self.call("Page.captureScreenshot"))["data"]))


@asynccontextmanager
async def open_page(command: str) -> AsyncIterator[Page]:
    """A new page in a browser of its own, whose files are gone afterwards."""
    # a short path: a socket of the browser lies below it
    with tempfile.TemporaryDirectory(prefix="page-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        options = [*OPTIONS, f"--user-data-dir={directory}"]
        if os.geteuid() == 0:
            options.append("--no-sandbox")
        environment = {**os.environ, "HOME": name, "XDG_CONFIG_HOME": name, "TMPDIR": name}
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(
                [command, *options, "about:blank"], env=environment, stdout=log, stderr=log, start_new_session=True
            )
        try:
            port_file = directory / "DevToolsActivePort"
            await support.eventually(lambda: port_file.exists() and len(port_file.read_text().splitlines()) == 2)
            port, path = port_file.read_text().splitlines()
            async with (
                aiohttp.ClientSession() as http,
                http.ws_connect(f"http://127.0.0.1:{port}{path}", max_msg_size=0) as socket,
            ):
                page = Page(socket)
                await page.attach()
                yield page
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its renderers, too
            process.wait()
