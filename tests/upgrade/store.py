"""Makes the fixture: the store of a directory as commit eb423bd leaves it, and what that commit reads in it.

To make it anew, with a checkout of that commit at a place whose path may be read by everybody (tracebacks name it), and
an environment with its dependencies::

    git worktree add --detach /srv/aiqueue eb423bd
    cp -r tests/upgrade /srv/aiqueue/tests/
    cd /srv/aiqueue && PYTHONPATH=. python -m tests.upgrade.store

It writes ``eb423bd.tar.gz``, the directory's ``.aiqueue`` without logs and locks, and ``expected.json``, and takes two
minutes. No test runs it. What stands in a store by the clock is made to last: the three streams with a ``max_age``
that tests read have none here (the library leaves them so, for lowering it would delete messages), jobs are parked
until the next century or are due already, and holds of documents are put for a hundred years. ``state.json`` has the
port and the password of a server that listened on loopback only, and is no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import json
import signal
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import aiqueue
from aiqueue import producer  # only of that commit: a test does not import this module

from . import acts

COMMIT = "eb423bd"
FAR = 4_102_444_800.0  # 2100
AGELESS = ("AI_RESULTS", "AI_DEAD", "AI_AGENT_MESSAGE")
KEPT = ("state.json", "jetstream")


async def killed(directory: Path, family: str, tenant: str, *, times: int) -> None:
    """Have so many workers die of kill -9, one after the other, each while it runs a job of this family and tenant."""
    for _ in range(times):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.upgrade.store", str(directory), family, tenant, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        said = await asyncio.wait_for(process.stdout.readline(), 30)
        assert said, f"a worker of {family} died by itself"
        process.send_signal(signal.SIGKILL)
        await process.wait()


async def work(directory: Path, family: str, tenant: str) -> None:
    """One of those workers."""
    made = acts.worker(family, tenants=(tenant,), say=lambda job_id: print(job_id, flush=True))
    async with aiqueue.connect(directory=directory, streams=acts.STREAMS) as client, made.running(client):
        await asyncio.Event().wait()


async def unknown(client: aiqueue.Client) -> None:
    class Unknown(aiqueue.Message, kind="upgrade.unknown"):
        pass

    handle = await client.enqueue(Unknown(), tenant="acme", unique="task-unknown")
    async with acts.worker("agent.tasks").running(client):
        with contextlib.suppress(aiqueue.JobFailed):
            await handle.result(timeout=120)


async def stranded(client: aiqueue.Client, directory: Path) -> None:
    handle = await client.enqueue(acts.Brittle(), tenant="acme", unique="brittle-stranded")
    await killed(directory, "upgrade.brittle", "acme", times=1)
    async with acts.worker("upgrade.brittle").running(client):
        with contextlib.suppress(aiqueue.JobFailed):
            await handle.result(timeout=60)


async def store(directory: Path) -> dict[str, Any]:
    """Fill a directory. The configurations of its streams, as declared."""
    producer.DELAY_MAX_S = 200 * 365 * 86_400.0  # a year is too short here
    async with (
        aiqueue.connect(directory=directory, streams=acts.STREAMS) as client,
        acts.plain(directory) as connection,
    ):
        declared = await acts.configs(connection)
        await asyncio.gather(unknown(client), stranded(client, directory))
        await asyncio.gather(acts.ended(client, connection, far=FAR), acts.mailed(client, connection))
        await client.enqueue(acts.Act(do="wait"), tenant="acme", unique="act-killed")
        await client.enqueue(acts.Act(do="wait"), tenant="globex", unique="act-tried")
        await asyncio.gather(
            killed(directory, "upgrade.acts", "acme", times=1), killed(directory, "upgrade.acts", "globex", times=3)
        )
        await acts.waiting(client, connection)
        for name in AGELESS:  # now that they hold something, no client sets it again
            await acts.api(connection, f"STREAM.UPDATE.{name}", {**declared[name], "max_age": 0})
        await acts.overdue(client)
    await stopped(directory)
    return declared


async def stopped(directory: Path) -> None:
    await acts.until(lambda: not json.loads((directory / "state.json").read_text())["pid"])


def pack(directory: Path) -> bytes:
    packed = io.BytesIO()

    def plainly(each: tarfile.TarInfo) -> tarfile.TarInfo:
        each.uid = each.gid = 0
        each.uname = each.gname = ""
        return each

    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as tar:
        for name in KEPT:
            tar.add(directory / name, f".aiqueue/{name}", filter=plainly)
    return packed.getvalue()


@contextlib.asynccontextmanager
async def unpacked(packed: bytes) -> Any:
    with tempfile.TemporaryDirectory(prefix="aiqueue-upgrade-") as place:
        with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
            tar.extractall(place, filter="data")
        directory = Path(place) / ".aiqueue"
        async with aiqueue.connect(directory=directory, streams=acts.STREAMS) as client:
            yield client, directory
        await stopped(directory)


async def read(packed: bytes) -> dict[str, Any]:
    """What is read in the store once all that was due soon is due."""
    async with unpacked(packed) as (client, directory), acts.plain(directory) as connection:
        await acts.until(lambda: time.time() > (directory / "state.json").stat().st_mtime + 12)
        jobs = {}
        for job_id, (family, tenant) in (await acts.names(client, connection)).items():
            with contextlib.suppress(KeyError):  # of jobs in flight when the server stopped: that commit cannot tell
                jobs[job_id] = await acts.read_job(client, job_id, family, tenant)
        halves = ("act-killed", "act-tried", "task-retry-lane", "task-retry-parked")
        streams = {
            job_id: await acts.read_stream(client, job_id, each["family"], each["tenant"])
            for job_id, each in jobs.items()
            if each["state"] in ("done", "failed", "cancelled") and each["entries"]
        }
        stored = {stream: await acts.shapes(connection, stream) for stream in await acts.configs(connection)}
        return {
            "jobs": jobs,
            "streams": streams,
            "letters": await acts.read_letters(client),
            "mail": await acts.read_mail(client),
            "documents": await acts.read_documents(client),
            "stored": stored,
            "half_done": {job_id: await acts.journal(connection, job_id) for job_id in halves},
        }


async def run(packed: bytes) -> dict[str, Any]:
    """What this version's own worker makes of all that waits."""
    async with unpacked(packed) as (client, directory), acts.plain(directory) as connection:
        return await acts.run_all(client, connection)


