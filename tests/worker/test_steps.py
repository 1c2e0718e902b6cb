"""What a run keeps for its later attempts: steps and calls."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue.cli.timeline import describe_event
from aiqueue.errors import BadInput, EncodeError, JobFailed, Stale, TooLarge
from aiqueue.inspect import stats
from aiqueue.journal import ChildRecord
from aiqueue.journal import checkpoints as kept_by_run
from aiqueue.worker import settlement

from ..support import eventually
from . import stepping
from .stepping import FAST, STREAM, Point, Walk, checkpoints, note, noted

pytestmark = pytest.mark.families("agent.tasks")
RESULT = [[{"n": 0}, {"n": 1}, {"n": 2}], []]


async def kept(client: aiqueue.Client) -> int:
    info = await client.connection.api(f"STREAM.INFO.{STREAM}")
    return int(info["state"]["messages"])


async def nothing_kept(client: aiqueue.Client) -> None:
    async def empty() -> bool:
        return await kept(client) == 0

    await eventually(empty)


async def run(client: aiqueue.Client, call: Callable[..., Any], message: Any, **options: Any) -> Any:
    """Return the result of one job."""
    worker = aiqueue.Worker(concurrency=4)
    worker.handle(type(message), retry=FAST, **options)(call)
    async with worker.running(client):
        handle = await client.enqueue(message, tenant="acme")
        return await handle.result(timeout=30)


@pytest.mark.parametrize(
    ("call", "options"),
    [
        (stepping.walk, {}),
        (stepping.walk_by_plain_steps, {}),
        (stepping.walk_sync, {}),
        (stepping.walk, {"process": True}),
        (stepping.walk_sync, {"process": True}),
    ],
)
async def test_a_step_that_was_kept_is_not_called_again_by_the_next_attempt(
    client: aiqueue.Client, tmp_path: Path, call: Callable[..., Any], options: dict[str, Any]
) -> None:
    log = str(tmp_path / "log")
    assert await run(client, call, Walk(log=log, ends_at=3), **options) == RESULT
    assert noted(log) == ["step 0", "step 1", "step 2"]
    await nothing_kept(client)


async def test_a_run_without_a_result_deletes_what_it_has_kept_too(client: aiqueue.Client, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    worker = aiqueue.Worker()
    worker.handle(Walk, retry=FAST, result=False)(stepping.walk)
    async with worker.running(client):
        await client.enqueue(Walk(log=log, ends_at=2), tenant="acme")
        await eventually(lambda: len(noted(log)) == 3)
        await nothing_kept(client)


async def test_a_step_that_raises_keeps_nothing_and_runs_again(client: aiqueue.Client, tmp_path: Path) -> None:
    log = str(tmp_path / "log")

    async def breaks_once() -> str:
        note(log, "called")
        if len(noted(log)) == 1:
            raise ValueError("broken")
        return "whole"

    async def handler(job: aiqueue.Job[Walk]) -> Any:
        return await job.step("s", breaks_once)

    assert await run(client, handler, Walk(log=log)) == "whole"
    assert len(noted(log)) == 2


async def test_a_step_returns_the_same_plain_data_the_first_time_and_later(
    client: aiqueue.Client, tmp_path: Path
) -> None:
    seen: list[Any] = []

    async def handler(job: aiqueue.Job[Walk]) -> None:
        seen.append(
            [
                await job.step("tuple", lambda: (1, 2)),
                await job.step("model", lambda: Point(x=1)),
                await job.step("typed", lambda: [Point(x=2)], returns=list[Point]),
            ]
        )
        if job.attempt == 1:
            raise ValueError("not yet")

    await run(client, handler, Walk(log=""))
    assert seen == [[[1, 2], {"x": 1}, [Point(x=2)]]] * 2


async def test_what_was_called_is_told_to_later_attempts_and_not_to_the_own(client: aiqueue.Client) -> None:
    seen: list[list[Any]] = []

    async def handler(job: aiqueue.Job[Walk]) -> None:
        seen.append(await job.calls())
        await job.called({"model": "m", "attempt": job.attempt})
        if job.attempt < 3:
            raise ValueError("not yet")

    await run(client, handler, Walk(log=""))
    assert seen == [
        [],
        [{"model": "m", "attempt": 1}],
        [{"model": "m", "attempt": 1}, {"model": "m", "attempt": 2}],
    ]


async def test_steps_outlive_parking_and_the_journal(
    client: aiqueue.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settlement, "PARK_AFTER_S", 0.01)
    log = str(tmp_path / "log")

    async def handler(job: aiqueue.Job[Walk]) -> Any:
        done = await stepping.walk(job) if job.attempt == 2 else None
        if done is None:
            await job.step("s-0", stepping.async_step, log, 0)
            await client.connection.api("STREAM.PURGE.AI_RESULTS")
            raise aiqueue.Retry(after=0.5)
        return done

    assert await run(client, handler, Walk(log=log)) == RESULT
    assert noted(log) == ["step 0", "step 1", "step 2"]


async def test_a_replayed_dead_letter_goes_on_from_its_steps_and_a_new_run_does_not(
    client: aiqueue.Client, tmp_path: Path
) -> None:
    log = str(tmp_path / "log")
    broken = [True]
    worker = aiqueue.Worker()

    @worker.handle(Walk, retry=aiqueue.Backoff(attempts=1))
    async def handler(job: aiqueue.Job[Walk]) -> Any:
        await job.step("s-0", stepping.async_step, log, 0)
        if broken:
            raise ValueError("broken")
        return job.attempt

    async with worker.running(client):
        handle = await client.enqueue(Walk(log=log), tenant="acme", unique="w")
        with pytest.raises(JobFailed):
            await handle.result(timeout=20)
        for replays, is_broken in ((0, True), (1, False)):
            await eventually(partial(replays_of_letters, client, [replays]))
            broken[:] = [True] if is_broken else []
            for letter in [each async for each in client.dead.find()]:
                await client.dead.replay(letter)
        await nothing_kept(client)
        assert noted(log) == ["step 0"]
        await (await client.enqueue(Walk(log=log), tenant="acme", unique="again")).result(timeout=20)
    assert noted(log) == ["step 0", "step 0"]


async def replays_of_letters(client: aiqueue.Client, wanted: list[int]) -> bool:
    return [each.replays async for each in client.dead.find()] == wanted


async def test_misuse_of_steps_is_refused_with_what_to_do(client: aiqueue.Client) -> None:
    errors: dict[str, BadInput] = {}

    async def handler(job: aiqueue.Job[Walk]) -> None:
        async def nested() -> None:
            await job.step("inner", nested)

        async def chunks() -> None:
            await job.chunk("x")

        await job.step("a", asyncio.sleep, 0)
        for name, attempt in {
            "twice": lambda: job.step("a", asyncio.sleep, 0),
            "name": lambda: job.step("line\nbreak", asyncio.sleep, 0),
            "empty": lambda: job.step("", asyncio.sleep, 0),
            "coroutine": lambda: job.step("c", 7),  # type: ignore[arg-type]
            "nested": lambda: job.step("n", nested),
            "chunk": lambda: job.step("k", chunks),
            "object": lambda: job.step("s", lambda: {"nested": object()}),
            "call": lambda: job.called("x" * 70_000),
            "blocks": lambda: asyncio.sleep(0, job.step_sync("b", len, "")),
            "concurrency": lambda: job.steps("p", [1], len, concurrency=0),
        }.items():
            with pytest.raises(BadInput) as caught:
                await attempt()
            errors[name] = caught.value

    await run(client, handler, Walk(log=""))
    assert isinstance(errors["object"], EncodeError)
    assert isinstance(errors["call"], TooLarge)
    texts = {name: str(error) for name, error in errors.items()}
    assert "number the steps of a loop" in texts["twice"]
    assert "the result of step 's' cannot be kept: a object cannot be encoded as CBOR" in texts["object"]
    assert "printable" in texts["name"]
    assert "printable" in texts["empty"]
    assert "pass the function" in texts["coroutine"]
    assert "within step 'n'" in texts["nested"]
    assert "within step 'k'" in texts["chunk"]
    assert "`step` and not `step_sync`" in texts["blocks"]


async def test_a_run_has_at_most_two_thousand_steps(client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiqueue.journal.checkpoints.STEPS_MAX", 3)

    async def handler(job: aiqueue.Job[Walk]) -> str:
        with pytest.raises(BadInput, match="at most 3 steps"):
            await job.steps("p", range(4), str)
        return "ended"

    assert await run(client, handler, Walk(log="")) == "ended"


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_steps_of_a_loop_return_in_order_and_report_progress(client: aiqueue.Client, concurrency: int) -> None:
    async def twice(n: int) -> int:
        await asyncio.sleep(0.01 * (n % 3))
        return 2 * n

    async def handler(job: aiqueue.Job[Walk]) -> Any:
        return await job.steps("p", range(20), twice, concurrency=concurrency)

    assert await run(client, handler, Walk(log="")) == [2 * n for n in range(20)]
    stored = [each async for each in client.connection.read("AI_RESULTS", ">")]
    assert [each for each in stored if each.headers["Aiq-Event"] == "progress"]


async def test_a_loop_whose_step_fails_starts_no_further_step(client: aiqueue.Client) -> None:
    ran: list[int] = []

    async def handler(job: aiqueue.Job[Walk]) -> Any:
        async def one(n: int) -> None:
            ran.append(n)
            if n == 3 and job.attempt == 1:
                raise ValueError("broken")

        await job.steps("p", range(6), one)

    await run(client, handler, Walk(log=""))
    assert ran == [0, 1, 2, 3, 3, 4, 5]


@pytest.mark.parametrize(
    ("error", "text"), [(asyncio.CancelledError(), "cancelled from within"), (SystemExit(3), "raised SystemExit")]
)
@pytest.mark.parametrize("concurrency", [1, 2])
async def test_a_loop_whose_step_is_cancelled_or_exits_fails_and_starts_no_further_step(
    client: aiqueue.Client, concurrency: int, error: BaseException, text: str
) -> None:
    """A task group takes no notice of a cancellation from within, and lets an exit end the worker."""
    called: list[int] = []

    async def step(item: int) -> int:
        called.append(item)
        await asyncio.sleep(0)
        if item == 1:
            raise error
        return item

    async def handler(job: aiqueue.Job[Walk]) -> Any:
        return await job.steps("s", range(20), step, concurrency=concurrency)

    worker = aiqueue.Worker()
    worker.handle(Walk, retry=aiqueue.Backoff(attempts=1))(handler)
    async with worker.running(client):
        handle = await client.enqueue(Walk(log=""), tenant="acme")
        with pytest.raises(JobFailed, match=text):
            await handle.result(timeout=20)
    assert len(called) <= 1 + 2 * concurrency


async def test_a_job_whose_lane_was_idle_for_long_goes_on_from_its_steps_and_notes(
    client: aiqueue.Client, tmp_path: Path
) -> None:
    """The server removes the consumer of a lane that nobody pulls from. The next one counts deliveries from 1."""
    log, seen = str(tmp_path / "log"), []

    async def handler(job: aiqueue.Job[Walk]) -> str:
        seen.append(await job.calls())
        await job.step("s", stepping.async_step, log, 0)
        await job.called({"run": len(seen)})
        if len(seen) == 1:
            await asyncio.Event().wait()
        return "ended"

    worker = aiqueue.Worker(drain_timeout=0.05)
    worker.handle(Walk)(handler)
    async with worker.running(client):
        handle = await client.enqueue(Walk(log=log), tenant="acme")

        async def is_noted() -> bool:
            read = client.connection.read(STREAM, ">")
            return "called" in [each.headers["Aiq-Event"] async for each in read]

        await eventually(is_noted)
    await client.connection.api("CONSUMER.DELETE.AI_AGENT_TASKS.acme-normal")
    async with worker.running(client):
        assert await handle.result(timeout=20) == "ended"
    assert seen == [[], [{"run": 1}]]
    assert noted(log) == ["step 0"]


async def test_inspect_shows_what_a_job_that_waits_has_kept(client: aiqueue.Client, tmp_path: Path) -> None:
    log = str(tmp_path / "log")

    async def handler(job: aiqueue.Job[Walk]) -> None:
        await job.steps("s", range(12), str)
        await job.called({"model": "m"})
        raise aiqueue.Retry(after=600)

    worker = aiqueue.Worker()
    worker.handle(Walk, retry=FAST)(handler)
    async with worker.running(client):
        handle = await client.enqueue(Walk(log=log), tenant="acme")

        async def parked() -> bool:
            return (await handle.status()).state in ("parked", "retrying")

        await eventually(parked)
    timeline = (await stats.job(client.connection, client.topology, handle.id)).timeline
    shown = {each.event: (each.count, describe_event(each).split(" ", 2)[0]) for each in timeline}
    assert shown["step"] == (12, "12")
    assert shown["called"] == (1, '{"model":"m"}')
    assert [describe_event(each).rsplit(": ")[-1] for each in timeline if each.event == "step"] == ["s-11"]


# -- who may write


async def test_an_attempt_that_was_taken_over_can_keep_nothing(client: aiqueue.Client) -> None:
    old, new = checkpoints(client, [1, 1, 1], has_past=False), checkpoints(client, [1, 1, 2], has_past=True)
    await old.keep_step("a", 1)
    assert await new.find_step("a") == (1,)
    with pytest.raises(Stale):
        await old.keep_step("b", 1)
    with pytest.raises(Stale):
        await old.keep_call("c")
    assert await new.find_step("b") is None
    assert await new.keep_step("b", 2) == 2
    newest = checkpoints(client, [1, 1, 3], has_past=True)
    assert [await newest.find_step(name) for name in "ab"] == [(1,), (2,)]
    assert await newest.earlier_calls() == []


async def test_an_older_attempt_that_looks_after_a_newer_one_is_stale(client: aiqueue.Client) -> None:
    old, new = checkpoints(client, [1, 1, 2], has_past=True), checkpoints(client, [1, 1, 3], has_past=True)
    await new.find_step("a")
    with pytest.raises(Stale):
        await old.find_step("a")


async def test_a_first_attempt_that_finds_a_past_goes_on_from_it(client: aiqueue.Client) -> None:
    """A consumer that was made anew counts deliveries from 1: an attempt that takes itself for the first is not."""
    old, new = checkpoints(client, [1, 1, 1], has_past=False), checkpoints(client, [1, 2, 1], has_past=False)
    await old.keep_step("a", "old")
    assert await new.find_step("a") is None
    assert await new.keep_step("a", "new") == "old", "one result of a step is kept"
    with pytest.raises(Stale):
        await old.keep_step("b", "old")
    assert await new.keep_step("b", "new") == "new"


async def test_a_run_keeps_so_many_notes_and_drops_none(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them would push the first steps out of the stream, which keeps 10,000 entries of a run."""
    monkeypatch.setattr(kept_by_run, "CALLS_MAX", 3)
    old, new = checkpoints(client, [1, 1, 1], has_past=False), checkpoints(client, [1, 1, 2], has_past=True)
    await old.keep_call(0)
    await new.keep_call(1)
    await new.keep_call(2)
    with pytest.raises(BadInput, match="at most 3 notes"):
        await new.keep_call(3)
    assert await checkpoints(client, [1, 1, 3], has_past=True).earlier_calls() == [0, 1, 2]


