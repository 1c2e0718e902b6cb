"""The Dockerfile: no Docker engine is needed to do what its lines say."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

import aiqueue
from aiqueue.config import Settings

from ..support import ROOT, Account
from . import dockerfile

BUILD, IMAGE = dockerfile.parse((ROOT / "Dockerfile").read_text())

APP = """
import aiqueue

class Hello(aiqueue.Message, kind="hello"):
    name: str

worker = aiqueue.Worker()

@worker.handle(Hello)
async def hello(job: aiqueue.Job[Hello]) -> str:
    return f"hello {job.message.name}"
"""


class Hello(aiqueue.Message, kind="hello"):
    name: str


def test_the_image_runs_as_a_user_who_is_not_root() -> None:
    user = IMAGE.last("USER").split(":")[0]
    assert user.isdigit()  # Kubernetes can check runAsNonRoot for numbers only
    assert int(user) > 0


def test_the_image_takes_from_the_build_what_the_build_made() -> None:
    assert IMAGE.all_of("COPY") == [f"--from={BUILD.name} {BUILD.environment['VENV']} {BUILD.environment['VENV']}"]
    assert IMAGE.environment["PATH"].split(":")[0] == f"{BUILD.environment['VENV']}/bin"


def test_each_variable_of_the_image_is_one_that_aiqueue_or_python_knows() -> None:
    ours = {name for name in IMAGE.environment if name.startswith("AIQUEUE_")}
    settings = {f"AIQUEUE_{name.upper()}" for name in Settings.model_fields}
    assert ours - settings == {"AIQUEUE_HEALTH_FILE"}


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_its_lines_run_in_an_empty_folder_and_what_they_make_works_as_the_image_says(
    tmp_path: Path, account: Account, client: aiqueue.Client
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    built = dockerfile.build(BUILD, ROOT, root)
    bin_directory = Path(built["VENV"]) / "bin"
    assert not list(Path(built["VENV"]).rglob("nats-server*"))

    app = tmp_path / "app"
    app.mkdir()
    (app / "app.py").write_text(APP)
    environment = {
        **IMAGE.environment, "PATH": f"{bin_directory}:/usr/bin:/bin", "HOME": "/",
        "AIQUEUE_HEALTH_FILE": str(tmp_path / "health"),
        "AIQUEUE_URL": account.url, "AIQUEUE_USER": account.user, "AIQUEUE_PASSWORD": account.password,
    }  # fmt: skip

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        words = [str(bin_directory / IMAGE.command("ENTRYPOINT")[0]), *arguments]
        return subprocess.run(words, cwd=app, env=environment, capture_output=True, text=True, check=False, timeout=60)

    assert "Usage: aiqueue" in run(*IMAGE.command("CMD")).stdout
    probe = IMAGE.command("HEALTHCHECK")
    assert probe[0] == "aiqueue"
    assert run(*probe[1:]).returncode == 1  # nothing runs yet
    worker = subprocess.Popen(
        [str(bin_directory / "aiqueue"), "work", "app:worker"], cwd=app, env=environment, stderr=subprocess.DEVNULL
    )
    try:
        handle = await client.enqueue(Hello(name="image"), tenant="acme")
        assert await handle.result(60) == "hello image"
        end = time.monotonic() + 30
        while (ran := run(*probe[1:], "--ready")).returncode != 0:
            assert time.monotonic() < end, ran
    finally:
        worker.terminate()
    assert worker.wait(60) == 0
    assert not (tmp_path / "health").exists()

    nowhere = {name: value for name, value in environment.items() if name != "AIQUEUE_URL"}
    refused = subprocess.run(
        [str(bin_directory / "aiqueue"), "inspect"], cwd=app, env=nowhere, capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1), refused
    assert {each.name for each in app.iterdir()} - {"__pycache__"} == {"app.py"}
