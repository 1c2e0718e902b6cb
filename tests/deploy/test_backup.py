"""What docs/operations/production.md says of backups: a copy of a stopped server's directory is one."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest

import aiqueue
from aiqueue.topology import provision

from ..support import NatsProcess


class Copied(aiqueue.Message, kind="copied"):
    n: int


worker = aiqueue.Worker()


@worker.handle(Copied)
async def copied(job: aiqueue.Job[Copied]) -> int:
    if job.message.n < 0:
        raise aiqueue.Reject("not wanted")
    return job.message.n


def client_of(server: NatsProcess) -> aiqueue.Client:
    account = server.account
    return aiqueue.connect(account.url, user=account.user, password=account.password)


async def test_jobs_dead_letters_and_schedules_of_a_copied_directory_are_all_there(
    own_server: Callable[..., NatsProcess],
) -> None:
    server = own_server()
    async with client_of(server) as client:
        await provision.apply(client.connection, client.topology)
        async with worker.running(client):
            refused = await client.enqueue(Copied(n=-1), tenant="acme")
            with pytest.raises(aiqueue.JobFailed):
                await refused.result(30)
        waiting = [await client.enqueue(Copied(n=n), tenant="acme", unique=f"copied-{n}") for n in range(5)]
        delayed = await client.enqueue(Copied(n=9), tenant="acme", delay="1s")
        await client.schedules.add("nightly", aiqueue.Cron("@daily"), Copied(n=7), tenant="acme")
    server.stop()
    kept = server.directory.with_name("kept")
    shutil.copytree(server.directory, kept)
    shutil.rmtree(server.directory)
    shutil.copytree(kept, server.directory)
    server.start()
    async with client_of(server) as client:
        assert not (await provision.plan(client.connection, client.topology)).drift
        assert [letter.job_id async for letter in client.dead.find()] == [refused.id]
        assert [each.id for each in await client.schedules.list(tenant="acme")] == ["nightly"]
        async with worker.running(client):
            for n, old in enumerate(waiting):
                assert await (await client.job(old.id)).result(30) == n
            assert await (await client.job(delayed.id)).result(30) == 9
