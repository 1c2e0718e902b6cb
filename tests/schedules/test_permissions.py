"""What users with only the documented permissions see of schedules, and what those lack who have one less."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

import aiqueue
from aiqueue.errors import AccessDenied
from aiqueue.inspect import Subject, examine
from aiqueue.schedules import Every

from ..connection.test_permissions import documented, user
from ..support import create_streams, eventually
from .chain import Task, schedules_of, spec

LISTS, ADDS, DOCTOR = (
    "if the user lists [schedules]",
    "if the user adds, changes or pauses [schedules]",
    "if the user runs `aiqueue doctor`",
)
OPTIONAL = "$JS.API.STREAM.PURGE.AI_TICKS", "$JS.API.STREAM.INFO.KV_AI_SCHEDULES"


def config(**users: tuple[list[str], list[str]]) -> str:
    named = ", ".join(user(name, *permissions) for name, permissions in users.items())
    return f"authorization {{ users: [ {{ user: all, password: p }}, {named} ] }}"


async def test_the_documented_permissions_to_list_schedules_and_to_run_doctor_suffice(
    own_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server = own_server(config(lists=documented(LISTS), doctor=documented(DOCTOR)))
    worker = aiqueue.Worker()

    @worker.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> int:
        return 1

    async with aiqueue.connect(url=server.url, user="all", password="p") as every:
        await create_streams(every)
        await schedules_of(every).add(spec("report", Every("1s", starting=time.time() - 0.8)))
        async with (
            worker.running(every),
            aiqueue.connect(url=server.url, user="lists", password="p") as lists,
            aiqueue.connect(url=server.url, user="doctor", password="p") as doctor,
        ):

            async def shows_the_outcome() -> None:
                assert [each.outcome for each in await lists.schedules.list()] == ["done"]

            await eventually(shows_the_outcome)
            assert (await lists.schedules.get("report", tenant="acme")).last_at
            assert len(await lists.schedules.next_times("report", tenant="acme")) == 5
            found = [each async for each in examine(Subject(doctor.connection, doctor.topology))]
    assert [each.text for each in found if each.code == "unchecked"] == []
    assert "Violation" not in caplog.text


async def test_each_documented_permission_to_change_schedules_is_needed_and_named_when_it_is_missing(
    own_server: Any,
) -> None:
    publish, subscribe = documented(ADDS)
    lacking = {f"lacks{n}": each for n, each in enumerate(publish)}
    server = own_server(
        config(**{name: ([each for each in publish if each != less], subscribe) for name, less in lacking.items()})
    )
    async with aiqueue.connect(url=server.url, user="all", password="p") as every:
        await create_streams(every)
    for name, less in lacking.items():
        async with aiqueue.connect(url=server.url, user=name, password="p") as client:

            async def change(client: aiqueue.Client = client) -> None:
                schedules = schedules_of(client)
                await schedules.add(spec("report", Every("1h")))
                await schedules.pause("acme", "report")
                await schedules.resume("acme", "report")
                assert await schedules.list()
                assert await schedules.remove("acme", "report")

            if less in OPTIONAL:
                await change()
                continue
            with pytest.raises(AccessDenied, match=re.escape(re.sub(r"\.[*>].*", "", less))) as caught:
                await change()
            assert "\n" not in str(caught.value)
