"""Asserts that jobs are enqueued, by what is stored on the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic

from .. import attempt, headers, subjects
from ..attempt import RawJob
from ..client import Client, check_client
from ..connection import Stored
from ..enqueue import headers_of_caller, parse_parked_job
from ..errors import BadInput, DecodeError, NotFound
from ..job import M, M_co, check_model
from ..payload import parse_message
from ..topology import Family
from ..units import Duration, flag, parse_duration, whole_number

POLL_S = 0.01
SHOWN_MAX = 3
COUNT_MAX = 1_000_000


@dataclass(frozen=True, slots=True)
class EnqueuedJob(Generic[M_co]):
    """A job that is stored, in its lane or parked. `due_at`: seconds since the epoch; None for a job in its lane."""

    message: M_co
    """Message of the job, as its class."""
    id: str
    """The job's id."""
    family: str
    """Family of the job's kind: the job is in a lane of this family, or comes to one."""
    tenant: str
    """Tenant that the job belongs to."""
    priority: str
    """Priority of its lane."""
    due_at: float | None
    headers: Mapping[str, str]
    """Headers that the caller has given to the job, without those that aiqueue or the server sets."""


async def assert_enqueued(
    client: Client,
    model: type[M],
    *,
    count: int | None = None,
    within: Duration = 0,
    tenant: str | None = None,
    priority: str | None = None,
    delayed: bool | None = None,
    where: Mapping[str, Any] | None = None,
    **fields: Any,
) -> list[EnqueuedJob[M]]:
    """Assert that jobs with a message of this class are stored and have not ended. Return them, the oldest first::

        (job,) = await testing.assert_enqueued(client, Summarise, count=1, tenant="acme", text="x")

    Jobs count while they wait in their lanes, run, or are parked until a time. One that has ended is not stored any
    more: use `drain`, or await its result.

    - `count`: how many, exactly. None: at least one. 0: none.
    - `within`: how long to wait for that, such as "1s". By default it must be so now.
    - `tenant`, `priority`: only jobs of these. `delayed`: only those that wait for a time (True), or that do not
      (False).
    - `fields`: what fields of the message must be equal to. `where`: the same, for fields that have the name of an
      argument.

    Raises AssertionError, which says what is stored instead; BadInput for wrong arguments (UnknownFamily, and a field
    that the message does not have).
    """
    check_client(client)
    check_model("assert_enqueued", model)
    family = client.topology.family(model.aiq_family)
    wanted = None if count is None else whole_number("count", count, 0, COUNT_MAX)
    deadline = time.monotonic() + parse_duration("within", within)
    is_delayed = None if delayed is None else flag("delayed", delayed)
    tenant = None if tenant is None else subjects.token("tenant", tenant)
    conditions = _check_fields(model, {**(where or {}), **fields})

    def fits(job: EnqueuedJob[M]) -> bool:
        return (
            tenant in (None, job.tenant)
            and priority in (None, job.priority)
            and is_delayed in (None, job.due_at is not None)
            and all(getattr(job.message, name) == value for name, value in conditions.items())
        )

    if priority is not None:
        family.lane_name(tenant or "any", priority)  # refuses one that the family does not have
    while True:
        stored = [job async for job in _read_jobs(client, family, model)]
        found = [job for job in stored if fits(job)]
        if len(found) == wanted or (wanted is None and found):
            return found
        if time.monotonic() >= deadline:
            break
        await asyncio.sleep(POLL_S)
    asked = {"tenant": tenant, "priority": priority, "delayed": is_delayed, **conditions}
    shown = ", ".join(f"{name}={value!r}" for name, value in asked.items() if value is not None)
    number = "at least 1" if wanted is None else str(wanted)
    raise AssertionError(
        f"{number} {model.aiq_kind}{f' with {shown}' if shown else ''} should be enqueued, and {len(found)} "
        f"{'is' if len(found) == 1 else 'are'}; {_describe(stored)}"
    )


def _describe(stored: list[EnqueuedJob[M]]) -> str:
    if not stored:
        return "no job of this kind is stored"
    some = ", ".join(f"{job.message!r} of {job.tenant}/{job.priority}" for job in stored[:SHOWN_MAX])
    more = f", and {len(stored) - SHOWN_MAX} more" if len(stored) > SHOWN_MAX else ""
    return f"stored of this kind: {some}{more}"


def _check_fields(model: type[M], conditions: Mapping[str, Any]) -> Mapping[str, Any]:
    unknown = next((name for name in conditions if name not in model.model_fields), None)
    if unknown is not None and model.model_config.get("extra") != "allow":
        raise BadInput(f"{model.__name__} has no field {unknown!r}: it has {', '.join(model.model_fields) or 'none'}")
    return conditions


async def _read_jobs(client: Client, family: Family, model: type[M]) -> AsyncIterator[EnqueuedJob[M]]:
    """Yield the stored jobs of a kind: parked ones first, because they move on into lanes."""
    seen: set[tuple[str, str]] = set()  # tenant and id, which is unique in a tenant of a family
    places = [(client.parking.stream, f"{subjects.PARKED}.*.{family.name}.>"), (family.stream, f"ai.{family.name}.>")]
    for stream, pattern in places:
        with suppress(NotFound):  # the stream is missing, and nothing is stored
            async for stored in client.connection.read(stream, pattern):
                job = await _open(client, family, model, stored)
                if job is not None and (job.tenant, job.id) not in seen:
                    seen.add((job.tenant, job.id))
                    yield job


async def _open(client: Client, family: Family, model: type[M], stored: Stored) -> EnqueuedJob[M] | None:
    """Return a stored job; None if it is of another kind, or none of the model."""
    parked = parse_parked_job(stored)
    if parked is None:
        tenant, priority = stored.subject.split(".")[3:5]
    else:
        tenant, priority = parked.subject.lane.tenant, parked.subject.lane.priority
    given, body = stored.headers, stored.data
    if headers.DOCUMENT in given:
        body = await client.documents.read_body(tenant, given)
    raw = RawJob(family, tenant, priority, stored.seq, stored.time, given, body, stored.time)
    decoded = attempt.decode_body(raw)
    if decoded.kind != model.aiq_kind or decoded.data is None:
        return None
    try:
        message = parse_message(model, decoded.data)
    except DecodeError:
        return None
    due_at = None if parked is None or parked.is_waiting else parked.due_at
    return EnqueuedJob(message, decoded.job_id, family.name, tenant, priority, due_at, headers_of_caller(family, given))
