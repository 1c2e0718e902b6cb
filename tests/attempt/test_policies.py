"""What an error of a class means: `on`, of a handler."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import attempt, headers
from aiqueue.attempt import Raised, Refused
from aiqueue.attempt.handler_errors import RETRY_AFTER_MAX_S
from aiqueue.connection import Stored
from aiqueue.enqueue import parking
from aiqueue.errors import BadInput

from ..support import eventually

pytestmark = pytest.mark.families("agent.tasks")


class Task(aiqueue.Message, kind="policies"):
    what: str = ""


class Busy(Exception):
    def __init__(self, after: Any) -> None:
        super().__init__("busy")
        self.after = after


class VeryBusy(Busy): ...


SLOW = aiqueue.Backoff(attempts=9, first="30s")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("x"), Refused("rejected", "ValueError: x", "T")),
        (UnicodeDecodeError("utf-8", b"", 0, 1, "r"), Refused("rejected", "UnicodeDecodeError", "T")),
        (KeyError("k"), Raised("KeyError: 'k'", "T", None, 1)),
        (IndexError("i"), Raised("IndexError: i", "T")),
        (Busy("30s"), Raised("Busy: busy", "T", 30.0, 2)),
        (VeryBusy(2), Raised("VeryBusy: busy", "T", 2.0, 2)),
        (Busy(None), Raised("Busy: busy", "T", None, 2)),
        (Busy("10000h"), Raised("Busy: busy", "T", RETRY_AFTER_MAX_S, 2)),
        (aiqueue.Retry("r", after=3), Raised("r", "", 3.0)),
        (aiqueue.Reject("no"), Refused("rejected", "no")),
    ],
)
def test_the_nearest_class_of_an_error_decides(error: Exception, expected: Any) -> None:
    outcome = attempt.outcome_of_error(
        error, {ValueError: aiqueue.Reject, KeyError: SLOW, Busy: lambda each: each.after}
    )
    assert type(outcome) is type(expected)
    assert isinstance(outcome, Raised | Refused)
    assert outcome.error.startswith(expected.error)
    assert bool(outcome.trace) == bool(expected.trace)
    if isinstance(outcome, Raised):
        assert (outcome.after_s, outcome.rule) == (expected.after_s, expected.rule)
        assert attempt.outcome_from_plain(attempt.outcome_to_plain(outcome)) == outcome, "it crosses a pipe"


@pytest.mark.parametrize("after", ["soon", -1, object(), float("nan")])
def test_a_policy_that_fails_leaves_the_error_to_the_handlers_own_backoff(after: Any) -> None:
    outcome = attempt.outcome_of_error(Busy(after), {Busy: lambda each: each.after})
    assert isinstance(outcome, Raised)
    assert outcome.after_s is None
    assert "its policy in `on` raised" in outcome.error


def test_of_a_class_and_its_base_the_nearer_one_counts_whatever_their_order() -> None:
    handler = attempt.Handler(
        Task, print, False, aiqueue.Backoff(), None, True, on={Exception: aiqueue.Reject, KeyError: SLOW}
    )
    outcome = attempt.outcome_of_error(KeyError("k"), handler.on)
    assert isinstance(outcome, Raised)
    assert handler.backoff(outcome.rule) is SLOW
    assert handler.backoff(None) is handler.retry
    assert isinstance(attempt.outcome_of_error(OSError(), handler.on), Refused)


@pytest.mark.parametrize(
    "on",
    [
        {ValueError: aiqueue.Retry},
        {ValueError: "reject"},
        {ValueError: KeyError},
        {BaseException: aiqueue.Reject},
        {"ValueError": aiqueue.Reject},
        {aiqueue.Reject: SLOW},
    ],
)
def test_what_is_no_policy_is_refused_when_the_handler_is_registered(on: Any) -> None:
    with pytest.raises(BadInput, match="on: "):
        aiqueue.Worker().handle(Task, on=on)


async def test_errors_end_or_wait_by_their_class(client: aiqueue.Client) -> None:
    worker, ran = aiqueue.Worker(), []
    fast = aiqueue.Backoff(attempts=2, first="10ms", cap="10ms")

    @worker.handle(Task, on={ValueError: aiqueue.Reject, KeyError: fast, Busy: lambda error: error.after})
    async def run(job: aiqueue.Job[Task]) -> str:
        ran.append((job.message.what, time.monotonic()))
        match job.message.what:
            case "value":
                raise ValueError("never")
            case "key":
                raise KeyError("twice")
            case "busy" if job.attempt == 1:
                raise Busy(0.2)
        return "done"

    async with worker.running(client):
        handles = {what: await client.enqueue(Task(what=what), tenant="acme") for what in ("value", "key", "busy")}
        with pytest.raises(aiqueue.JobFailed, match=r"rejected.*ValueError: never"):
            await handles["value"].result(timeout=25)
        with pytest.raises(aiqueue.JobFailed, match=r"attempt 2 \(attempts\)"):
            await handles["key"].result(timeout=25)
        assert await handles["busy"].result(timeout=25) == "done"
    times = [at for what, at in ran if what == "busy"]
    assert times[1] - times[0] >= 0.2
    letters = {each.job_id: each async for each in client.dead.find()}
    assert "ValueError: never" in letters[handles["value"].id].history[0]["traceback"]


CHILD = """
    import asyncio, sys
    import aiqueue
    from aiqueue.topology import provision

    class Task(aiqueue.Message, kind="policies"):
        what: str = ""

    class Busy(Exception):
        after = 0.05

    worker = aiqueue.Worker(processes=1)

    @worker.handle(Task, process=True, on={ValueError: aiqueue.Reject, Busy: lambda error: error.after})
    def run(job: aiqueue.Job[Task]) -> str:
        if job.message.what == "value":
            raise ValueError("never")
        if job.attempt == 1:
            raise Busy
        return "done"

    async def main() -> None:
        async with aiqueue.connect(sys.argv[1], user=sys.argv[2], password=sys.argv[3]) as client:
            await provision.apply(client.connection, client.topology)
            async with worker.running(client):
                busy = await client.enqueue(Task(), tenant="acme")
                value = await client.enqueue(Task(what="value"), tenant="acme")
                print(await busy.result(timeout=20))
                try:
                    await value.result(timeout=20)
                except aiqueue.JobFailed as error:
                    print(error.reason, error.attempt)

    if __name__ == "__main__":
        asyncio.run(main())
    """


def test_policies_hold_in_child_processes(account: Any, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(textwrap.dedent(CHILD))
    ended = subprocess.run(
        [sys.executable, "app.py", account.url, account.user, account.password],
        check=False, cwd=tmp_path, capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    assert ended.stdout.split("\n")[:2] == ["done", "rejected 1"], ended.stderr


async def test_policies_in_a_child_need_a_worker_that_it_can_find(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Task, process=True, on={ValueError: aiqueue.Reject})
    def run(job: aiqueue.Job[Task]) -> None: ...

    with pytest.raises(BadInput):
        async with worker.running(client):
            await asyncio.sleep(0)


async def test_a_retry_that_would_come_after_the_deadline_ends_the_job_at_once(client: aiqueue.Client) -> None:
    worker, ran = aiqueue.Worker(), []

    @worker.handle(Task)
    async def run(job: aiqueue.Job[Task]) -> None:
        ran.append(job.attempt)
        raise aiqueue.Retry("busy", after=0.05 if job.attempt == 1 else "1h")

    async with worker.running(client):
        handle = await client.enqueue(Task(), tenant="acme", deadline="10m")
        with pytest.raises(aiqueue.JobFailed, match=r"attempt 2 \(deadline\): busy \(the retry in 3600\.0 s"):
            await handle.result(timeout=25)
    (letter,) = [each async for each in client.dead.find()]
    assert (letter.reason, ran, len(letter.history)) == ("deadline", [1, 2], 2)
    info = await client.connection.api("STREAM.INFO.AI_PARKED")
    assert info["state"]["messages"] == 0


async def test_a_job_whose_deadline_passes_while_it_waits_for_its_next_attempt_is_not_run(
    client: aiqueue.Client,
) -> None:
    worker, ran = aiqueue.Worker(), []

    @worker.handle(Task)
    async def run(job: aiqueue.Job[Task]) -> None:
        ran.append(job.attempt)
        raise aiqueue.Retry("busy", after=20)

    async with worker.running(client):
        handle = await client.enqueue(Task(), tenant="acme", deadline=60)
        await eventually(lambda: ran)
        stored = await eventually(lambda: _parked(client))
        assert isinstance(stored, Stored)
        await client.connection.api("STREAM.PURGE.AI_PARKED", {"filter": stored.subject})
        late_headers = {**headers.carried(stored.headers, ours=True), headers.DEADLINE: "1"}
        waiting = parking.parse_parked_job(stored)
        assert waiting is not None
        lane = waiting.subject.lane
        await parking.Parking(client.connection, client.topology).park(
            lane, handle.id, time.time(), late_headers, stored.data, dedup_key="late"
        )
        with pytest.raises(aiqueue.JobFailed, match=r"\(deadline\): its deadline passed before it was run"):
            await handle.result(timeout=25)
    assert ran == [1]


async def _parked(client: aiqueue.Client) -> Stored:
    found = [each async for each in client.connection.read("AI_PARKED", "ai.parked.at.>")]
    assert found, "nothing is parked"
    return found[0]
