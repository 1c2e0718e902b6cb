"""Steps whose results are stored as documents: kept for later attempts, and gone with their run."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue.cli.timeline import describe_event
from aiqueue.client import Client
from aiqueue.documents import Collector
from aiqueue.documents.holds import STEP
from aiqueue.errors import AccessDenied, BadInput, Corrupt, NotFound, QueueFull, Stale
from aiqueue.inspect import stats

from ..connection.test_permissions import two, users
from ..support import NatsProcess, create_streams, eventually
from . import stepping
from .stepping import FAST, STREAM, Large, checkpoints, noted

pytestmark = pytest.mark.families("agent.tasks")
DOCUMENTS = "OBJ_AI_DOCUMENTS"
TEXT = "x" * 100_000


async def holds(client: Client) -> list[str]:
    """The names of the holds of steps."""
    return [hold.ref async for hold, _, _ in client.documents.list_holds() if hold.by == STEP]


async def stored(client: Client) -> list[str]:
    """The hashes of the stored documents."""
    return [each.document.sha256 async for each in client.documents.find()]


async def nothing_left(client: Client) -> None:
    async def empty() -> bool:
        entries = (await client.connection.api(f"STREAM.INFO.{STREAM}"))["state"]["messages"]
        return entries == 0 and not await holds(client) and not await stored(client)

    await eventually(empty)


async def chunks(client: Client) -> list[Any]:
    return [each async for each in client.connection.read(DOCUMENTS, client.documents.objects.subject("C", "*"))]


# -- kept, and gone with the run


@pytest.mark.parametrize(
    ("call", "process", "size"),
    [
        (stepping.keep_large, False, 3_000_000),
        (stepping.keep_large_sync, False, 200_000),
        (stepping.keep_large, True, 65 << 20),
        (stepping.keep_large_sync, True, 200_000),
    ],
)
async def test_a_large_step_is_called_once_and_leaves_nothing_when_its_job_ends(
    client: Client, tmp_path: Path, call: Callable[..., Any], process: bool, size: int
) -> None:
    log = str(tmp_path / "log")
    worker = aiqueue.Worker(concurrency=4)
    worker.handle(Large, retry=FAST, process=process)(call)
    async with worker.running(client):
        handle = await client.enqueue(Large(log=log, size=size), tenant="acme")
        assert await handle.result(timeout=30) == size // 256 * 256
        await nothing_left(client)
    assert await chunks(client) == []
    got = f"got {hashlib.sha256(bytes(range(256)) * (size // 256)).hexdigest()} [1, 2]"
    assert noted(log) == ["large", got, got]


async def test_a_step_of_64_kib_is_in_its_entry_and_a_larger_one_is_a_reference(client: Client) -> None:
    one = checkpoints(client, [1, 1, 1], has_past=False)
    await one.keep_step("small", "x" * 65_000)
    await one.keep_step("large", TEXT)
    small, large = [each async for each in client.connection.read(STREAM, ">")]
    assert "Aiq-Document" not in small.headers
    assert len(large.data) < 400
    assert large.headers["Aiq-Document-Ref"].startswith("agent.tasks.j.1-1.")
    assert await holds(client) == [large.headers["Aiq-Document-Ref"]]


async def test_a_hold_of_a_step_expires_after_its_entry(client: Client) -> None:
    await checkpoints(client, [1, 1, 1], has_past=False).keep_step("large", TEXT)
    (hold,) = [each async for each in client.connection.read(DOCUMENTS, client.documents.objects.subject("R", ">"))]
    assert int(hold.headers["Nats-TTL"].removesuffix("s")) == 30 * 86_400 + 3_600
    collector = Collector(client.connection, client.topology)
    await collector.collect(grace_s=0.0)
    assert await checkpoints(client, [1, 1, 2], has_past=True).find_step("large") == (TEXT,)
    assert (await collector.collect(grace_s=0.0, aged_s=0.0)).holds == 0, "its entry is there"
    await client.connection.api(f"STREAM.PURGE.{STREAM}")
    assert (await collector.collect(grace_s=0.0, aged_s=0.0)).holds == 1


async def test_a_replay_goes_on_from_a_large_step_whose_document_then_goes(client: Client, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    worker = aiqueue.Worker()
    worker.handle(Large, retry=aiqueue.Backoff(attempts=1))(stepping.keep_large)
    async with worker.running(client):
        handle = await client.enqueue(Large(log=log, ends_at=1_000), tenant="acme")
        with pytest.raises(aiqueue.JobFailed):
            await handle.result(timeout=20)
        assert len(await holds(client)) == 1
        (letter,) = [each async for each in client.dead.find()]
        await client.dead.replay(letter)

        async def dead_again() -> bool:
            return [each.replays async for each in client.dead.find()] == [1]

        await eventually(dead_again)
        assert noted(log).count("large") == 1
        (letter,) = [each async for each in client.dead.find()]
        await client.dead.purge(letter)
        assert await holds(client) == []
        assert await stored(client) == []


async def test_a_job_that_is_cancelled_between_attempts_releases_its_large_steps(
    client: Client, tmp_path: Path
) -> None:
    async def handler(job: aiqueue.Job[Large]) -> None:
        await job.step("large", stepping.large_step, job.message.log, job.message.size)
        raise aiqueue.Retry(after=600)

    worker = aiqueue.Worker()
    worker.handle(Large, retry=FAST)(handler)
    async with worker.running(client):
        handle = await client.enqueue(Large(log=str(tmp_path / "log")), tenant="acme")

        async def parked() -> bool:
            return (await handle.status()).state in ("parked", "retrying")

        await eventually(parked)
        assert len(await holds(client)) == 1
        await handle.cancel()
    assert await holds(client) == []
    assert await stored(client) == []


async def test_a_job_that_is_cancelled_while_it_runs_releases_its_large_steps(client: Client, tmp_path: Path) -> None:
    has_kept = asyncio.Event()

    async def handler(job: aiqueue.Job[Large]) -> None:
        await job.step("large", stepping.large_step, job.message.log, job.message.size)
        has_kept.set()
        await asyncio.Event().wait()

    worker = aiqueue.Worker()
    worker.handle(Large)(handler)
    async with worker.running(client):
        handle = await client.enqueue(Large(log=str(tmp_path / "log")), tenant="acme")
        await has_kept.wait()
        await handle.cancel()
        await nothing_left(client)


# -- what is left behind


async def test_a_document_whose_entry_was_never_written_goes_with_its_run(client: Client) -> None:
    """As of a worker that was killed between the two."""
    killed, later = checkpoints(client, [1, 1, 1], has_past=False), checkpoints(client, [1, 1, 2], has_past=True)
    await killed._large.hold(TEXT.encode())
    assert await later.find_step("large") is None
    assert await later.keep_step("large", TEXT) == TEXT
    assert len(await holds(client)) == 2
    await later.forget()
    assert await holds(client) == []
    await Collector(client.connection, client.topology).collect(grace_s=0.0)
    assert await stored(client) == []


async def test_an_attempt_that_was_taken_over_keeps_no_document(client: Client) -> None:
    old, new = checkpoints(client, [1, 1, 1], has_past=False), checkpoints(client, [1, 1, 2], has_past=True)
    assert await new.find_step("large") is None
    with pytest.raises(Stale):
        await old.keep_step("large", TEXT)
    assert await holds(client) == []
    assert await stored(client) == []


async def test_of_two_attempts_that_ran_a_large_step_one_result_counts_and_the_other_goes(client: Client) -> None:
    """The newer one finds the older one's only when its own is refused: its consumer was made anew."""
    old, new = checkpoints(client, [1, 1, 1], has_past=False), checkpoints(client, [1, 2, 1], has_past=False)
    await old.keep_step("large", TEXT)
    assert await new.keep_step("large", "y" * 100_000) == TEXT
    assert len(await holds(client)) == 1
    assert await checkpoints(client, [1, 2, 2], has_past=True).find_step("large") == (TEXT,)


