"""Dead letters: failed jobs, kept with payload, reason and history until they are replayed or purged.

The body is the job's own, unchanged. Headers state why the job failed (docs/reference/wire/parked.md).
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from .. import codec, headers, subjects
from ..codec import secret_paths
from ..connection import Connection, PubAck, Stored
from ..documents import Documents
from ..errors import BadInput, EncodeError, NotFound, TooLarge
from ..subjects import Lane
from ..topology import Topology
from .key_lanes import KeyLanes

HISTORY_BYTES_MAX = 16_384
_REPLAY_KEEPS = (
    headers.CONTENT_TYPE, headers.KIND, headers.JOB_ID, headers.UNIQUE, headers.SECRET, headers.HISTORY,
    headers.LIMIT_KEY, headers.RESUMES, headers.FIRST_STORED, *headers.LINEAGE, *headers.TICK, *headers.DOCUMENTS,
)  # fmt: skip
_LIMIT_KEY_MAX = 16_384  # characters of the header: no value is as long as that


@dataclass(frozen=True)
class DeadLetter:
    """A failed job as it is stored. `seq`: its sequence in the stream of dead letters. Times: seconds since the epoch.

    `history` has one entry for each attempt, the oldest first, with attempt, at, worker, error and, if the handler
    raised, traceback.
    """

    seq: int
    job_id: str
    kind: str
    lane: Lane
    reason: str
    error: str
    attempt: int
    worker: str
    enqueued_at: float | None
    failed_at: float
    replays: int
    history: list[dict[str, Any]]
    headers: Mapping[str, str]
    body: bytes

    @property
    def unique(self) -> str:
        """The caller's key, of which the job id is a hash; "" if the id is the key itself."""
        return headers.unique_key(self.headers)

    @property
    def key(self) -> str:
        """The value of the family's `limit_key`, if the job was in the lane of a limited value; else ""."""
        return headers.limit_key(self.headers)

    def has_error(self, wanted: str) -> bool:
        """Whether a text is in "reason: error", as lists show them; case does not count."""
        return headers.ascii_line(wanted).casefold() in f"{self.reason}: {self.error}".casefold()

    def summary(self) -> dict[str, Any]:
        """The dead letter as plain data, without its body."""
        return {
            "seq": self.seq, "job_id": self.job_id, "unique": self.unique, "kind": self.kind,
            "family": self.lane.family, "tenant": self.lane.tenant, "priority": self.lane.priority,
            "key": self.key,
            "reason": self.reason, "error": self.error, "attempt": self.attempt, "worker": self.worker,
            "enqueued_at": self.enqueued_at, "failed_at": self.failed_at, "replays": self.replays,
            "history": self.history,
            "size_bytes": headers.number(self.headers.get(headers.DOCUMENT_SIZE, "")) or len(self.body),
        }  # fmt: skip


@dataclass(frozen=True)
class Filter:
    """Selects dead letters; None matches all. `older_s`, `newer_s`: only jobs that failed at least, or at most, so many
    seconds ago.

    `error`: only those with this text in their reason or error, such as "ValueError"; case does not count.
    """

    family: str | None = None
    tenant: str | None = None
    kind: str | None = None
    job_id: str | None = None
    older_s: float | None = None
    error: str | None = None
    newer_s: float | None = None

    def subject(self) -> str:
        """Return the narrowest subject that covers all matches. Raises InvalidToken."""
        family = self.family or "*.*"
        tenant = subjects.token("tenant", self.tenant) if self.tenant else "*"
        return subjects.dead(family, tenant, subjects.job_id(self.job_id) if self.job_id else "*")

    def matches(self, letter: DeadLetter, now: float) -> bool:
        """Whether a dead letter on `subject` also matches kind, error and age at the time `now`."""
        if self.kind is not None and letter.kind != self.kind:
            return False
        if self.error is not None and not letter.has_error(self.error):
            return False
        age_s = now - letter.failed_at
        return (self.older_s is None or age_s >= self.older_s) and (self.newer_s is None or age_s <= self.newer_s)


