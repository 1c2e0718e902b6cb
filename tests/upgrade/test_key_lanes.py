"""Workers of a former version beside a family with limits: they know neither limits nor the lanes of limited keys.
Nothing is lost, doubled or stuck.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import subjects
from aiqueue.topology import provision

from ..support import eventually
from .former import Versions

FORMER = """
    [family]
    name = "test.limited"
    default_kind = "call"
    [stream]
    name = "TEST_LIMITED"
    max_bytes = "64MiB"
    [consumer]
    ack_wait = "20s"
    """
STREAM = FORMER.replace("[stream]", 'limit_key = "model"\n    [stream]')
RULES = '[[limit]]\nfamily = "test.limited"\nkey = "m*"\nrequests = 10_000\nwindow = "1s"\n'

APP = """
    import contextlib, os
    import aiqueue

    LOG = os.open(os.environ["JOB_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    FORMER = not hasattr(aiqueue.Job, "step")

    def log(*words):
        os.write(LOG, (" ".join(map(str, words)) + "\\n").encode())

    class Call(aiqueue.Message, kind="call", family="test.limited"):
        n: int
        model: str = ""

    @contextlib.asynccontextmanager
    async def lifespan():
        log("works", os.getpid())
        yield None

    worker = aiqueue.Worker(concurrency=4, lifespan=lifespan)

    @worker.handle(Call)
    async def call(job):
        log("call", job.message.n, "former" if FORMER else "new")
        return job.message.n
    """


class Call(aiqueue.Message, kind="call", family="test.limited"):
    n: int
    model: str = ""


@pytest.fixture
def versions(tmp_path: Path, former: Path, account: Any) -> Iterator[Versions]:
    made = Versions(tmp_path, former, account, app=APP, stream=STREAM, former_stream=FORMER)
    (made.streams / "limits.toml").write_text(RULES)
    yield made
    made.end()


@pytest.fixture
async def client(versions: Versions, account: Any) -> AsyncIterator[aiqueue.Client]:
    options = {"user": account.user, "password": account.password, "streams": versions.streams}
    async with aiqueue.connect(account.url, **options) as client:
        await provision.apply(client.connection, client.topology)
        yield client


async def look(client: aiqueue.Client) -> str:
    """Have the producer look for rules, stream and workers. Returns the key of the lane it uses."""
    client.key_lanes._valid_until = 0.0
    return await client.key_lanes.find_token(client.topology.family("test.limited"), "acme", "m1")


async def start(versions: Versions, *, former: bool) -> Any:
    worker = versions.start_worker(former=former)
    await eventually(lambda: versions.works(worker) or worker.poll() is not None)
    assert worker.poll() is None, versions.errors()
    return worker


async def produce(client: aiqueue.Client, first: int, count: int) -> list[aiqueue.Handle]:
    jobs = [Call(n=n, model=f"m{n % 3}" if n % 4 else "free") for n in range(first, first + count)]
    return [each async for each in client.enqueue_many(jobs, tenant="acme") if isinstance(each, aiqueue.Handle)]


async def results(handles: list[aiqueue.Handle]) -> list[Any]:
    return await asyncio.gather(*(each.result(timeout=40) for each in handles))


async def waiting(client: aiqueue.Client) -> Counter[bool]:
    """How many jobs wait in lanes of keys (True), and in others."""
    info = await client.connection.api("STREAM.INFO.TEST_LIMITED", {"subjects_filter": ">"})
    found: Counter[bool] = Counter()
    for subject, count in (info["state"].get("subjects") or {}).items():
        lane = subjects.parse_lane(subject)
        found[bool(lane is not None and lane.key)] += count
    return found


async def none_waits(client: aiqueue.Client) -> bool:
    return not await waiting(client)


async def test_workers_of_both_versions_share_the_jobs_of_a_limited_family(
    client: aiqueue.Client, versions: Versions
) -> None:
    assert await look(client)
    handles = await produce(client, 0, 40)
    assert await waiting(client) == {True: 30, False: 10}
    former = await start(versions, former=True)
    await eventually(lambda: len(versions.lines("call")) == 10)  # the former worker runs the others
    assert await look(client) == ""  # it alone would leave jobs in lanes of keys
    handles += await produce(client, 40, 40)
    await eventually(lambda: len(versions.lines("call")) == 50)
    assert await waiting(client) == {True: 30}
    new = await start(versions, former=False)
    assert await results(handles) == [*range(80)]
    assert await look(client)  # the new one serves them
    handles = await produce(client, 80, 80)
    assert await results(handles) == [*range(80, 160)]
    await eventually(lambda: none_waits(client))  # a result is there before its job is acknowledged
    versions.kill(new)
    versions.kill(former)
    runs = Counter(int(n) for n, _ in versions.lines("call"))
    assert runs == dict.fromkeys(range(160), 1)
    assert {version for _, version in versions.lines("call")} == {"former", "new"}


async def test_an_apply_of_the_former_version_strands_no_job(client: aiqueue.Client, versions: Versions) -> None:
    assert await look(client)
    handles = await produce(client, 0, 8)
    assert (await waiting(client))[True] == 6
    refused = versions.start("-m", "aiqueue", "apply", former=True)
    assert await asyncio.to_thread(refused.wait, 60) != 0
    versions.alive.remove(refused)
    assert "6 messages wait on ai.test.limited.*.normal.*" in versions.errors()
    new = await start(versions, former=False)
    assert await results(handles) == [*range(8)]
    await eventually(lambda: none_waits(client))
    versions.kill(new)
    await asyncio.to_thread(versions.run, "-m", "aiqueue", "apply", former=True)
    subjects_now = (await client.connection.api("STREAM.INFO.TEST_LIMITED"))["config"]["subjects"]
    assert not [each for each in subjects_now if each.count(".") == 5]
    handles = await produce(client, 8, 8)  # the producer has not looked since
    assert await waiting(client) == {False: 8}
    await start(versions, former=False)
    assert await results(handles) == [*range(8, 16)]
    await provision.apply(client.connection, client.topology)
    assert await look(client)
    assert await results(await produce(client, 16, 8)) == [*range(16, 24)]
    assert Counter(int(n) for n, _ in versions.lines("call")) == dict.fromkeys(range(24), 1)
