"""`aiqueue.testing` in a user's project: the page of the docs, and a hundred tests on the built wheel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import textwrap
import venv
from pathlib import Path

import pytest

from ..support import ROOT

_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
CASES = """
    import asyncio, time
    import aiqueue, pytest
    from aiqueue import Backoff, testing

    class Ask(aiqueue.Message[int], kind="ask"):
        n: int

    worker = aiqueue.Worker()

    @worker.handle(Ask, retry=Backoff(attempts=3, first="1h", cap="1h"))
    async def ask(job: aiqueue.Job[Ask]) -> int:
        if job.message.n < 0 and job.attempt == 1:
            raise ValueError("once")
        return job.message.n

    @pytest.mark.parametrize("n", range(99))
    def test_a_round_trip(aiqueue_settings, n):
        async def run():
            async with testing.client(aiqueue_settings, families=["agent.tasks"]) as client:
                handle = await client.enqueue(Ask(n=n), tenant="acme")
                assert (await testing.drain(client, worker)).done == 1
                assert await handle.result() == n
        asyncio.run(run())

    def test_a_retry_of_an_hour_and_a_delay_of_a_month(aiqueue_settings):
        async def run():
            async with testing.client(aiqueue_settings, families=["agent.tasks"]) as client:
                handle = await client.enqueue(Ask(n=-1), tenant="acme", delay="30d")
                assert (await testing.drain(client, worker, delayed=True)).retried == 1
                assert await handle.result() == -1
        started = time.monotonic()
        asyncio.run(run())
        assert time.monotonic() - started < 1
"""


def clean_environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "AIQUEUE", "NATS"))}
    return {**kept, **more}


def test_the_tests_on_the_page_of_the_docs_pass(tmp_path: Path) -> None:
    fences = _FENCE.findall((ROOT / "docs/guides/testing.md").read_text())
    found = {info: [text for each, text in fences if each == info] for info in ("python", "python fragment", "ini")}
    (tmp_path / "app.py").write_text(found["python"][0])
    (tmp_path / "test_app.py").write_text("\n".join(found["python fragment"]))
    (tmp_path / "pytest.ini").write_text(found["ini"][0] + "pythonpath = .\nfilterwarnings = error\n")
    plugins = ("-p", "aiqueue.testing.plugin", "-p", "pytest_asyncio.plugin")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugins], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=clean_environment(PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", PYTHONPATH=str(ROOT)), timeout=100,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "9 passed" in ran.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_hundred_tests_on_the_built_wheel_take_less_than_six_seconds(tmp_path: Path) -> None:
    """In an empty environment that has the wheel, and what it depends on from this one."""
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "dist", str(ROOT)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], check=True
    )
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    project = tmp_path / "project"
    project.mkdir()
    (project / "test_of_user.py").write_text(textwrap.dedent(CASES))
    environment = clean_environment(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    environment.pop("PYTHONPATH", None)
    ran = subprocess.run(
        [str(tmp_path / "venv" / "bin" / "python"), "-m", "pytest", "-q", "-p", "no:cacheprovider"], cwd=project,
        env=environment, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3_000:] + ran.stderr[-3_000:]
    took = re.search(r"100 passed.* in ([\d.]+)s", ran.stdout)
    assert took is not None, ran.stdout
    assert float(took[1]) < 6
