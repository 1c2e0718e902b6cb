"""What one worker says of the deliveries that it holds: in its record, and to whoever asks which worker has a job."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import islice
from typing import Any

from .. import headers, subjects
from ..attempt import Cancellations, Handler, Handlers
from ..connection import Connection, Received, Subscription
from ..errors import AccessDenied, AIQueueError
from ..lanes import Delivery
from ..topology import Family
from .context import JobContext

log = logging.getLogger(__name__)

JOBS_MAX = 5  # running jobs in a record, the oldest ones


class Holding:
    """Answers on ``aiq.holds.{family}``, from `start` to `stop`, if this worker holds the job that is asked for.

    `running`: the deliveries with a slot, by their location. `waiting`: those that have none yet. The request is
    ``{tenant, job_id}`` in JSON. A worker that does not hold the job stays silent, unless the request names it: then it
    says so.
    """

    def __init__(
        self,
        connection: Connection,
        families: Mapping[str, Family],
        handlers: Handlers,
        worker: str,
        running: Mapping[tuple[object, ...], Delivery],
        waiting: Collection[Delivery],
    ) -> None:
        self._connection = connection
        self._families = families
        self._handlers = handlers
        self._running, self._waiting = running, waiting
        self._worker = {"worker": worker, "host": socket.gethostname(), "pid": os.getpid()}
        self._subscriptions: list[Subscription] = []
        self._ignore: Callable[[], None] | None = None
        self._replied = ""  # where the last answer went
        self._may_reply = True
        self._cancellations: Cancellations | None = None
        self._holds_result: Callable[[str], bool] = lambda _subject: False

    async def start(self, cancellations: Cancellations, holds_result: Callable[[str], bool]) -> None:
        """Listen to the requests. Without the permission nobody is told which jobs this worker holds.

        `cancellations` has the attempts whose handlers run. `holds_result` returns whether the result of a journal
        waits for room on the server.
        """
        self._cancellations, self._holds_result = cancellations, holds_result
        self._ignore = self._connection.on_denied(self._on_denied)
        for family in self._families:
            self._subscriptions.append(await self._connection.subscribe(f"{subjects.HOLDS}.{family}", self._on_request))

    async def stop(self) -> None:
        """Safe twice and unstarted."""
        if self._ignore is not None:
            self._ignore()
        while self._subscriptions:
            await self._subscriptions.pop().close()

    @property
    def answers(self) -> bool:
        """Whether this worker answers, as far as it knows of its permissions."""
        return self._may_reply and not any(each.denied for each in self._subscriptions)

    def _on_denied(self, subject: str, error: AccessDenied) -> None:
        if subject.lower() == self._replied.lower():
            self._may_reply = False

    def writes_journal(self, subject: str) -> bool:
        """Return whether a job that runs here has its journal on this subject, as far as the job's headers say."""
        tenant, job_id = subject.split(".")[-2:]
        return any(_is_job(each, tenant, job_id) for each in self._running.values())

    def describe_jobs(self) -> list[dict[str, Any]]:
        """Return the first JOBS_MAX of the running jobs as plain data, for the record. Also called in a thread."""
        return describe_jobs(list(self._running.values()), time.monotonic())

    def find(self, family: str, tenant: str, job_id: str) -> dict[str, Any] | None:
        """Return how this worker holds a job, as plain data; None: it does not hold the job.

        `state`: "waiting" (for a slot), "starting" (it has a slot, and its handler was not called yet, or has returned
        already), "running", or "result" (the job has ended, and its result waits for room on the server). Times are in
        seconds since the epoch.
        """
        watched = self._cancellations.watched if self._cancellations is not None else []
        contexts = {id(each.delivery): each for each in watched if isinstance(each, JobContext)}
        for delivery in [*self._running.values(), *self._waiting]:
            context = contexts.get(id(delivery))
            if delivery.lane.key.family == family and _has_id(delivery, context, tenant, job_id):
                return self._describe(delivery, context)
        journal = self._families[family].journal
        if journal and self._holds_result(subjects.journal(journal, tenant, job_id)):
            return {**self._worker, "state": "result"}
        return None

    def _describe(self, delivery: Delivery, context: JobContext | None) -> dict[str, Any]:
        now = time.time()
        found = {
            **self._worker, "seq": delivery.seq, "deliveries": delivery.delivery_count,
            "since": round(now - (time.monotonic() - delivery.arrived_at), 3),
        }  # fmt: skip
        if delivery.location not in self._running:
            return {**found, "state": "waiting"}
        if context is None:
            return {**found, "state": "starting"}
        handler = self._handlers.get((delivery.lane.key.family, context.kind))
        return {
            **found, "state": "running", "started_at": round(context.started_at, 3), "attempt": context.attempt,
            "suspect": context.is_suspect, "runs_in": _place_of(handler),
            "timeout_s": handler.timeout_s if handler is not None else None,
        }  # fmt: skip

    def _on_request(self, message: Received) -> None:
        try:
            asked = json.loads(message.data)
            family = message.subject.removeprefix(f"{subjects.HOLDS}.")
            found = self.find(family, asked["tenant"], asked["job_id"]) if message.reply else None
            if found is None and message.reply and asked.get("worker") == self._worker["worker"]:
                found = {**self._worker, "state": "absent"}
        except (ValueError, KeyError, TypeError, RecursionError):
            log.debug("this is no request for the holder of a job: %.100r", message.data)
            return
        if found is not None:
            self._replied = message.reply
            try:
                self._connection.tell(message.reply, json.dumps(found).encode())
            except AIQueueError as error:
                log.debug("the holder of a job cannot answer: %s", error)


def _is_job(delivery: Delivery, tenant: str, job_id: str) -> bool:
    return delivery.tenant == tenant and delivery.message.headers.get(headers.JOB_ID, job_id) == job_id


def _has_id(delivery: Delivery, context: JobContext | None, tenant: str, job_id: str) -> bool:
    if headers.JOB_ID in delivery.message.headers:
        return _is_job(delivery, tenant, job_id)
    # a plain publisher's job: its id is known once its body was read
    return context is not None and delivery.tenant == tenant and context.job_id == job_id


def _place_of(handler: Handler | None) -> str:
    if handler is None:
        return ""
    return "process" if handler.process else "loop" if handler.is_async else "thread"


def describe_jobs(running: Iterable[Delivery], now: float) -> list[dict[str, Any]]:
    """Return the first JOBS_MAX of the running jobs as plain data. `now` is in monotonic seconds."""
    return [
        {
            "family": each.lane.key.family, "tenant": each.tenant, "priority": each.lane.key.priority, "seq": each.seq,
            "job_id": each.message.headers.get(headers.JOB_ID, ""), "kind": each.message.headers.get(headers.KIND, ""),
            "delivered_s": round(now - each.arrived_at, 3),
        }
        for each in islice(running, JOBS_MAX)
    ]  # fmt: skip