@dataclass(frozen=True)
class FailedJob:
    """What a worker knows about a job that has just failed for good: the input of `DeadLetters.add`.

    `secrets` names the secret fields that the handler's model has, for a job whose headers do not name them. `run`: the
    run that failed, whose checkpoints a replay goes on from; 0 for a mail.
    """

    job_id: str
    kind: str
    lane: Lane
    seq: int
    reason: str
    error: str
    attempt: int
    worker: str
    enqueued_at: float
    history: list[dict[str, Any]]
    secrets: str = ""
    run: int = 0


class DeadLetters:
    """Adds, finds, replays and purges dead letters, in their stream."""

    def __init__(self, connection: Connection, topology: Topology, key_lanes: KeyLanes | None = None) -> None:
        """`key_lanes`: where replayed jobs of limited keys go. None: to the ordinary lanes."""
        self._connection = connection
        self._topology = topology
        self._key_lanes = key_lanes
        self._stream = topology.dead_stream.name
        self.documents = Documents(connection, topology)

    async def add(self, job: FailedJob, job_headers: Mapping[str, str], body: bytes) -> int:
        """Store a failed job as a dead letter, and return its sequence. Adding the same job twice stores one.

        If headers and body do not fit into one message: 1. without the history; 2. also without the publisher's
        headers; 3. in two messages, each with half of the body. Raises Unavailable, QueueFull.
        """
        subject = subjects.dead(job.lane.family, job.lane.tenant, job.job_id)
        own = _dead_letter_headers(job, job_headers)
        foreign = headers.carried(job_headers)
        history = {headers.HISTORY: history_text(job.history)}
        for letter in ({**foreign, **own, **history}, {**foreign, **own}, own):
            try:
                return (await self._connection.store(subject, body, letter)).seq
            except TooLarge:
                continue
        half = len(body) // 2
        rest = {headers.MSG_ID: f"{own[headers.MSG_ID]}/rest", headers.REST: "0"}
        stored = await self._connection.store(subject, body[half:], rest)
        letter = {**own, headers.REST: str(stored.seq)}
        return (await self._connection.store(subject, body[:half], letter)).seq

    async def find(self, wanted: Filter | None = None) -> AsyncIterator[DeadLetter]:
        """Yield the dead letters that match, the oldest first. Raises NotFound if the stream is missing."""
        wanted = wanted or Filter()
        if wanted.family is not None:
            self._topology.family(wanted.family)
        now = self._connection.clock.now()
        async for stored in self._connection.read(self._stream, wanted.subject()):
            letter = await self.complete(stored)
            if letter is not None and wanted.matches(letter, now):
                yield letter

    async def get(self, seq: int) -> DeadLetter:
        """Return the dead letter of this sequence. Raises NotFound, BadInput for what is no whole number from 1."""
        if type(seq) is not int or seq < 1:
            raise BadInput(f"the number of a dead letter is a whole number from 1, not {seq!r}: see `aiqueue dead ls`")
        stored = await self._connection.get(self._stream, seq)
        letter = await self.complete(stored) if stored else None
        if letter is None:
            raise NotFound(f"there is no dead letter {seq}: `aiqueue dead ls` lists the dead letters")
        return letter

    async def complete(self, stored: Stored) -> DeadLetter | None:
        """Return the dead letter in a message, completed by its second message if it has one.

        None if this message is the second one of a dead letter, or not a dead letter at all.
        """
        rest_seq = stored.headers.get(headers.REST)
        if rest_seq == "0":
            return None
        if rest_seq is not None and (seq := headers.number(rest_seq)):  # 0: a plain publisher set something else
            rest = await self._connection.get(self._stream, seq)
            stored = stored._replace(data=stored.data + (rest.data if rest else b""))
        return _parse_dead_letter(stored)

    async def replay(self, letter: DeadLetter) -> bool:
        """Enqueue the job again in its lane, with its history and a fresh set of attempts; then delete the dead letter.

        If the process dies in between, the next replay does not store the job twice. False: somebody else has replayed
        it meanwhile. Raises QueueFull.
        """
        kept = {
            name: value
            for name, value in letter.headers.items()
            if name in _REPLAY_KEEPS or not name.startswith((headers.OURS, headers.SERVERS))
        }
        job_headers = {
            **kept,
            headers.MSG_ID: subjects.msg_id(
                letter.lane.family, letter.lane.tenant, letter.job_id, f"replay-{letter.seq}-{int(letter.failed_at)}"
            ),
            headers.REPLAY: str(letter.replays + 1),
            **self._first_stored(letter),
        }
        lane = await self._lane_of(letter)
        try:
            stored = await self._store_replay(lane, letter, job_headers)
        except NotFound:
            if not lane.key:
                raise
            stored = await self._store_replay(lane.without_key, letter, job_headers)
        return await self._delete(letter) or not stored.duplicate

    def _first_stored(self, letter: DeadLetter) -> dict[str, str]:
        """Return the header FIRST_STORED of a replay, for a job that was not stored anew before; empty if it was, and
        for a mail. The run in RESUMES is that of the first storing, to the second; ENQUEUED is exact, if it is of that
        run. Dead letters of former versions have no run.
        """
        family = self._topology.families.get(letter.lane.family)
        if headers.FIRST_STORED in letter.headers or (family is not None and family.role != "work"):
            return {}
        at, seq = letter.enqueued_at, 0
        if found := subjects.RUN_KEY.fullmatch(letter.headers.get(headers.RESUMES, "")):
            seq, second = map(int, found[0].split("-"))
            at = at if at is not None and int(at) == second else second
        return {} if at is None else {headers.FIRST_STORED: headers.first_stored_text(at, seq)}

    async def _lane_of(self, letter: DeadLetter) -> Lane:
        """Return the lane in which a replayed job is stored: that of its limited key, or its ordinary lane."""
        family = self._topology.families.get(letter.lane.family)
        if not letter.key or family is None or family.limit_key is None or self._key_lanes is None:
            return letter.lane
        token = await self._key_lanes.find_token(family, letter.lane.tenant, letter.key)
        return letter.lane._replace(key=token)

    async def _store_replay(self, lane: Lane, letter: DeadLetter, job_headers: dict[str, str]) -> PubAck:
        await self._connection.publish(subjects.hint(lane), subjects.hint_body(lane, letter.key))
        try:
            return await self._connection.store(subjects.work(*lane), letter.body, job_headers)
        except TooLarge:  # a job without its history is better than no job
            job_headers.pop(headers.HISTORY, None)
            return await self._connection.store(subjects.work(*lane), letter.body, job_headers)

    async def purge(self, letter: DeadLetter) -> bool:
        """Delete the dead letter, and release the documents that it and its run hold.

        False: it is already deleted. Then nothing is released: if it was replayed, the documents are the new run's.
        """
        if not await self._delete(letter):
            return False
        if subjects.RUN_KEY.fullmatch(run := letter.headers.get(headers.RESUMES, "")):
            parent = subjects.ParentRun(letter.lane.family, letter.job_id, run)
            await self.documents.release_run(letter.lane.tenant, parent)
        if headers.DOCUMENT_REF in letter.headers:
            await self.documents.end_holds(letter.lane.tenant, letter.headers)
        return True

    async def body(self, letter: DeadLetter) -> bytes:
        """Return the job's body, also one stored as a document. Raises NotFound, Corrupt, BadInput, Unavailable."""
        if headers.DOCUMENT not in letter.headers:
            return letter.body
        return await self.documents.read_body(letter.lane.tenant, letter.headers)

    async def _delete(self, letter: DeadLetter) -> bool:
        """Delete the messages of a dead letter. Return whether it was still stored."""
        deleted = await self._connection.delete(self._stream, letter.seq)
        if rest := headers.number(letter.headers.get(headers.REST, "")):
            await self._connection.delete(self._stream, rest)
        return deleted


