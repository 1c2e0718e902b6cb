"""From a delivery to an opened job: its body is decoded and, where there may be any, its earlier attempts are known."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import attempt, codec, headers, subjects
from ..attempt import DecodedJob, RawJob, Refused
from ..documents import Documents
from ..enqueue import fingerprint_of, history_of
from ..errors import BadInput, Corrupt, DecodeError, NotFound
from ..journal import EMPTY_RECORD, RETRY, Journal, RunRecord
from ..lanes import Delivery
from ..processes import Quarantine
from ..topology import Family

REASONS = frozenset({  # of dead letters; a reason that anybody else wrote into a job's headers is ignored
    "attempts", "cost", "deadline", "document", "invalid", "killed_worker", "limit", "rejected", "result",
    "undecodable", "unknown_kind",
})  # fmt: skip

HISTORY_MAX = 50


@dataclass(kw_only=True)
class OpenedJob(DecodedJob):
    """What is known of a delivery after its body, and where needed its journal, were read.

    `first_attempt` is the number of the first attempt at this message: earlier attempts were at an earlier message of
    the job, before it was parked. `refusal` is set where the job must not run at all. The body of a suspect is not
    decoded: `data` is None.
    """

    raw: RawJob
    attempt: int = 1
    first_attempt: int = 1
    history: list[dict[str, Any]] | None = None
    record: RunRecord = EMPTY_RECORD  # what the journal has of this run, if it was read
    is_suspect: bool = False
    refusal: Refused | None = None
    secrets: str = ""  # which fields are secret, for a job that has failed
    plain: bool = False  # a first delivery without deadline, document, history, claim, or a wish for another lane

    @functools.cached_property
    def family(self) -> Family:
        return self.raw.family

    def run_of(self, delivery: Delivery) -> subjects.ParentRun:
        """Return the run under which the job keeps its checkpoints: a replay goes on from those of the run before."""
        resumed = self.raw.headers.get(headers.RESUMES, "")
        kept = subjects.kept_run(delivery.run, delivery.enqueued_at, resumed)
        return subjects.ParentRun(self.family.name, self.job_id, kept)

    @functools.cached_property
    def fingerprint(self) -> str:
        """That of the body; "" in a family without `fingerprint`. A suspect's is what its run has stated before."""
        if self.is_suspect and self.data is None:
            return self.record.recap.fingerprint if self.record.recap is not None else ""
        return fingerprint_of(self.family, self.data, self.raw.body)

    def note_failure(self, worker: str, error: str, trace: str) -> None:
        """Add this failed attempt to the history, of which at most HISTORY_MAX entries are kept."""
        entry: dict[str, Any] = {"attempt": self.attempt, "at": round(time.time(), 3), "worker": worker, "error": error}
        if trace:
            entry["traceback"] = trace
        self.history = [*(self.history or []), entry][-HISTORY_MAX:]

    @property
    def refused_before(self) -> bool:
        """Whether an earlier delivery refused the job, and it was parked because the dead letters were full."""
        return headers.PARKED in self.raw.headers and self.raw.headers.get(headers.REASON) in REASONS


class PlainJob(OpenedJob):
    """A plain first delivery, opened. `raw` is made only if it is asked for.

    `message`: what its handler is called with, if that was read already, to know its cost.
    """

    plain = True
    message: Any = None

    def __init__(self, family: Family, delivery: Delivery, kind: str, job_id: str, data: dict[str, Any]) -> None:
        """The fields that are not set here have the defaults of the class."""
        self.family = family
        self._delivery = delivery
        self.kind = kind
        self.job_id = job_id
        self.data = data

    @functools.cached_property
    def raw(self) -> RawJob:  # type: ignore[override]
        return _raw_job(self.family, self._delivery)


