"""Reads the records of running workers, and asks them which of them holds a job."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from .. import subjects
from ..connection import Connection
from ..errors import BadInput, NotFound, Unavailable
from ..lanes import WorkerRecords
from ..topology import Topology
from .pauses import read_pauses_if_allowed
from .worker_stats import WorkerStats, as_number, as_text, as_whole, parse_workers

ASK_S = 0.25  # how long the holder of a job is waited for

HeldState = Literal["waiting", "starting", "running", "result", "absent"]


@dataclass(frozen=True, slots=True)
class Holder:
    """Which worker holds a job, and how, as the worker says. Times are seconds since the epoch.

    - `state`: "waiting" (for a slot), "starting" (it has a slot, and its handler was not called yet, or has returned),
      "running", "result" (the job has ended, and its result waits for room on the server), or "absent" (it does not
      hold the job, and was asked by name).
    - `since`: when the job was delivered, for the `deliveries`th time. `started_at`: when its handler was called.
    - `runs_in`: "loop", "thread" or "process"; "" where there is no handler. `suspect`: it is tried apart from others,
      because workers were lost with it. `seq`: of its message in the work stream.
    """

    worker: str
    host: str
    pid: int
    state: HeldState
    since: float | None = None
    started_at: float | None = None
    attempt: int | None = None
    deliveries: int = 0
    runs_in: str = ""
    timeout_s: float | None = None
    suspect: bool = False
    seq: int = 0


async def read_workers(
    connection: Connection, topology: Topology, *, family: str | None = None, tenant: str | None = None,
    with_pauses: bool = True,
) -> list[WorkerStats]:  # fmt: skip
    """Return the workers that are alive, or died less than 20 s ago, sorted by name: those of a family and a tenant, or
    all (None). Pauses are left out where this user may not read them, and without `with_pauses`.

    Raises Unavailable, NotFound (the stream is missing), AccessDenied, UnknownFamily, InvalidToken.
    """
    if family is not None and topology.family(family).role != "work":
        raise BadInput(f"family {family} has inboxes and no workers: `aiqueue inbox ls` shows who serves them")
    if tenant is not None:
        subjects.token("tenant", tenant)
    records = WorkerRecords(connection, topology)
    await connection.clock.ensure(topology.presence_stream.name)
    try:
        stored = await records.read_stored()
    except NotFound:
        raise NotFound(f"there is no stream {topology.presence_stream.name}: run `aiqueue apply` first") from None
    pauses = await read_pauses_if_allowed(connection, topology) if stored and with_pauses else []
    found = parse_workers(((each.data, each.time) for each in stored), connection.clock.now(), pauses)
    return [
        each
        for each in found
        if (family is None or family in each.families)
        and (tenant is None or each.tenants is None or tenant in each.tenants)
    ]


async def ask_holder(
    connection: Connection, family: str, tenant: str, job_id: str, *, worker: str | None = None, within_s: float = ASK_S
) -> Holder | None:
    """Return which worker holds a job; None: no worker says so within this time, in seconds. `worker`: this one answers
    also if it does not hold the job: "absent".

    Raises AccessDenied: this user may not ask.
    """
    named = {} if worker is None else {"worker": worker}
    body = json.dumps({"tenant": tenant, "job_id": job_id, **named}).encode()
    try:
        reply = await connection.request(f"{subjects.HOLDS}.{family}", body, timeout_s=within_s)
        plain = json.loads(reply.data)
    except (Unavailable, ValueError, RecursionError):
        return None
    state = plain.get("state") if isinstance(plain, dict) else None
    if state not in ("waiting", "starting", "running", "result", "absent"):
        return None
    return Holder(
        as_text(plain.get("worker")), as_text(plain.get("host")), as_whole(plain.get("pid")), state,
        as_number(plain.get("since")) or None, as_number(plain.get("started_at")) or None,
        as_whole(plain.get("attempt")) or None, as_whole(plain.get("deliveries")), as_text(plain.get("runs_in")),
        as_number(plain.get("timeout_s")) or None, plain.get("suspect") is True, as_whole(plain.get("seq")),
    )  # fmt: skip
