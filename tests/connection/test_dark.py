"""A link that goes dark: what was written is neither refused nor answered. In a network namespace of the test's own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import aiqueue
from aiqueue.errors import Unavailable
from aiqueue.server import supervisor
from aiqueue.server.embedded import find_binary

from ..support import create_streams, wait_until

TOOL = shutil.which("ip")
NETWORK = f"198.18.{os.getpid() % 250}"  # RFC 2544: for tests, routed nowhere


class Ping(aiqueue.Message, kind="ping"):
    n: int = 0
    blob: bytes = b""


class Link:
    """A server behind a cable that can be cut."""

    def __init__(self, directory: Path) -> None:
        self.name = f"aiq{os.getpid()}"
        self.ours, self.theirs = f"{self.name}a"[-15:], f"{self.name}b"[-15:]
        self.port = supervisor.free_port()
        self.url = f"nats://{NETWORK}.2:{self.port}"
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    def lay(self) -> None:
        self._ip("netns", "add", self.name)
        self._ip("link", "add", self.ours, "type", "veth", "peer", "name", self.theirs, "netns", self.name)
        self._ip("addr", "add", f"{NETWORK}.1/24", "dev", self.ours)
        self._ip("link", "set", self.ours, "up")
        self._ip("-n", self.name, "addr", "add", f"{NETWORK}.2/24", "dev", self.theirs)
        self.mend()
        config = self._directory / "server.conf"
        config.write_text(
            f'listen: "0.0.0.0:{self.port}"\njetstream {{ store_dir: "{self._directory}", max_file_store: {2**50} }}\n'
        )
        command = [str(TOOL), "netns", "exec", self.name, str(find_binary()), "-c", str(config)]
        log = (self._directory / "log").open("wb")
        with log:
            self._process = subprocess.Popen(
                command,
                stderr=log,
                preexec_fn=supervisor.die_with(os.getpid()),  # noqa: PLW1509
            )
        wait_until(lambda: supervisor.ready((f"{NETWORK}.2", self.port), "", ""), within=30)

    def cut(self) -> None:
        """Drop both directions silently, as when the far end of the cable is pulled."""
        self._ip("-n", self.name, "link", "set", self.theirs, "down")

    def cut_answers(self) -> None:
        """What is sent arrives; what is answered does not."""
        self._ip("-n", self.name, "route", "add", "blackhole", f"{NETWORK}.1/32")

    def mend(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self._ip("-n", self.name, "route", "del", "blackhole", f"{NETWORK}.1/32")
        self._ip("-n", self.name, "link", "set", self.theirs, "up")

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(subprocess.CalledProcessError):
            self._ip("link", "del", self.ours)
        with contextlib.suppress(subprocess.CalledProcessError):
            self._ip("netns", "del", self.name)

    def _ip(self, *words: str) -> None:
        subprocess.run([str(TOOL), *words], check=True, capture_output=True)


@pytest.fixture
def link(tmp_path: Path) -> Iterator[Link]:
    if TOOL is None or os.geteuid() != 0:
        pytest.skip("network namespaces need the ip tool and root")
    made = Link(tmp_path)
    try:
        try:
            made.lay()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.decode().strip()}")
        yield made
    finally:
        made.end()


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", ["cut", "cut_answers"])
async def test_over_a_dark_link_with_queued_writes_everything_goes_on_and_each_enqueue_ends_in_one_way(
    link: Link, how: str
) -> None:
    async with aiqueue.connect(link.url) as client:
        await create_streams(client)
        worker, ran = aiqueue.Worker(concurrency=10), []

        @worker.handle(Ping)
        async def ping(job: aiqueue.Job[Ping]) -> int:
            ran.append(job.message.n)
            return job.message.n

        async def one(n: int, timeout: float) -> str | None:
            try:
                handle = await client.enqueue(
                    Ping(n=n, blob=bytes(10_000)), tenant="acme", unique=f"u{n}", timeout=timeout
                )
            except Unavailable as error:
                return "perhaps" if error.maybe_stored else None
            return str(await handle.result(60))

        async with worker.running(client):
            assert await one(0, 5) == "0"
            getattr(link, how)()
            # 6 MB that no socket takes: some with the patience to see the end of it, some without
            tasks = [asyncio.create_task(one(n, 4 if n % 3 == 0 else 60)) for n in range(1, 600)]
            await asyncio.sleep(15)
            assert not client.connection.connected, "the dark link was not noticed"
            link.mend()
            mended = time.monotonic()
            results = await asyncio.gather(*tasks)
            assert time.monotonic() - mended < 35  # what was on its way to us comes again when its lease has run out
        kept = {str(n) for n, each in enumerate(results, 1) if each == str(n)}
        none = {n for n, each in enumerate(results, 1) if each is None}
        assert {str(n) for n in range(1, 600) if n % 3} <= kept
        assert not none & set(ran), "said to be not stored, and ran"
        assert len(ran) == len(set(ran)), "stored twice"
