"""A family whose limits go by a field of its messages, and jobs that are stored in the lanes of its values."""

from __future__ import annotations

import json
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiqueue
from aiqueue import headers, subjects
from aiqueue.subjects import Lane
from aiqueue.topology import Topology

from .support import Account, create_streams

FAMILY, STREAM = "test.calls", "TEST_CALLS"
FILE = textwrap.dedent("""
    [family]
    name = "test.calls"
    default_kind = "call"
    limit_key = "model"
    [stream]
    name = "TEST_CALLS"
    max_bytes = "64MiB"
    """)


class Call(aiqueue.Message, kind="call", family=FAMILY):
    model: str | int | None = None
    n: int = 0


@asynccontextmanager
async def connect(account: Account, directory: Path, file: str = FILE) -> AsyncIterator[aiqueue.Client]:
    """A client that knows the family, on an account with all streams."""
    (directory / "streams").mkdir(exist_ok=True)
    (directory / "streams" / "test_calls.toml").write_text(file)
    options: dict[str, Any] = {"user": account.user, "password": account.password, "streams": directory / "streams"}
    async with aiqueue.connect(account.url, **options) as client:
        await create_streams(client)
        yield client


def key_lane(model: str, tenant: str = "acme", priority: str = "normal") -> Lane:
    return Lane(FAMILY, tenant, priority, subjects.hashed(model))


async def store(client: aiqueue.Client, lane: Lane, model: str, *, job_id: str = "", n: int = 0) -> tuple[str, int]:
    """Store a job in the lane of a value, as a producer does. Returns its id and sequence."""
    job_id = job_id or subjects.new_id()
    job_headers = {
        headers.MSG_ID: subjects.msg_id(lane.family, lane.tenant, job_id),
        headers.CONTENT_TYPE: "application/json",
        headers.KIND: "call",
        headers.JOB_ID: job_id,
        headers.PRIORITY: lane.priority,
        headers.LIMIT_KEY: headers.encode_key(model),
    }
    body = json.dumps({"model": model, "n": n}).encode()
    return job_id, (await client.connection.store(subjects.work(*lane), body, job_headers)).seq


async def make_consumer(client: aiqueue.Client, lane: Lane) -> str:
    """Create the lane's consumer as a worker does. Returns its name."""
    config = client.topology.family(FAMILY).lane_config(*lane[1:])
    name = str(config["durable_name"])
    request = {"stream_name": STREAM, "config": config}
    await client.connection.api(f"CONSUMER.CREATE.{STREAM}.{name}.{config['filter_subject']}", request)
    return name


def topology() -> Topology:
    bundled = Topology.load()
    files = [(each.file, Path(each.file).read_text(encoding="utf-8")) for each in bundled.streams.values()]
    return Topology.build([*files, ("test_calls.toml", FILE)])