class Opener:
    """Opens the deliveries of one worker."""

    def __init__(
        self, journal: Journal, documents: Documents, families: Mapping[str, Family], quarantine: Quarantine
    ) -> None:
        self._journal = journal
        self._documents = documents
        self._families = families
        # of families whose first deliveries need neither a claim nor a look at their headers
        self._short = {name: each for name, each in families.items() if not (each.claim or each.header_fields)}
        self._quarantine = quarantine

    def open_first(self, delivery: Delivery) -> OpenedJob | None:
        """Open a plain first delivery without any request to the server. None: `open` must open it.

        This is the fast path, for most jobs. For a delivery that it opens, `open` would return the same.
        """
        plain, key = delivery.plain, delivery.lane.key
        if plain is None or delivery.delivery_count > 1:
            return None
        kind, job_id, priority, content_type = plain
        if priority != key.priority:
            return None
        family = self._short.get(key.family)
        if family is None or self._quarantine.is_suspect(delivery):
            return None
        version = None
        try:
            if kind:
                data = codec.decode_map(delivery.message.data, content_type)
            else:
                kind, version, data = codec.decode_message(
                    delivery.message.data, content_type=content_type, default_kind=family.default_kind,
                    aliases=family.aliases,
                )  # fmt: skip
        except DecodeError:
            return None
        if version is not None and version not in family.schema_versions:
            return None
        opened = PlainJob(family, delivery, kind, job_id, data)
        if version is not None:
            opened.version = version
        return opened

    async def open(self, delivery: Delivery) -> OpenedJob:
        """Open any delivery: fetch and decode its body, and load the attempts before this delivery.

        The body of a suspect is not decoded in this process, because decoding may be what killed its workers.
        """
        family = self._families[delivery.lane.key.family]
        raw = _raw_job(family, delivery)
        refusal = None
        if malformed := headers.find_malformed(raw.headers):
            refusal = Refused("invalid", malformed)
        elif headers.DOCUMENT in raw.headers:
            raw, refusal = await self._fetch_body(raw)
        maybe_suspect = self._quarantine.is_suspect(delivery)
        if refusal is not None:
            known = attempt.decode_headers_only(raw) or attempt.decode_headers_or_defaults(raw)
            opened = OpenedJob(**vars(known), raw=raw, refusal=refusal)
        elif maybe_suspect:
            opened = await self._identify_suspect(raw)
        else:
            opened = OpenedJob(job_id="", kind="", raw=raw)
            _decode(opened)
        opened.history = history_of(raw.headers)
        if headers.PARKED in raw.headers:
            opened.attempt = opened.first_attempt = max(1, headers.number(raw.headers.get(headers.ATTEMPT, "")))
        if opened.refused_before:
            opened.refusal = Refused(raw.headers[headers.REASON], raw.headers.get(headers.ERROR, ""))
        if may_have_history(delivery, opened) and family.journal:
            subject = subjects.journal(family.journal, delivery.tenant, opened.job_id)
            await self.load_earlier_attempts(delivery, opened, subject)
        if maybe_suspect:
            self._decide_suspect(delivery, opened)
        return opened

    def _decide_suspect(self, delivery: Delivery, opened: OpenedJob) -> None:
        """Decide whether the job is a suspect, now that its failed attempts are known. If not, decode its body."""
        opened.is_suspect = self._quarantine.is_suspect(delivery, opened.attempt - opened.first_attempt + 1)
        if not opened.is_suspect and opened.data is None and opened.refusal is None:
            _decode(opened)

    async def _fetch_body(self, raw: RawJob) -> tuple[RawJob, Refused | None]:
        """Return the job with the body from its document, or unchanged with the reason why there is none.

        Raises Unavailable.
        """
        try:
            return raw._replace(body=await self._documents.read_body(raw.tenant, raw.headers)), None
        except (NotFound, Corrupt, BadInput) as error:
            return raw, Refused("document", str(error))

    async def _identify_suspect(self, raw: RawJob) -> OpenedJob:
        """Open a suspect with id and kind only. If reading its body killed a child process, it is refused."""
        found = await self._quarantine.identify(raw)
        if isinstance(found, Refused):
            return OpenedJob(**vars(attempt.decode_headers_or_defaults(raw)), raw=raw, refusal=found)
        return OpenedJob(**vars(found), raw=raw)

    async def load_earlier_attempts(self, delivery: Delivery, opened: OpenedJob, subject: str) -> None:
        """Read this run's journal into `opened`: its record, the number of this attempt, the history of failures.

        The recap is the newest `started` or `retry`. After a `retry` this is the next attempt; after a `started` that
        ended without an entry the same attempt runs once more, because a lost worker does not count as a failure.
        """
        parking_id = headers.parking_id(opened.raw.headers)
        record = opened.record = await self._journal.read_run(subject, delivery.run, delivery.enqueued_at, parking_id)
        if record.recap is not None and isinstance(record.recap.data, dict):
            number = record.recap.attempt + (record.recap.event == RETRY)
            history = record.recap.data.get("history")
            if isinstance(history, list) and number >= opened.attempt:
                opened.history = [each for each in history if isinstance(each, dict)]
        else:
            number = record.newest.attempt if record.newest else 1
        opened.attempt = max(opened.first_attempt, number)


def _decode(opened: OpenedJob) -> None:
    """Decode the body. A job whose header contradicts it is refused, by a handler of every kind too."""
    attempt.decode_into(opened.raw, opened)
    if opened.contradiction:
        opened.refusal = Refused("invalid", opened.contradiction)


def _raw_job(family: Family, delivery: Delivery) -> RawJob:
    """Return what an attempt needs of a delivery."""
    message = delivery.message
    return RawJob(
        family, delivery.tenant, delivery.lane.key.priority, delivery.seq, delivery.enqueued_at,
        message.headers, message.data, delivery.stored_at,
    )  # fmt: skip


def may_have_history(delivery: Delivery, opened: OpenedJob) -> bool:
    """Return whether the journal may have entries of earlier deliveries, as far as this one alone shows."""
    if delivery.delivery_count > 1 or opened.first_attempt > 1:
        return True
    given = opened.raw.headers
    return not opened.plain and (headers.UNKNOWN in given or headers.GATHER in given or headers.was_moved(given))
