"""How a document's job has ended where its handler could not say so: cancelled, past its deadline, convicted."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..errors import AIQueueError, NotFound
from .messages import RagDocument

if TYPE_CHECKING:
    from ..client import Client
    from .types import State


class JobEnd(NamedTuple):
    """The state of the document's version, and why."""

    state: State
    reason: str


async def end_of_job(client: Client, tenant: str, job_id: str) -> JobEnd | None:
    """Return how a job has ended without a result; None: it has one, goes on, or that is not known now."""
    try:
        handle = await client.job(job_id, tenant=tenant, family=RagDocument.aiq_family)
        found = await handle.status()
    except NotFound:
        return JobEnd("failed", f"its job {job_id} is gone: ingest the document again")
    except AIQueueError:
        return None
    newest = found.entries[-1].event if found.entries else ""  # what is left of the job may be parked for a while
    if found.state == "cancelled" or newest == "cancelled":
        return JobEnd("cancelled", "its job was cancelled")
    if found.state == "failed":
        return JobEnd("failed", str((found.failure or {}).get("error") or "its job is a dead letter"))
    if found.state == "ended":
        return JobEnd("failed", f"its job {job_id} was purged: ingest the document again")
    return None