async def test_the_same_bytes_of_an_attempt_that_was_taken_over_stay_for_the_newer(client: Client) -> None:
    old, new = checkpoints(client, [1, 1, 1], has_past=False), checkpoints(client, [1, 1, 2], has_past=True)
    await new.load_past()
    await new.keep_step("large", TEXT)
    with pytest.raises(Stale):
        await old.keep_step("large", TEXT)
    assert await new.find_step("large") == (TEXT,)
    assert len(await holds(client)) == 1


# -- what cannot be kept or read


async def test_a_kept_step_whose_document_is_missing_or_damaged_is_an_error_and_never_other_data(
    client: Client,
) -> None:
    await checkpoints(client, [1, 1, 1], has_past=False).keep_step("large", TEXT)
    (chunk,) = await chunks(client)
    await client.connection.delete(DOCUMENTS, chunk.seq)
    await client.connection.store(chunk.subject, bytes(len(chunk.data)), {})
    later = checkpoints(client, [1, 1, 2], has_past=True)
    with pytest.raises(Corrupt, match=r"the kept result of step 'large' cannot be read: .*enqueue the job anew"):
        await later.find_step("large")
    await client.connection.api(f"STREAM.PURGE.{DOCUMENTS}")
    with pytest.raises(NotFound, match=r"the kept result of step 'large' cannot be read: .*enqueue the job anew"):
        await later.find_step("large")


