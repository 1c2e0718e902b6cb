"""In a cluster, one server is behind the leader of a stream: nothing is shown as whole that is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import aiqueue
from aiqueue.errors import Unavailable
from aiqueue.inspect import stats

from ..lagging import LaggingCluster
from ..support import Eventually, create_streams, wait_until

STREAM, TENANT = "AI_AGENT_TASKS", "acme"
BEFORE, AFTER = 20, 40  # jobs that are stored before, and after, a server gets no more changes
CANCELLED = 5  # of those before, after
READS = 12  # each is answered by one of three servers


class Crawl(aiqueue.Message, kind="crawl"):
    n: int = 0


def settings_of(cluster: LaggingCluster) -> aiqueue.Settings:
    node = cluster.nodes[0]
    return aiqueue.Settings(
        url=cluster.url, user=node.user, password=node.password, profile="cluster", families=["agent.tasks"]
    )


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LaggingCluster]:
    with LaggingCluster(tmp_path / "lagging") as made:
        yield made


async def test_no_list_plan_or_count_is_taken_for_whole_that_a_server_has_answered_which_is_behind(
    cluster: LaggingCluster, eventually: Eventually
) -> None:
    settings = settings_of(cluster)
    async with aiqueue.connect(settings=settings) as client:
        await eventually(lambda: _has_streams(client))
        cluster.wait_ready([STREAM, "AI_PARKED", "AI_RESULTS"], current=True)
        await enqueue(client, 0, BEFORE)
        await eventually(lambda: _holds_back(client, cluster))
    # the rest must take less than 10 s: then the held node answers that the stream has no leader
    near = settings.with_arguments(url=cluster.leader(STREAM).url)
    async with aiqueue.connect(settings=near) as client:
        await enqueue(client, BEFORE, BEFORE + AFTER)
        for n in range(CANCELLED):
            assert await client.cancel(f"job-{n}", family="agent.tasks", tenant=TENANT)
        waiting = {f"job-{n}" for n in range(CANCELLED, BEFORE + AFTER)}

        counts = {len(await read_ids(client, confirmed=False)) for _ in range(READS)}
        assert counts == {BEFORE, len(waiting)}  # a server is behind, indeed

        page = await client.jobs.page(limit=100)
        assert {each.job_id for each in page.jobs} >= waiting
        assert page.behind == (STREAM,)
        plan = await client.jobs.plan("cancel")
        assert plan.behind == (STREAM,)
        assert plan.count >= len(waiting)

        for _ in range(READS):
            assert await read_ids(client) >= waiting
        for n, state in ((CANCELLED - 1, "cancelled"), (BEFORE + AFTER - 1, "queued")):
            found = await client.job(f"job-{n}", family="agent.tasks", tenant=TENANT)
            assert (await found.status()).state == state
        outcome = await client.jobs.act(plan)
        assert outcome.done + len(outcome.ended) + len(outcome.failed) == plan.count

        cluster.release()
        again = await client.jobs.act(plan)  # those that have failed, if it took more than 10 s up to here
        assert (outcome.done + again.done, again.failed) == (len(waiting), [])
        await eventually(lambda: _is_whole(client))
        assert [(await client.jobs.plan("cancel")).count for _ in range(READS)] == [0] * READS


async def test_a_server_that_is_down_answers_nobody_and_makes_no_list_and_no_count_partial(
    cluster: LaggingCluster, eventually: Eventually
) -> None:
    settings = settings_of(cluster)
    async with aiqueue.connect(settings=settings) as client:
        await eventually(lambda: _has_streams(client))
        cluster.wait_ready([STREAM, "AI_PARKED", "AI_DEAD", "AI_RESULTS"], current=True)
        await enqueue(client, 0, BEFORE)
        cluster.leader(STREAM).kill()
        await eventually(lambda: _is_whole(client), 60)
        assert len(await read_ids(client)) == BEFORE
        await eventually(lambda: _is_counted_whole(client), 60)


async def enqueue(client: aiqueue.Client, first: int, end: int) -> None:
    specs = [aiqueue.JobSpec(Crawl(n=n), tenant=TENANT, unique=f"job-{n}") for n in range(first, end)]
    assert len([each async for each in client.enqueue_many(specs)]) == end - first


async def read_ids(client: aiqueue.Client, *, confirmed: bool = True) -> set[str]:
    read = client.connection.read(STREAM, ">", confirmed=confirmed)
    return {each.headers["Aiq-Job-Id"] async for each in read}


async def _has_streams(client: aiqueue.Client) -> bool:
    """Create the streams, once the leader of the cluster knows servers for three replicas."""
    try:
        await create_streams(client)
    except Unavailable:
        return False
    return True


async def _holds_back(client: aiqueue.Client, cluster: LaggingCluster) -> bool:
    """Keep a node behind, if it answers direct gets by now: replicas do some seconds after a stream was created."""
    leader = cluster.leader_of(STREAM)
    node = next(each.directory.name for each in cluster.nodes if each.directory.name != leader)
    cluster.hold(node, STREAM)
    try:
        if leader and cluster.leader_of(STREAM) == leader:
            probe = await client.enqueue(Crawl(), tenant=TENANT)
            wait_until(lambda: _others_are_current(cluster, node))
            counts = {len(await read_ids(client, confirmed=False)) for _ in range(2 * READS)}
            assert await probe.cancel()
            if len(counts) > 1:
                return True
    except Unavailable:  # it gets another leader now
        pass
    cluster.release()
    return False


def _others_are_current(cluster: LaggingCluster, node: str) -> bool:
    replicas = cluster.ask(f"STREAM.INFO.{STREAM}")["cluster"]["replicas"]
    return all(each["current"] and not each.get("lag") for each in replicas if each["name"] != node)


async def _is_whole(client: aiqueue.Client) -> bool:
    try:
        return not (await client.jobs.page(limit=1)).behind
    except Unavailable:  # there is no leader now
        return False


async def _is_counted_whole(client: aiqueue.Client) -> bool:
    try:
        (family,) = await stats.overview(client.connection, client.topology)
    except Unavailable:
        return False
    return (family.pending, family.partial) == (BEFORE, False)
