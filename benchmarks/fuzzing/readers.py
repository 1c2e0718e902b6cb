"""Every reader of foreign bytes, called with one frame, and what is written of what was read."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any

from aiqueue import attempt, codec, headers
from aiqueue.attempt import Handler, RawJob, Refused, Unknown
from aiqueue.connection import Stored
from aiqueue.connection import frames as seam
from aiqueue.enqueue import deadletter
from aiqueue.enqueue.deadletter import FailedJob
from aiqueue.errors import DecodeError
from aiqueue.job import MakeHeaders, Message
from aiqueue.journal import entry_from_stored
from aiqueue.payload.document_ref import Document
from aiqueue.subjects import Lane
from aiqueue.topology.declared import Family, Topology
from aiqueue.units import Backoff

from .frames import Frame, frames

LANE = Lane("agent.tasks", "t0", "normal")
MEDIA = ("", codec.CBOR, codec.JSON)


class Fuzz(Message, kind="fuzz"):
    number: int
    text: str = ""


class Plain(Fuzz, kind="agent.task"):
    """What a plain publisher's body is taken for."""


HANDLER = Handler(Fuzz, lambda job: None, False, Backoff(), 10.0, True)


class NoProgress:
    """No handler is called here, so that nobody asks for anything."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        raise NotImplementedError

    @property
    def cancelled(self) -> bool:
        raise NotImplementedError

    @property
    def is_over(self) -> bool:
        raise NotImplementedError

    @property
    def make_headers(self) -> MakeHeaders | None:
        raise NotImplementedError

    async def progress(self, fraction: float, note: str) -> None:
        raise NotImplementedError

    async def chunk(self, data: object) -> None:
        raise NotImplementedError

    async def begin_call(self, cost: float | None, key: str) -> list[Any] | None:
        raise NotImplementedError

    def settle(self, cost: float) -> None:
        raise NotImplementedError

    def chunks(self, document: Document) -> AsyncGenerator[bytes, None]:
        raise NotImplementedError

    async def begin_step(self, name: str) -> tuple[Any] | None:
        raise NotImplementedError

    async def keep_step(self, name: str, result: object) -> object:
        raise NotImplementedError

    async def find_encoded_step(self, name: str) -> bytes | None:
        raise NotImplementedError

    async def keep_encoded_step(self, name: str, encoded: object) -> bytes | None:
        raise NotImplementedError

    async def run_in_thread(self, function: object) -> object:
        raise NotImplementedError

    async def keep_call(self, data: object) -> None:
        raise NotImplementedError

    async def earlier_calls(self) -> list[Any]:
        raise NotImplementedError

    async def enqueue_children(self, specs: object) -> list[Any]:
        raise NotImplementedError

    async def gather_children(self, specs: object, names: object) -> list[Any]:
        raise NotImplementedError


class Escaped(Exception):
    """A reader raised what it must not raise; the text names the frame."""


def family() -> Family:
    return Topology.load().family(LANE.family)


def read_many(seed: int, count: int, *, first: int = 0) -> Counter[str]:
    """Read so many frames; how many ended how. Raises Escaped."""
    declared = family()
    outcomes: Counter[str] = Counter()
    for number, frame in enumerate(frames(seed, count, first=first), first):
        try:
            outcomes[read_one(declared, frame)] += 1
        except Exception as error:
            raise Escaped(f"frame {number} of seed {seed}: {error!r}") from error
    return outcomes


def read_one(declared: Family, frame: Frame) -> str:
    """One frame through all readers; what became of its body, in a word."""
    told, _ = seam.read_headers(frame.block) if frame.block else ({}, None)
    for media in MEDIA:
        try:
            codec.decode_message(frame.body, content_type=media, default_kind="agent.task", aliases=declared.aliases)
        except DecodeError:
            continue
    parcel = RawJob(declared, LANE.tenant, LANE.priority, 7, 1.7e9, told, frame.body)
    outcome = _as_job(parcel)
    _as_journal_entry(told, frame.body)
    _as_dead_letter(told, frame.body)
    return outcome


def _as_job(parcel: RawJob) -> str:
    found = attempt.decode_body(parcel)
    attempt.decode_headers_only(parcel)
    attempt.decode_headers_or_defaults(parcel)
    attempt.is_past_deadline(parcel, 0.0)
    attempt.find_wrong_lane(parcel)
    history = deadletter.history_of(parcel.headers)
    codec.encode({"history": deadletter.trimmed(history)})  # as a retry's entry has it
    headers.ascii_line(found.kind)
    made = attempt.build_job(parcel, found, HANDLER, attempt=1, state=None, progress=NoProgress())
    if isinstance(made, Refused):
        error, outcome = made.error, made.reason
    elif isinstance(made, Unknown):
        error, outcome = made.error, "unknown_kind"
    else:
        repr(made)
        return "ran" if found.kind == HANDLER.model.aiq_kind else "of another kind"
    obituary = FailedJob(
        job_id=found.job_id, kind=found.kind, lane=LANE, seq=parcel.seq, reason=outcome, error=error, attempt=1,
        worker="fuzz", enqueued_at=parcel.enqueued_at, history=history,
    )  # fmt: skip
    codec.encode({"reason": outcome, "error": error, "history": deadletter.trimmed(history)})
    seam.block({**headers.carried(parcel.headers), **deadletter._dead_letter_headers(obituary, parcel.headers)})
    seam.block(headers.carried(parcel.headers, ours=True))
    seam.block({headers.HISTORY: deadletter.history_text(history)})
    return outcome


def _as_journal_entry(told: Any, body: bytes) -> None:
    entry = entry_from_stored(Stored("ai.agent.results.t0.f1", 1, body, told, 1.7e9))
    assert isinstance(entry.final, bool)


def _as_dead_letter(told: Any, body: bytes) -> None:
    letter = deadletter._parse_dead_letter(Stored("ai.dead.agent.tasks.t0.f1", 1, body, told, 1.7e9))
    assert letter is not None
    json.dumps(letter.summary())
    deadletter.Filter(kind="fuzz", older_s=1).matches(letter, 1.8e9)


def sample(seed: int, count: int) -> list[Frame]:
    """Frames for a live worker: those of the seed, in no particular order."""
    found = list(frames(seed, count))
    random.Random(seed).shuffle(found)
    return found
