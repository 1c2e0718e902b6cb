"""The pytest plugin: what it gives to tests of each kind, and that it does nothing to others."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from aiqueue.testing import server

from ..support import ROOT

Pytest = Callable[..., str]

TEST = """
    import asyncio
    import aiqueue
    from aiqueue import testing

    class Ping(aiqueue.Message, kind="ping"):
        n: int

    async def send(settings, n):
        async with testing.client(settings, families=["agent.tasks"]) as client:
            await client.enqueue(Ping(n=n), tenant="acme", unique="same")
            info = await client.connection.api("STREAM.INFO.AI_AGENT_TASKS")
            assert info["state"]["messages"] == 1
            return settings.user
"""


@pytest.fixture
def run_pytest(tmp_path: Path) -> Pytest:
    """Runs pytest in an empty project with this test file, and the plugin as its entry point loads it."""

    def run(test: str, *arguments: str, fails: bool = False, **environment: str) -> str:
        (tmp_path / "test_of_user.py").write_text(textwrap.dedent(TEST) + textwrap.dedent(test))
        (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "AIQUEUE", "NATS"))}
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "aiqueue.testing.plugin", *arguments],
            cwd=tmp_path,
            env={**kept, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT), **environment},
            capture_output=True, text=True, check=False, timeout=100,
        )  # fmt: skip
        assert (ran.returncode != 0) == fails, ran.stdout + ran.stderr
        return ran.stdout + ran.stderr

    return run


def test_a_sync_test_without_an_async_plugin_has_an_account_of_its_own_and_the_run_leaves_nothing(
    run_pytest: Pytest, tmp_path: Path
) -> None:
    said = run_pytest("""
        import pathlib

        users = []

        def test_one(aiqueue_settings):
            users.append(asyncio.run(send(aiqueue_settings, 1)))

        def test_two(aiqueue_settings):
            users.append(asyncio.run(send(aiqueue_settings, 2)))
            assert len(set(users)) == 2

        def test_three(aiqueue_server):
            pathlib.Path("server").write_text(f"{aiqueue_server.pid} {aiqueue_server.directory}")
    """)
    assert "3 passed" in said
    pid, directory = (tmp_path / "server").read_text().split()
    assert not Path(f"/proc/{pid}").exists()
    assert not Path(directory).exists()


def test_an_async_test_of_anyio_uses_it(run_pytest: Pytest) -> None:
    pytest.importorskip("anyio")
    said = run_pytest(
        """
        import pytest

        @pytest.fixture
        def anyio_backend():
            return "asyncio"

        @pytest.mark.anyio
        async def test_one(aiqueue_settings):
            await send(aiqueue_settings, 1)
        """,
        "-p", "anyio.pytest_plugin",
    )  # fmt: skip
    assert "1 passed" in said


def test_each_xdist_worker_has_one_server_for_all_of_its_tests(run_pytest: Pytest, tmp_path: Path) -> None:
    run_pytest(
        """
        import os, pathlib, pytest

        @pytest.mark.parametrize("n", range(6))
        def test_one(aiqueue_settings, n):
            asyncio.run(send(aiqueue_settings, n))
            worker = os.environ["PYTEST_XDIST_WORKER"]
            with pathlib.Path("urls").open("a") as file:
                file.write(f"{worker} {aiqueue_settings.servers[0]}\\n")
        """,
        "-p", "xdist.plugin", "-n", "2",
    )  # fmt: skip
    lines = (tmp_path / "urls").read_text().splitlines()
    workers = {line.split()[0] for line in lines}
    assert len(lines) == 6
    assert len(set(lines)) == len(workers) == 2


def test_a_run_that_uses_nothing_of_the_plugin_imports_pytest_and_three_small_modules() -> None:
    listing = (
        "import sys, pytest; before = set(sys.modules); import aiqueue.testing.plugin; "
        "print(*sorted(set(sys.modules) - before))"
    )
    new = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True).stdout.split()
    assert new == ["aiqueue", "aiqueue.testing", "aiqueue.testing.plugin"]


def test_neither_the_environment_nor_a_file_leads_to_another_server(run_pytest: Pytest, tmp_path: Path) -> None:
    (tmp_path / "aiqueue.toml").write_text(
        'url = "nats://prod:4222"\nprofile = "cluster"\nclaim_check = "1KiB"\ncreds = "prod.creds"\n'
        'size = "small"\nfamilies = ["agent.tasks", "agent.memory"]\n[overlay.dead]\nstream.max_age = "7d"\n'
    )
    said = run_pytest(
        """
        def test_one(aiqueue_settings):
            assert aiqueue_settings.claim_check == 1024  # what is not about the server holds
            asyncio.run(send(aiqueue_settings, 1))

        def test_a_program_that_finds_its_settings_itself(aiqueue_settings, monkeypatch):
            for each in testing.environment(aiqueue_settings).items():
                monkeypatch.setenv(*each)
            found = aiqueue.Settings.load()
            assert (found.servers, found.user) == (aiqueue_settings.servers, aiqueue_settings.user)
            assert (found.size, found.families) == ("small", ("agent.tasks", "agent.memory"))
            assert found.overlay == {"dead": {"stream": {"max_age": "7d"}}}
            assert found.model_dump() == aiqueue_settings.model_dump()  # no credentials, and one replica
            changed = {"size": "medium", "families": None, "overlay": {}, "claim_check": 256 * 1024}
            defaults = aiqueue_settings.model_copy(update=changed)  # whatever the file says
            for each in testing.environment(defaults).items():
                monkeypatch.setenv(*each)
            found = aiqueue.Settings.load()
            assert found.model_dump() == defaults.model_dump()
        """,
        AIQUEUE_CONTEXT="prod", NATS_URL="nats://prod:4222", AIQUEUE_TOKEN="secret",
    )  # fmt: skip
    assert "2 passed" in said


def test_settings_that_are_wrong_fail_the_test_with_one_line(run_pytest: Pytest, tmp_path: Path) -> None:
    (tmp_path / "aiqueue.toml").write_text('profil = "single"\n')
    said = run_pytest(
        """
        def test_one(aiqueue_settings):
            pass
        """,
        fails=True,
    )
    assert "aiqueue.toml: unknown key 'profil'" in said
    assert "Traceback" not in said
    assert "site-packages" not in said


def test_what_a_killed_run_has_left_in_memory_is_deleted_and_what_another_run_uses_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr(server, "MEMORY", tmp_path)
    monkeypatch.setattr(server, "MEMORY_MIN", 1)
    left = tmp_path / f"{server.IN_MEMORY}left"
    left.mkdir()
    (left / "lock").touch()
    (tmp_path / f"{server.IN_MEMORY}being-made").mkdir()
    with server.directory_in_memory(tmp_path / "disk") as first:
        assert first.parent.parent == tmp_path
        with server.directory_in_memory(tmp_path / "disk") as second:
            assert first.parent.exists()
            assert second != first
    assert [each.name for each in tmp_path.iterdir()] == [f"{server.IN_MEMORY}being-made"]
    with monkeypatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path))
        with server.directory_in_memory(tmp_path / "disk") as directory:
            assert directory == tmp_path / "disk"
    monkeypatch.setattr(server, "MEMORY_MIN", 2**60)
    with server.directory_in_memory(tmp_path / "disk") as directory:
        assert directory == tmp_path / "disk"


def test_the_plugin_is_an_entry_point_of_pytest() -> None:
    assert 'pytest11]\naiqueue = "aiqueue.testing.plugin"' in (ROOT / "pyproject.toml").read_text()
    assert importlib.util.find_spec("aiqueue.testing.plugin") is not None
