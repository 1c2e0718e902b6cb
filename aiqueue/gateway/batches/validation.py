"""Checks a batch before it begins: what its lines say, how many there are, and whether the budget has room for them."""

from __future__ import annotations

import asyncio
import hashlib
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Final, NamedTuple

from ...errors import BadInput, Corrupt, NotFound, QueueFull
from ..budgets import BudgetSpent
from .lines import BatchLine, RawLine, RefusedLine, make_request, parse_line, split_lines
from .model import LineProblem, RequestBatch

if TYPE_CHECKING:
    from ..runtime import Runtime
    from .run import BatchRun

PROBLEMS_MAX: Final = 50
PAUSE_S: Final = 0.01  # after which others get a turn on the event loop
IN_THREAD_BYTES: Final = 64 * 1024


class Validated(NamedTuple):
    """What a batch asks for. `bound_micros`: what its lines can cost at most, reserved in `month`; "": in no budget."""

    total: int
    problems: tuple[LineProblem, ...] = ()
    bound_micros: int = 0
    month: str = ""


async def validate(run: BatchRun) -> Validated:
    """Read the input once, and reserve the budget for all of its lines. Ends early if the batch is stopped."""
    batch, quotas = run.batch, run.quotas
    problems: list[LineProblem] = []
    known: set[bytes] = set()
    total = bound = 0
    turn_at = time.monotonic()
    chunks = run.job.open(batch.document).__aiter__()
    try:
        async with aclosing(chunks):  # type: ignore[type-var]  # it is a generator
            async for raw in split_lines(chunks):
                if run.stop or run.stopping.is_set() or len(problems) >= PROBLEMS_MAX:
                    break
                total += 1
                if total > quotas.lines:
                    problems.append(LineProblem("too_many_tasks", f"a batch has at most {quotas.lines:,} lines"))
                    break
                try:
                    line, micros = await _check(raw, batch, run.runtime)
                except RefusedLine as error:
                    problems.append(error.problem)
                    continue
                bound += micros
                digest = hashlib.sha256(line.custom_id.encode()).digest()[:16]
                if digest in known:
                    text = f"line {raw.number} has the custom_id of an earlier line: {line.custom_id[:80]}"
                    problems.append(LineProblem("duplicate_custom_id", text, raw.number, "custom_id"))
                known.add(digest)
                if time.monotonic() - turn_at > PAUSE_S:
                    await asyncio.sleep(0)
                    turn_at = time.monotonic()
    except (NotFound, Corrupt) as error:
        problems.append(LineProblem("input_file_unreadable", str(error)[:500]))
    if not total and not problems and not run.stop:
        problems.append(LineProblem("empty_file", "the input file has no line"))
    if problems or run.stop or run.stopping.is_set():
        return Validated(total, tuple(problems))
    return await _reserve(run, total, bound)


async def _check(raw: RawLine, batch: RequestBatch, runtime: Runtime) -> tuple[BatchLine, int]:
    if raw.data is not None and len(raw.data) > IN_THREAD_BYTES:
        return await asyncio.to_thread(_check_now, raw, batch, runtime)
    return _check_now(raw, batch, runtime)


def _check_now(raw: RawLine, batch: RequestBatch, runtime: Runtime) -> tuple[BatchLine, int]:
    """Return a line, and what it can cost at most: nothing, if it will be refused, or the price is not known."""
    line = parse_line(raw, batch.endpoint)
    try:
        request = make_request(line, batch.endpoint)
        plan = runtime.plan(request, request.model, batch.tenant)
    except BadInput:
        return line, 0
    return line, plan.bound_micros or 0


async def _reserve(run: BatchRun, total: int, bound: int) -> Validated:
    """Reserve for all lines together. Each line's call is then taken from that."""
    batch, runtime = run.batch, run.runtime
    key = await runtime.api_keys.key_of(batch.tenant, batch.headers)
    of_key = key.budget if key is not None else None
    try:
        reserved = await runtime.budgets.reserve(batch.tenant, batch.id, bound, of_key=of_key)
    except (BudgetSpent, QueueFull) as error:
        return Validated(total, (LineProblem("insufficient_quota", str(error)),))
    return Validated(total, (), bound, "" if reserved is None else reserved.month)
