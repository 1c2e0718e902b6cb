"""What is exported to Prometheus, on a server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import aiqueue
from aiqueue.errors import AccessDenied
from aiqueue.inspect import MetricsExporter, metrics_exporter
from aiqueue.metrics import Counts, Flusher

from ..metrics.test_exposition import samples
from ..support import NatsProcess, create_streams, eventually

pytestmark = pytest.mark.families("agent.tasks")
FAMILY = "agent.tasks"


class Page(aiqueue.Message, kind="page.render", family=FAMILY):
    n: int = 0


def exporter_of(client: aiqueue.Client, **options: Any) -> MetricsExporter:
    return MetricsExporter(client.connection, client.topology, **options)


async def scrape(exporter: MetricsExporter) -> dict[str, float]:
    found = await exporter.scrape()
    assert found.failed == {}
    return samples(found.text)


async def flush(client: aiqueue.Client, kind: str = "page.render", *, done: int = 3) -> None:
    counts = Counts()
    counts.done, counts.dead = done, 1
    counts.add_run(0.3)
    counts.add_wait(0.1)
    counted = [{(FAMILY, "acme", kind): counts}]
    await Flusher(client.connection, client.topology, [FAMILY], lambda: counted.pop() if counted else {}).flush()


async def test_counts_workers_and_totals_are_those_of_the_queue(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker(concurrency=1)
    running, end = asyncio.Event(), asyncio.Event()

    @worker.handle(Page)
    async def page(job: aiqueue.Job[Page]) -> None:
        running.set()
        await end.wait()

    exporter = exporter_of(client)
    for n in range(4):
        await client.enqueue(Page(n=n), tenant="acme")
    await client.enqueue(Page(), tenant="acme", delay="1h")
    await flush(client)
    found = await scrape(exporter)
    assert found[f'aiqueue_jobs_waiting{{family="{FAMILY}"}}'] == 4
    assert found[f'aiqueue_jobs_parked{{family="{FAMILY}"}}'] == 1
    assert found[f'aiqueue_jobs_dead{{family="{FAMILY}"}}'] == 0
    assert 0 < found[f'aiqueue_oldest_waiting_seconds{{family="{FAMILY}"}}'] < 60
    assert found[f'aiqueue_family_workers{{family="{FAMILY}"}}'] == 0
    assert found['aiqueue_workers{state="running"}'] == 0
    assert [found[f'aiqueue_up{{source="{each}"}}'] for each in ("queues", "workers", "history")] == [1, 1, 1]
    labels = f'family="{FAMILY}",kind="page.render"'
    outcomes = {each: found[f'aiqueue_jobs_total{{{labels},outcome="{each}"}}'] for each in ("done", "dead", "retried")}
    assert outcomes == {"done": 3, "dead": 1, "retried": 0}
    assert found[f"aiqueue_job_run_seconds_count{{{labels}}}"] == 1
    assert found[f"aiqueue_job_run_seconds_sum{{{labels}}}"] == 0.3
    assert found[f'aiqueue_job_run_seconds_bucket{{{labels},le="0.25"}}'] == 0
    assert found[f'aiqueue_job_run_seconds_bucket{{{labels},le="0.5"}}'] == 1
    async with worker.running(client):
        await running.wait()

        async def is_seen() -> bool:
            seen = await scrape(exporter)
            return (
                seen['aiqueue_workers{state="running"}'] == seen[f'aiqueue_family_workers{{family="{FAMILY}"}}'] == 1
                and seen[f'aiqueue_jobs_in_flight{{family="{FAMILY}"}}'] >= 1
            )

        try:
            await eventually(is_seen, within=30)
        finally:
            end.set()


async def test_tenants_have_counts_of_their_own_only_if_they_are_wanted_and_are_bounded(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await scrape(exporter_of(client, tenants=True)))[f'aiqueue_jobs_waiting{{family="{FAMILY}"}}'] == 0
    for tenant, jobs in (("acme", 3), ("globex", 2), ("initech", 1), ("umbrella", 1)):
        for n in range(jobs):
            await client.enqueue(Page(n=n), tenant=tenant, priority="high" if n else "low")
    assert not any("tenant=" in each for each in await scrape(exporter_of(client)))
    exporter = exporter_of(client, tenants=True)
    found = await scrape(exporter)
    waiting = {each: found[f'aiqueue_jobs_waiting{{family="{FAMILY}",tenant="{each}"}}'] for each in ("acme", "globex")}
    assert waiting == {"acme": 3, "globex": 2}
    assert f'aiqueue_jobs_waiting{{family="{FAMILY}"}}' not in found  # a sum over all labels counts each job once
    assert found[f'aiqueue_oldest_waiting_seconds{{family="{FAMILY}",tenant="acme"}}'] > 0
    monkeypatch.setattr(metrics_exporter, "TENANTS_MAX", 2)
    found = await scrape(exporter)
    shown = {each: n for each, n in found.items() if each.startswith("aiqueue_jobs_waiting{")}
    assert sorted(shown.values()) == [2, 2, 3]
    assert shown[f'aiqueue_jobs_waiting{{family="{FAMILY}",tenant="=other"}}'] == 2


async def test_many_scrapers_share_one_poll(client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter, polls = exporter_of(client), 0
    read = exporter._read_all

    async def count() -> Any:
        nonlocal polls
        polls += 1
        return await read()

    monkeypatch.setattr(exporter, "_read_all", count)
    tasks = [asyncio.create_task(exporter.scrape()) for _ in range(50)]
    await asyncio.sleep(0)
    tasks[0].cancel()  # who asks first may leave
    found = await asyncio.gather(*tasks[1:])
    assert polls == 1
    assert len({each.text for each in found}) == 1
    await exporter.scrape()
    assert polls == 2


async def test_a_dead_source_has_no_series_and_the_others_stay(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = exporter_of(client)
    await flush(client)
    assert any(each.startswith("aiqueue_jobs_total") for each in await scrape(exporter))
    config = (await client.connection.api("STREAM.INFO.AI_METRICS"))["config"]
    await client.connection.api("STREAM.DELETE.AI_METRICS")
    for errors in (1, 2):
        found = await exporter.scrape()
        assert set(found.failed) == {"history"}
        text = samples(found.text)
        assert text['aiqueue_up{source="history"}'] == 0
        assert text['aiqueue_up{source="queues"}'] == 1
        assert text['aiqueue_scrape_errors_total{source="history"}'] == errors
        assert not [each for each in text if each.startswith(("aiqueue_jobs_total", "aiqueue_job_"))]
        assert f'aiqueue_jobs_waiting{{family="{FAMILY}"}}' in text
    await client.connection.api("STREAM.CREATE.AI_METRICS", config)
    assert not [each for each in await scrape(exporter) if each.startswith("aiqueue_jobs_total")]
    await flush(client, done=1)
    found_again = await scrape(exporter)
    assert found_again[f'aiqueue_jobs_total{{family="{FAMILY}",kind="page.render",outcome="done"}}'] == 1

    async def refuse(*_: Any, **__: Any) -> Any:
        raise AccessDenied("no")

    monkeypatch.setattr(metrics_exporter.stats, "overview", refuse)
    monkeypatch.setattr(metrics_exporter, "read_workers", refuse)
    both = await exporter.scrape()
    assert set(both.failed) == {"queues", "workers"}
    assert not [
        each for each in samples(both.text) if "waiting" in each or each.startswith(("aiqueue_work", "aiqueue_family"))
    ]


async def test_a_count_that_the_server_did_not_finish_is_left_out(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace  # noqa: PLC0415

    read = metrics_exporter.stats.overview

    async def incomplete(*arguments: Any, **options: Any) -> Any:
        return [replace(each, partial=True) for each in await read(*arguments, **options)]

    monkeypatch.setattr(metrics_exporter.stats, "overview", incomplete)
    found = await scrape(exporter_of(client))
    assert found[f'aiqueue_counts_partial{{family="{FAMILY}"}}'] == 1
    assert f'aiqueue_jobs_dead{{family="{FAMILY}"}}' not in found  # a server that is behind has not read them all
    assert not [each for each in found if each.startswith(("aiqueue_jobs_waiting", "aiqueue_jobs_in", "aiqueue_old"))]


async def test_a_killed_server_drops_all_series_and_totals_go_on_where_they_were(own_server: Any) -> None:
    server: NatsProcess = own_server()
    async with aiqueue.connect(server.url, user=server.user, password=server.password, families=[FAMILY]) as client:
        await create_streams(client)
        exporter = exporter_of(client)
        await flush(client)
        before = await scrape(exporter)
        total = f'aiqueue_jobs_total{{family="{FAMILY}",kind="page.render",outcome="done"}}'
        assert before[total] == 3
        server.kill()
        await eventually(lambda: not client.connection.connected, within=30)
        found = await exporter.scrape()
        assert set(found.failed) == {"queues", "workers", "history"}
        assert {each.partition("{")[0] for each in samples(found.text)} == {"aiqueue_up", "aiqueue_scrape_errors_total"}
        server.start()
        await eventually(lambda: client.connection.connected, within=60)

        async def is_read() -> bool:
            return not (await exporter.scrape()).failed

        await eventually(is_read, within=60)
        await flush(client)
        assert (await scrape(exporter))[total] == 6
