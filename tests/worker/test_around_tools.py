"""Sentry and SQLAlchemy around handlers of each form: errors are reported, and only what succeeded is committed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sentry_sdk
from sqlalchemy import create_engine

import aiqueue
from aiqueue.agent import Mail

from ..support import eventually
from . import tools
from .plain_jobs import ONCE, letters
from .tools import Save

WAYS = pytest.mark.parametrize(
    ("handler", "process"),
    [(tools.async_save, False), (tools.save, False), (tools.async_save, True), (tools.save, True)],
    ids=["async", "thread", "async in a process", "plain in a process"],
)


@pytest.fixture(autouse=True)
def _tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(tools.DIRECTORY, str(tmp_path))
    engine = create_engine(tools.database("pysqlite"))
    tools.Base.metadata.create_all(engine)
    engine.dispose()
    with sentry_sdk.new_scope():
        tools.start_sentry()
        yield
        sentry_sdk.get_client().close()
        sentry_sdk.get_global_scope().set_client(None)


def session_of(handler: Any) -> Any:
    return tools.async_session if handler is tools.async_save else tools.session


@WAYS
async def test_what_a_job_wrote_is_committed_if_it_succeeds_and_reported_and_rolled_back_if_it_fails(
    client: aiqueue.Client, handler: Any, process: bool
) -> None:
    worker = aiqueue.Worker(lifespan=tools.lifespan, processes=1, concurrency=4)
    worker.around(tools.report)
    worker.around(session_of(handler))
    worker.handle(Save, process=process, retry=ONCE)(handler)
    async with worker.running(client):
        made = [
            await client.enqueue(Save(text=f"row {n}", fails=n % 2 == 1), tenant="acme") for n in range(6)
        ]  # several at once: each has its own scope and session
        await asyncio.gather(*(each.result(25) for each in made), return_exceptions=True)
    assert tools.rows() == ["row 0", "row 2", "row 4"]
    expected = [["ValueError", f"cannot save row {n}", {"kind": "save"}, [f"row {n}"]] for n in (1, 3, 5)]
    assert sorted(tools.events()) == expected
    assert len(await letters(client)) == 3


@pytest.mark.parametrize("handler", [tools.async_save, tools.save], ids=["async", "thread"])
async def test_what_a_mails_handler_wrote_is_committed_if_it_succeeds_and_reported_and_rolled_back_if_it_fails(
    client: aiqueue.Client, handler: Any
) -> None:
    agent = aiqueue.Agent("ada", tenant="acme")
    agent.around(tools.report)
    agent.around(session_of(handler))
    agent.handle(Save, retry=ONCE)(handler)
    async with agent.running(client):
        for n in range(2):
            mail = Save(text=f"row {n}", fails=n == 1)
            await client.inboxes.send(mail, tenant="acme", to="ada", sender="bob", conversation=str(n))
        await eventually(lambda: letters(client))
        await eventually(lambda: tools.rows() == ["row 0"])
    assert tools.events() == [["ValueError", "cannot save row 1", {"kind": "save"}, ["row 1"]]]


async def test_a_commit_that_fails_fails_the_job_and_a_suppressed_error_commits_and_is_reported_as_an_error(
    client: aiqueue.Client,
) -> None:
    @contextmanager
    def suppressing(job: aiqueue.Job[Any] | Mail[Any]) -> Iterator[None]:
        try:
            yield
        except ValueError:
            sentry_sdk.add_breadcrumb(message="suppressed")

    worker = aiqueue.Worker(lifespan=tools.lifespan)
    for each in (tools.report, tools.session, suppressing):
        worker.around(each)
    worker.handle(Save, retry=ONCE)(tools.save)
    async with worker.running(client):
        handle = await client.enqueue(Save(text="x", fails=True), tenant="acme")
        with pytest.raises(aiqueue.JobFailed, match="suppressed the handler's ValueError: cannot save x"):
            await handle.result(25)
    assert tools.rows() == []
    ((name, value, _, crumbs),) = tools.events()
    assert (name, crumbs) == ("RuntimeError", ["x", "suppressed"])
    assert "suppressing suppressed the handler's ValueError" in value
