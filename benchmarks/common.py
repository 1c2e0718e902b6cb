"""What both sides share: the job, the raw client, an empty stream."""

from __future__ import annotations

import nats
from nats.aio.client import Client as Raw

import aiqueue
from aiqueue import codec, headers, subjects

STREAM = "AI_AGENT_TASKS"
FAMILY = "agent.tasks"


class Noop(aiqueue.Message, kind="noop"):
    """183 bytes as CBOR, as in the comparison with other queues."""

    i: int
    t: float
    text: str


def message(i: int, t: float = 0.0) -> Noop:
    return Noop(i=i, t=t, text="x" * 160)


async def raw_client(client: aiqueue.Client) -> Raw:
    settings = client.connection.settings
    password = settings.password.get_secret_value() if settings.password else None
    return await nats.connect(settings.servers, user=settings.user, password=password)


def raw_job(
    i: int, t: float = 0.0, tenant: str = "bench", priority: str = "normal"
) -> tuple[str, bytes, dict[str, str]]:
    """Subject, body and headers of the job that the library would have stored."""
    job_id = subjects.new_id()
    told = {
        headers.MSG_ID: subjects.msg_id(FAMILY, tenant, job_id),
        headers.CONTENT_TYPE: codec.CBOR,
        headers.KIND: "noop",
        headers.JOB_ID: job_id,
        headers.PRIORITY: priority,
        "task_id": job_id,
    }
    return subjects.work(FAMILY, tenant, priority), codec.encode(message(i, t)), told


async def empty(client: aiqueue.Client) -> None:
    await client.connection.api(f"STREAM.PURGE.{STREAM}")


async def lane(client: aiqueue.Client, tenant: str = "bench") -> str:
    """A fresh consumer of the lane, as the library would make it."""
    config = client.topology.family(FAMILY).lane_config(tenant, "normal")
    name = config["durable_name"]
    subject = f"CONSUMER.CREATE.{STREAM}.{name}.{config['filter_subject']}"
    await client.connection.api(subject, {"stream_name": STREAM, "config": config})
    return str(name)