async def test_a_large_step_without_space_says_what_to_do_and_leaves_nothing(client: Client) -> None:
    config = (await client.connection.api(f"STREAM.INFO.{DOCUMENTS}"))["config"]
    await client.connection.api(f"STREAM.UPDATE.{DOCUMENTS}", config | {"max_bytes": 50_000})
    one = checkpoints(client, [1, 1, 1], has_past=False)
    with pytest.raises(QueueFull, match=r"step 'large': its result of 100,\d+ bytes cannot be stored .*free space"):
        await one.keep_step("large", TEXT)
    assert await holds(client) == []
    assert await chunks(client) == []


async def test_a_large_step_with_claim_check_off_is_refused(account: Any) -> None:
    options = {"user": account.user, "password": account.password, "claim_check": 0}
    async with aiqueue.connect(account.url, **options) as client:
        await create_streams(client)
        with pytest.raises(BadInput, match=r"too large for a step while the setting claim_check is 0"):
            await checkpoints(client, [1, 1, 1], has_past=False).keep_step("large", TEXT)


async def test_a_large_step_of_a_worker_without_the_right_to_documents_names_the_subject(
    own_server: Callable[..., NatsProcess], tmp_path: Path
) -> None:
    server = own_server(users(publish=["$O.AI_DOCUMENTS.C.>"]))
    async with two(server) as (every, less):
        one = checkpoints(less, [1, 1, 1], has_past=False)
        with pytest.raises(
            AccessDenied, match=r"step 'large': .* \$O\.AI_DOCUMENTS\.C.*docs/operations/permissions\.md"
        ):
            await one.keep_step("large", TEXT)
        assert await holds(every) == []


# -- shown


async def test_inspect_shows_the_size_of_a_large_step_and_ls_its_hold(client: Client, tmp_path: Path) -> None:
    async def handler(job: aiqueue.Job[Large]) -> None:
        await job.step("large", stepping.large_step, job.message.log, job.message.size)
        raise aiqueue.Retry(after=600)

    worker = aiqueue.Worker()
    worker.handle(Large, retry=FAST)(handler)
    async with worker.running(client):
        handle = await client.enqueue(Large(log=str(tmp_path / "log")), tenant="acme")

        async def parked() -> bool:
            return (await handle.status()).state in ("parked", "retrying")

        await eventually(parked)
    timeline = (await stats.job(client.connection, client.topology, handle.id)).timeline
    assert [describe_event(each) for each in timeline if each.event == "step"] == [
        "large (195.3 KiB, stored as a document)"
    ]
    assert [each.steps async for each in client.documents.find()] == [1]
