"""Inputs that mean harm: their batch ends with what is wrong, and nobody else waits for it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiqueue
from aiqueue.gateway import Batches
from aiqueue.gateway.batches.lines import split_lines

from ..running import running
from .lines import chat_line, create


async def test_a_field_whose_name_is_no_text_is_refused_and_its_batch_ends(
    client: aiqueue.Client, config: Path
) -> None:
    line = json.dumps({**chat_line(1), "\ud800": 1}).encode()
    batch = await create(client, line)
    async with running(client, config), asyncio.timeout(5):
        batch = await Batches(client).wait(batch.id, tenant="acme")
    assert batch.status == "failed"
    (problem,) = batch.problems
    assert (problem.code, problem.line, problem.param) == ("unknown_parameter", 1, "?")


async def test_millions_of_blank_lines_are_passed_over_in_no_time_and_counted() -> None:
    blank = b"\n" * 1_000_000 + b" \r\n" * 300_000

    async def chunks() -> AsyncIterator[bytes]:
        yield blank + b"one"
        yield b"\n" + blank
        yield b"  \n  two"

    begun = time.process_time()
    found = [(each.number, each.data) async for each in split_lines(chunks())]
    assert time.process_time() - begun < 0.5  # 5 s, each line by itself
    assert found == [(1_300_001, b"one\n"), (2_600_003, b"  two")]