def written(told: dict[str, Any]) -> str:
    """As JSON, with a line for each thing."""
    parts = []
    for what, things in sorted(told.items()):
        pairs = sorted(things.items()) if isinstance(things, dict) else [(None, each) for each in things]
        lines = [
            ("" if name is None else f"{json.dumps(name)}: ") + json.dumps(each, sort_keys=True) for name, each in pairs
        ]
        opened, closed = "{}" if isinstance(things, dict) else "[]"
        parts.append(f"{json.dumps(what)}: {opened}\n" + ",\n".join(lines) + f"\n{closed}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


async def main() -> None:
    with tempfile.TemporaryDirectory(prefix="aiqueue-upgrade-") as place:
        forms = await acts.forms(Path(place) / ".aiqueue")
        await stopped(Path(place) / ".aiqueue")
    with tempfile.TemporaryDirectory(prefix="aiqueue-upgrade-") as place:
        declared = await store(Path(place) / ".aiqueue")
        packed = pack(Path(place) / ".aiqueue")
    told = await read(packed)
    told["ran"] = await run(packed)
    told |= {"forms": forms, "declared": declared}
    (acts.HERE / f"{COMMIT}.tar.gz").write_bytes(packed)
    (acts.HERE / "expected.json").write_text(written(told))
    print(f"{len(packed):,} bytes, {len(told['jobs'])} jobs, {len(told['letters'])} dead letters")


if __name__ == "__main__":
    asyncio.run(work(Path(sys.argv[1]), *sys.argv[2:]) if len(sys.argv) > 1 else main())
