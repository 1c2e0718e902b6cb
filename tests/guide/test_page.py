"""The programs of docs/guides/plain-clients.md run, in their order, beside a worker of ours."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue.agent import Mail
from aiqueue.topology import provision

from ..support import ROOT, Account, NatsProcess
from .clients import HERE, environment
from .messages import Ask, Note

PAGE = ROOT / "docs/guides/plain-clients.md"
_PROGRAM = re.compile(r"^```(python fragment|js)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAM_S = 30


def programs(language: str) -> list[str]:
    return [text for info, text in _PROGRAM.findall(PAGE.read_text()) if info == language]


async def run(command: list[str], code: str, account: Account, cwd: Path) -> str:
    address = account.url.replace("://", f"://{account.user}:{account.password}@")
    process = await asyncio.create_subprocess_exec(
        *command, code, cwd=cwd, env=environment() | {"NATS_URL": address},
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(PROGRAM_S):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode == 0, err.decode()
    assert err == b""
    return out.decode()


def command_of(request: pytest.FixtureRequest, language: str, place: Path) -> tuple[list[str], Path]:
    """Return the command that takes a program, and where to run it. Skips where there is no Node.js."""
    if language != "js":
        return [sys.executable, "-P", "-c"], place
    if problem := request.getfixturevalue("node_problem"):
        pytest.skip(f"the Node.js client is not tried: {problem}")
    return ["node", "--input-type=module", "--eval"], HERE


@pytest.mark.parametrize("language", ["python fragment", "js"])
async def test_programs_of_the_page_say_what_became_of_job_and_mail(
    request: pytest.FixtureRequest, shared: Account, client: aiqueue.Client, tmp_path: Path, language: str
) -> None:
    command, cwd = command_of(request, language, tmp_path)
    large = 3_000_000
    worker, agent = aiqueue.Worker(), aiqueue.Agent("reader", tenant="acme")

    @worker.handle(Ask)
    async def answer(job: aiqueue.Job[Ask]) -> dict[str, Any]:
        await job.progress(0.5, "half")
        return {"said": "x" * large if job.message.text == "large" else job.message.text.upper()}

    @agent.handle(Note)
    async def note(mail: Mail[Note]) -> None:
        await mail.reply(Note(text=mail.message.text.upper()))

    async with worker.running(client), agent.running(client):
        job = await client.enqueue(Ask(text="large"), tenant="acme", unique="large")
        await job.result(timeout=30)
        outcome, journal, document, reply = [await run(command, code, shared, cwd) for code in programs(language)]
    assert outcome.startswith("result ")
    assert "HELLO" in outcome
    events = re.findall(r"^\d+ (\d+) (\w+)", journal, re.MULTILINE)  # data may go over several lines
    assert events == [("1", "started"), ("1", "progress"), ("1", "result")]
    assert document.split() == ["result", "True" if command[0] == sys.executable else "true", str(large)]
    assert reply.startswith("reader ")
    assert "HELLO" in reply


@pytest.mark.parametrize("language", ["python fragment", "js"])
async def test_a_large_result_is_read_with_the_permissions_of_the_page(
    request: pytest.FixtureRequest, own_server: Callable[..., NatsProcess], tmp_path: Path, language: str
) -> None:
    command, cwd = command_of(request, language, tmp_path)
    text = re.search(r"restricted permissions\s+must\s+(.*?)\n\n", PAGE.read_text(), re.DOTALL)
    assert text is not None
    publish = [*re.findall(r"`(\$JS[^`]*)`", text[1]), "$JS.API.INFO", "$JS.API.DIRECT.GET.AI_RESULTS.>"]
    publish.append("$JS.API.DIRECT.GET.AI_RESULTS")  # of the journal
    reads = {"user": "u", "password": "p", "permissions": {"publish": publish, "subscribe": ["_INBOX.>"]}}
    server = own_server(f"authorization {{ users: [ {{ user: all, password: p }}, {json.dumps(reads)} ] }}")
    worker = aiqueue.Worker()

    @worker.handle(Ask)
    async def answer(job: aiqueue.Job[Ask]) -> dict[str, Any]:
        return {"said": "x" * 600_000}

    async with aiqueue.connect(server.url, user="all", password="p") as client:
        await provision.apply(client.connection, client.topology)
        async with worker.running(client):
            await (await client.enqueue(Ask(text=""), tenant="acme", unique="large")).result(timeout=30)
    (code,) = [each for each in programs(language) if "Aiq-Document" in each]
    assert "600000" in await run(command, code, Account(server.url, "u", "p"), cwd)
