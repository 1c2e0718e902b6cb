"""Counters against the judge's own count, while workers and servers are killed -9."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue.errors import Unavailable
from aiqueue.metrics import Counts, Flusher, History
from aiqueue.topology import provision

from ..support import create_streams, eventually
from ..worker.test_kill import APP, Sleep, WorkerPool

FAMILIES = ["agent.tasks"]
KINDS = [f"k{n}" for n in range(40)]
QUICKLY = """
    from aiqueue.metrics import flusher

    flusher.EVERY_S = 0.2
    flusher.TENANTS_EVERY_S = 0.2
"""


async def done(client: aiqueue.Client, level: Any = "total") -> int:
    found = History(client.connection, client.topology, level, since_s=7_200)
    await found.update()
    if level != "total":
        return sum(found.series("test.sleeps", name).sums.done for name in found.names("test.sleeps"))
    return sum(each.done for each in found.totals().values())


@pytest.mark.timeout(180)
async def test_workers_killed_amid_jobs_lose_what_they_had_not_flushed_and_nothing_counts_twice(
    tmp_path: Path, account: Any
) -> None:
    pool = WorkerPool(tmp_path, account, app=APP.rstrip() + "\n" + QUICKLY)
    try:
        async with aiqueue.connect(
            account.url, user=account.user, password=account.password, streams=tmp_path / "streams"
        ) as client:
            await create_streams(client)
            pool.start()
            pool.start()
            lost, stored = 0, 0  # at most
            for wave in range(1, 4):
                before = len(pool.lines("end"))
                for n in range(stored, stored + 600):
                    await client.enqueue(Sleep(n=n), tenant=f"t{n % 3}")
                stored += 600
                await asyncio.to_thread(pool.wait_for_ended, stored - 300, within_s=60)
                victim = pool.alive[0]
                pool.kill(victim)
                pool.start()
                await asyncio.to_thread(pool.wait_for_ended, stored, within_s=60)
                lost += sum(pid == victim.pid for _, pid in pool.lines("end")[before:])

                async def counted(least: int = len(pool.lines("end")) - lost) -> bool:
                    return await done(client) >= least

                await eventually(counted)  # so that the next one to be killed has flushed what it did until now
                assert lost < wave * 600
            assert await asyncio.to_thread(pool.stop) == [0, 0]
            ended = pool.lines("end")
            for level in ("total", "minute", "hour", "tenant"):
                count = await done(client, level)
                # tenants are flushed apart, so they may lack more
                least = len(ended) - lost if level != "tenant" else sum(pid not in pool.killed for _, pid in ended)
                assert least <= count <= len(ended), level
    finally:
        for process in pool.alive:
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.mark.timeout(180)
async def test_a_server_killed_amid_flushes_counts_each_once(own_server: Any) -> None:
    server = own_server()

    async def kill(_: aiqueue.Client) -> None:
        server.kill()
        server.start()

    async with aiqueue.connect(server.url, user=server.user, password=server.password, families=FAMILIES) as client:
        await provision.apply(client.connection, client.topology)
        await flush_under_kills(client, kill)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_leader_killed_amid_flushes_counts_each_once(own_cluster: Any) -> None:
    account = own_cluster.account

    async def kill(client: aiqueue.Client) -> None:
        node = await asyncio.to_thread(own_cluster.leader, "AI_METRICS")
        node.kill()
        node.start()
        await asyncio.to_thread(own_cluster.wait_ready, ["AI_METRICS"], current=True)

    async with aiqueue.connect(
        account.url, user=account.user, password=account.password, families=FAMILIES, profile="cluster"
    ) as client:
        await provision.apply(client.connection, client.topology)
        await flush_under_kills(client, kill)


async def done_at_last(client: aiqueue.Client) -> int:
    """As `done`, while connections are lost."""
    while True:
        try:
            return await done(client)
        except Unavailable:
            await asyncio.sleep(0.1)


async def flush_under_kills(client: aiqueue.Client, kill: Callable[[aiqueue.Client], Awaitable[None]]) -> None:
    """Ten workers add to the same counters. A batch that a kill may have cut in two is the only one to lose."""
    added, kills, is_over = 0, 4, False

    def take() -> dict[tuple[str, str, str], Counts]:
        nonlocal added
        if is_over:
            return {}
        counts = Counts()
        counts.done = 1
        counts.add_run(random.random())
        added += 1
        return {("agent.tasks", "acme", "k"): counts}

    flushers = [Flusher(client.connection, client.topology, FAMILIES, take) for _ in range(10)]

    async def go_on(flusher: Flusher) -> None:
        while not is_over:
            await flusher.flush()
            await asyncio.sleep(0.01 * random.random())

    tasks = [asyncio.create_task(go_on(each)) for each in flushers]
    seen = []
    for _ in range(kills):
        before = added
        while added < before + 200:
            await asyncio.sleep(0.01)
        seen.append(await done_at_last(client))
        await kill(client)
        await client.connection.wait_up(30)
    is_over = True
    await asyncio.gather(*tasks)

    async def all_are_counted() -> bool:
        for each in flushers:  # some may find the connection lost
            await each.flush()
        return not any(each._sealed or each._kinds for each in flushers)

    await eventually(all_are_counted, within=60)
    count = await done_at_last(client)
    assert seen == sorted(seen)
    assert added - kills * len(flushers) <= count <= added
    assert count >= seen[-1]  # nothing may have been added after the last kill


@pytest.mark.timeout(240)
async def test_a_flush_that_a_kill_of_the_server_cuts_in_two_breaks_no_counter_for_good(
    own_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The server stores the rest of the flush when it starts again, without the sums: which it says in its log."""
    server, stored = own_server(), 0

    def take() -> dict[tuple[str, str, str], Counts]:
        nonlocal stored
        stored += 1
        return {("agent.tasks", "acme", kind): _one_done() for kind in KINDS}

    async with aiqueue.connect(server.url, user=server.user, password=server.password, families=FAMILIES) as client:
        await provision.apply(client.connection, client.topology)
        flusher, values = Flusher(client.connection, client.topology, FAMILIES, take), dict.fromkeys(KINDS, 0)
        for _ in range(60):
            flushing = asyncio.create_task(_flush_often(flusher))
            await asyncio.sleep(0.1 + 0.1 * random.random())
            server.kill()
            flushing.cancel()
            await asyncio.wait([flushing])
            server.start()
            before, values = values, await _done_by_kind(client)
            assert all(values[kind] >= before[kind] for kind in KINDS)  # also before it is mended
            if "Restoring partial batch write" in server.log.read_text():
                break
        else:
            pytest.fail("no kill of the server has cut a flush in two")
        with caplog.at_level("INFO", "aiqueue.metrics"):
            await flusher.flush()  # the one in doubt
            await flusher.flush()
        assert not flusher._sealed
        assert await _done_by_kind(client) == dict.fromkeys(KINDS, stored)
        assert "of the history that a crash of the server had broken" in caplog.text


def _one_done() -> Counts:
    counts = Counts()
    counts.done = 1
    counts.add_run(random.random())
    return counts


async def _flush_often(flusher: Flusher) -> None:
    while True:
        await flusher.flush()


async def _done_by_kind(client: aiqueue.Client) -> dict[str, int]:
    """As they are once the connection is up again."""
    found = History(client.connection, client.topology, "total", since_s=0)
    while True:
        try:
            await found.update()
        except Unavailable:
            await asyncio.sleep(0.05)
        else:
            sums = dict(found.totals())
            return {kind: sums["agent.tasks", kind].done if ("agent.tasks", kind) in sums else 0 for kind in KINDS}
