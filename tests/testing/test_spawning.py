"""`spawn`: a worker in a process of its own, which dies where it is told to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import testing
from aiqueue.errors import BadInput, JobFailed
from aiqueue.testing.server import settings_of_account

from ..support import Account, eventually
from . import spawning_app
from .spawning_app import Pay, Refused, Told, Unkept


@pytest.fixture
async def client(account: Account) -> AsyncIterator[aiqueue.Client]:
    async with testing.client(settings_of_account(account), families=["agent.tasks"], ack_wait="1s") as client:
        yield client


@pytest.mark.parametrize(
    ("point", "message", "runs_before", "runs"),
    [
        ("before_handler", Pay, 0, 1),
        ("after_handler", Pay, 1, 2),
        ("result_before_ack", Pay, 1, 1),
        pytest.param("result_before_ack", Unkept, 1, 2, marks=pytest.mark.slow),
        pytest.param("result_before_ack", Refused, 1, 1, marks=pytest.mark.slow),
    ],
)
async def test_a_worker_dies_at_the_point_and_its_job_goes_on_in_the_next_one(
    client: aiqueue.Client, tmp_path: Path, point: Any, message: Any, runs_before: int, runs: int
) -> None:
    log = tmp_path / "log"
    log.touch()
    handle = await client.enqueue(message(log=str(log)), tenant="acme")
    async with testing.spawn(client, spawning_app.worker, die_at=point) as spawned:
        await spawned.died()
        assert spawned.exit_code == -9
    assert log.read_text().count("ran") == runs_before
    await testing.drain(client, spawning_app.worker)
    assert log.read_text().count("ran") == runs
    if message is Pay:
        assert await handle.result(timeout=5) == 1
    elif message is Refused:
        with pytest.raises(JobFailed, match="never"):
            await handle.result(timeout=5)


async def test_a_worker_that_is_to_die_nowhere_runs_jobs_until_it_is_stopped(
    client: aiqueue.Client, tmp_path: Path
) -> None:
    async with testing.spawn(client, "tests.testing.spawning_app:worker") as spawned:
        handle = await client.enqueue(Pay(log=str(tmp_path / "log")), tenant="acme")
        assert await handle.result(timeout=20) == 1
        await client.enqueue(Unkept(log=str(tmp_path / "log")), tenant="acme")
        await eventually(lambda: "said by the handler" in spawned.output)
        with pytest.raises(AssertionError, match="still runs: no job came to None"):
            await spawned.died(within=0.01)
        await spawned.stop()
        assert spawned.exit_code == 0
        with pytest.raises(AssertionError, match="ended with exit code 0"):
            await spawned.died()


async def test_a_spawned_worker_has_the_client_s_settings_and_headers_and_none_of_the_file(
    account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "aiqueue.toml").write_text('creds = "prod.creds"\nprofile = "cluster"\nclaim_check = "1KiB"\n')
    monkeypatch.chdir(tmp_path)
    settings = settings_of_account(account)
    make, worker = spawning_app.trace, spawning_app.worker
    async with testing.client(settings, families=["agent.tasks"], headers=make) as client:
        handle = await client.enqueue(Told(), tenant="acme")
        async with testing.spawn(client, worker) as spawned:
            assert await handle.result(timeout=20) == [None, "single", 1024, "spawn.child"], spawned.output
    async with testing.client(settings, families=["agent.tasks"], headers=lambda message: {}) as client:
        with pytest.raises(BadInput, match="headers= of the client must be a function at the top level of a module"):
            testing.spawn(client, worker)


async def test_wrong_use_says_in_one_line_what_to_do(client: aiqueue.Client) -> None:
    hidden = aiqueue.Worker()
    for worker, problem in (
        (hidden, "no module has this worker at its top level"),
        ("app", 'worker must be a Worker, or its name, such as "app:worker"'),
        ("./app.py:worker", "or its name, such as \"app:worker\", not './app.py:worker', a file"),
        (3, "testing.spawn needs a Worker or its name"),
    ):
        wrong: Any = worker
        with pytest.raises(BadInput) as told:
            testing.spawn(client, wrong)
        assert problem in str(told.value)
    with pytest.raises(BadInput, match="die_at must be one of before_handler, after_handler, result_before_ack"):
        testing.spawn(client, spawning_app.worker, die_at="soon")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="the worker is not started"):
        _ = testing.spawn(client, spawning_app.worker).pid
    with pytest.raises(AssertionError, match=r"the worker no\.such:worker does not start: ModuleNotFoundError"):
        async with testing.spawn(client, "no.such:worker"):
            pass