def _dead_letter_headers(job: FailedJob, job_headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers that the library sets on a dead letter, without its history."""
    letter = {
        headers.MSG_ID: subjects.msg_id(
            job.lane.family, job.lane.tenant, job.job_id, f"dead-{job.seq}-{int(job.enqueued_at)}"
        ),
        headers.JOB_ID: job.job_id,
        headers.READ_KIND: headers.ascii_line(job.kind, 128),
        headers.SUBJECT: subjects.lane(*job.lane),
        headers.REASON: job.reason,
        headers.ERROR: headers.ascii_line(job.error),
        headers.ATTEMPT: str(job.attempt),
        headers.WORKER: headers.ascii_line(job.worker, 128),
        headers.ENQUEUED: f"{job.enqueued_at:.6f}",
        headers.REPLAY: str(headers.number(job_headers.get(headers.REPLAY, ""))),
    }
    if headers.KIND in job_headers:  # only if the publisher set it: a kind here means that the body is no envelope
        letter[headers.KIND] = headers.ascii_line(job_headers[headers.KIND], 128)
    if job.run:
        resumed = job_headers.get(headers.RESUMES, "")
        letter[headers.RESUMES] = subjects.kept_run(job.run, job.enqueued_at, resumed)
    if headers.FIRST_STORED in job_headers:
        letter[headers.FIRST_STORED] = headers.ascii_line(job_headers[headers.FIRST_STORED], 64)
    if secrets := secret_paths.merge(headers.ascii_line(job_headers.get(headers.SECRET, ""), 4_000), job.secrets):
        letter[headers.SECRET] = secrets
    letter |= {name: headers.ascii_line(job_headers[name], 128) for name in headers.DOCUMENTS if name in job_headers}
    letter |= headers.carried_unique(job_headers)
    if headers.LIMIT_KEY in job_headers:
        letter[headers.LIMIT_KEY] = headers.ascii_line(job_headers[headers.LIMIT_KEY], _LIMIT_KEY_MAX)
    letter |= headers.carried_tick(job_headers)
    letter |= {name: headers.ascii_line(job_headers[name], 256) for name in headers.LINEAGE if name in job_headers}
    if headers.CONTENT_TYPE in job_headers:
        letter[headers.CONTENT_TYPE] = headers.ascii_line(job_headers[headers.CONTENT_TYPE], 128)
    return letter


def trimmed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a history cut to HISTORY_BYTES_MAX, as `history_text` does it."""
    entries: list[dict[str, Any]] = json.loads(history_text(history))
    return entries


def last_trace(history: list[dict[str, Any]] | None) -> str:
    """Return the traceback of the last attempt in a history, on lines of its own, for the end of a log record."""
    trace = history[-1].get("traceback") if history else None
    return f"\n{trace.rstrip()}" if isinstance(trace, str) else ""


def history_of(job_headers: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the earlier attempts in the headers of a replayed job or a dead letter.

    A plain publisher may have set the header, so entries that cannot be written to a journal are left out.
    """
    if headers.HISTORY not in job_headers:
        return []
    try:
        history = json.loads(job_headers[headers.HISTORY], parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return []
    return (
        [each for each in history if isinstance(each, dict) and _is_encodable(each)]
        if isinstance(history, list)
        else []
    )


def _is_encodable(entry: dict[str, Any]) -> bool:
    try:
        codec.encode({"history": [entry]})
    except EncodeError:
        return False
    return True


def history_text(history: list[dict[str, Any]]) -> str:
    """Return a history as a header value of at most HISTORY_BYTES_MAX.

    If it is too long, tracebacks are left out first, then attempts; the oldest first in both cases.
    """
    entries = [dict(each) for each in history]
    text = json.dumps(entries)
    for each in entries:
        if len(text) <= HISTORY_BYTES_MAX:
            break
        each.pop("traceback", None)
        text = json.dumps(entries)
    while len(text) > HISTORY_BYTES_MAX and entries:
        entries.pop(0)
        text = json.dumps(entries)
    return text


def _parse_dead_letter(stored: Stored) -> DeadLetter | None:
    """Return the dead letter in a message; None if the subject is not that of a dead letter."""
    letter_headers = stored.headers
    tokens = subjects.parse_dead(stored.subject)
    if tokens is None:
        return None
    family, tenant, job_id = tokens
    lane = subjects.parse_lane(letter_headers.get(headers.SUBJECT, "")) or Lane(family, tenant, subjects.NORMAL)
    return DeadLetter(
        seq=stored.seq,
        job_id=job_id,
        kind=letter_headers.get(headers.READ_KIND, ""),
        lane=lane,
        reason=letter_headers.get(headers.REASON, ""),
        error=letter_headers.get(headers.ERROR, ""),
        attempt=headers.number(letter_headers.get(headers.ATTEMPT, "")),
        worker=letter_headers.get(headers.WORKER, ""),
        enqueued_at=headers.decimal(letter_headers.get(headers.ENQUEUED, "")),
        failed_at=stored.time,
        replays=headers.number(letter_headers.get(headers.REPLAY, "")),
        history=history_of(letter_headers),
        headers=letter_headers,
        body=stored.data,
    )
