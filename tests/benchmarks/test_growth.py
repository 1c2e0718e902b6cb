"""The measurements of growth and durability in small: each gives its rows, with a figure a round for every side."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import aiqueue
from benchmarks import backlog, common, durability, fairness, payload, stamped, start, tenants
from benchmarks.report import OURS, RAW, Row, table

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[aiqueue.Client]:
    async with aiqueue.connect(directory=tmp_path / "bench") as opened:
        yield opened


def complete(rows: list[Row], *sides: str) -> list[Row]:
    """The rows, each of which has one positive figure for each of these sides, and can be printed."""
    for row in rows:
        assert set(sides) <= set(row.sides), row
        assert all(len(figures) == 1 and figures[0] > 0 for figures in row.sides.values()), row
        assert set(row.how) >= set(row.sides)
    assert table(rows)
    return rows


@pytest.mark.slow
async def test_a_backlog_is_measured_at_each_depth_and_the_cap_is_back_afterwards(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog, "WAITING", (200, 1_000, 20_000))
    declared = client.topology
    rows = complete(await backlog.run(client, rounds=1, jobs=100), OURS, RAW)
    assert [(row.unit, row.x) for row in rows] == [("/s", 200), ("MiB", 200), ("/s", 1_000), ("MiB", 1_000)]
    info = await client.connection.api("STREAM.INFO.AI_AGENT_TASKS")
    spec = declared.streams["AI_AGENT_TASKS"]
    assert info["config"]["max_msgs_per_subject"] == spec.config["max_msgs_per_subject"]
    assert info["state"]["messages"] == 0
    assert client.topology == declared


async def test_a_portion_smaller_than_the_jobs_to_drain_is_stored_again(client: aiqueue.Client) -> None:
    await backlog.pour(client, 200)
    rate, mib = await backlog.measure(client, OURS, 200, 600)
    assert rate > 0
    assert 10 < mib < 1_000


async def test_the_raw_process_decodes_the_bodies(client: aiqueue.Client) -> None:
    raw = await common.raw_client(client)
    for i in (7, 3, 5):
        subject, body, told = common.raw_job(i)
        await raw.jetstream().publish(subject, body, headers=told)
    await raw.close()
    async with stamped.running(client, RAW, 3) as worker:
        await worker.wait(3)
        assert [number for _, number in worker.stamps(0, 3)] == [7, 3, 5]


@pytest.mark.slow
async def test_a_start_is_measured_beside_its_imports(client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    bare = start.bare

    async def watched(code: str) -> float:
        ran.append(code)
        return await bare(code)

    monkeypatch.setattr(start, "STARTS", 1)
    monkeypatch.setattr(start, "bare", watched)
    (row,) = await start.run(client, rounds=1, jobs=20)
    complete([row], *start.HOW)
    assert ran[1:] == ["import aiqueue", "pass"]
    assert [
        name for name in ("asyncio", "aiqueue.worker", "aiqueue.lanes.puller", "nats") if f"'{name}'" not in ran[0]
    ] == []


async def test_a_start_has_jobs_to_wait_for_though_the_process_before_it_ran_them_all(client: aiqueue.Client) -> None:
    await common.empty(client)
    assert await start.first(client, RAW, 2) > 0


@pytest.mark.slow
async def test_bodies_of_all_sizes_are_measured(client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload, "SIZES", (200, 1_000_000))  # a body in its message, and one that is a document
    monkeypatch.setattr(payload, "LEAST", 10)
    rows = complete(await payload.run(client, rounds=1, jobs=50), OURS, RAW)
    assert [row.x for row in rows] == [200] * 3 + [1_000_000] * 3


@pytest.mark.slow
async def test_servers_that_sync_every_write_are_measured(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durability, "CALLERS", (4, 16))
    monkeypatch.setattr(durability, "WARM", 10)
    settings = (durability.ALWAYS, durability.THREE_ALWAYS)
    rows = complete(await durability.run(client, rounds=1, jobs=100, settings=settings), OURS, RAW)
    assert len(rows) == 7 * len(settings)


@pytest.mark.slow
async def test_fairness_is_measured_in_rows(client: aiqueue.Client) -> None:
    rows = await fairness.run(client, rounds=1, jobs=100)
    assert [set(row.sides) for row in rows] == [{OURS, fairness.SHARED}] * 2 + [{OURS}] * 2
    assert rows[1].sides == {OURS: [40], fairness.SHARED: [40]}


@pytest.mark.slow
async def test_lanes_of_three_kinds_are_measured(client: aiqueue.Client) -> None:
    rows = await tenants.run(client, rounds=1, jobs=100)
    assert [row.x for row in rows if row.unit == "CPU s"] == [1, 10, 100]
    assert all(set(row.sides) == set(tenants.KINDS) for row in rows if "active" in row.name)
    assert [row.x for row in rows if row.unit == "MiB"] == [0]


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_tenants_that_came_and_went_are_measured(client: aiqueue.Client) -> None:
    figures = await tenants.passing(client, jobs=100, seen=(20, 40), turn=20)
    assert list(figures) == [0, 20, 40]