async def test_children_that_another_attempt_has_kept_stay_as_they_are(client: aiqueue.Client) -> None:
    old, new = checkpoints(client, [1, 1, 1], has_past=False), checkpoints(client, [1, 2, 1], has_past=False)
    await old.keep_children([ChildRecord("a", "a-1", "agent.tasks", "page", "normal")])
    again = [ChildRecord(name, f"{name}-1", "agent.tasks", "page", "normal", noted_at=5.0) for name in "ab"]
    await new.keep_children(again)
    assert new.children["a"] is not again[0]
    assert new.children["a"].noted_at != 5.0
    assert new.children["b"] is again[1]


async def test_a_step_whose_ack_was_lost_is_kept_once(client: aiqueue.Client) -> None:
    one = checkpoints(client, [1, 1, 1], has_past=False)
    await one.keep_step("a", 1)
    one._head_seq, one._write_number = 0, one._write_number - 1  # as if nothing had been heard of it
    one._steps.clear()
    assert await one.keep_step("a", 1) == 1
    assert await kept(client) == 1


async def test_steps_of_many_tasks_at_once_are_all_kept(client: aiqueue.Client) -> None:
    one = checkpoints(client, [1, 1, 1], has_past=False)
    await asyncio.gather(*(one.keep_step(f"s{n}", n) for n in range(100)))
    later = checkpoints(client, [1, 1, 2], has_past=True)
    assert [await later.find_step(f"s{n}") for n in range(100)] == [(n,) for n in range(100)]
