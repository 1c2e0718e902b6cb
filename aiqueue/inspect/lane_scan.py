"""Finds a job in its lane by its id, which the lanes have no index of: by its sequence or time, or by reading all."""

from __future__ import annotations

import contextlib
import re
from typing import Any

from .. import codec, headers, subjects
from ..connection import Connection, Stored
from ..errors import DecodeError, NotFound
from ..topology import Family

SCAN_JOBS_MAX = 10_000  # stored jobs that are read from the first on to find a job without a journal, over all families
SCAN_BYTES_MAX = 64 * 1024 * 1024
DEEP = 50  # times as many where somebody has named the family and the tenant, and waits for some seconds
EARLIER_S = (0.0, 0.05, 1.0, 60.0)  # how long before the time in its id a job is looked for: clocks differ
LATER_S = 120.0  # how long after: a job may wait for a full lane before it is stored
MOVED_SLACK_S = 0.05  # how much earlier than its journal says a job may be in its lane: servers' clocks differ

_STREAM_ID = re.compile(r"s(\d{1,19})-([0-9a-f]{1,16})")  # id of a plain publisher's job: attempt/decoding.py


class LaneScan:
    """Looks for one job id in lanes. `limited`: there were more stored jobs to read than the limits allow."""

    def __init__(
        self, connection: Connection, job_id: str, made_at: float | None = None, *, deep: bool = False
    ) -> None:
        """`made_at`: when the id was made, seconds since the epoch, if it does not say it. `deep`: DEEP times as many
        jobs are read from the first one on.
        """
        self.limited = False
        self._connection = connection
        self._job_id = job_id
        self._made_at = made_at or subjects.made_at(job_id)
        self._from_start = _ScanAllowance(DEEP if deep else 1)
        self._near = [_ScanAllowance() for _ in EARLIER_S]

    @property
    def searched(self) -> str:
        """Which stored jobs were read, in words."""
        first = f"the first {self._from_start.jobs_max - self._from_start.jobs:,} stored jobs"
        return first if self._made_at is None else f"{first} and those stored when its id was made"

    async def get(self, family: Family, seq: int, tenant: str) -> Stored | None:
        """Return the message at a sequence, if it is the job. `tenant` may be ``*``."""
        try:
            stored = await self._connection.get(family.stream, seq)
        except NotFound:
            return None
        if stored is None or tenant not in ("*", subjects.tenant_of(stored.subject)):
            return None
        return stored if has_id(stored, family, self._job_id) else None

    async def find(self, family: Family, tenant: str) -> Stored | None:
        """Return the job among the stored jobs of a family and tenant (``*``: all tenants), within the limits.

        1. The id of a plain publisher's job names its sequence.
        2. An id that aiqueue made has its time: read what was stored then. A delayed job is stored later.
        3. Read from the first stored job on.
        """
        if stream_id := _STREAM_ID.fullmatch(self._job_id):
            return await self.get(family, int(stream_id[1]), tenant)
        if self._made_at is not None:
            until = self._made_at + LATER_S
            for earlier_s, limits in zip(EARLIER_S, self._near, strict=True):
                since = max(0.0, self._made_at - earlier_s)
                stored = await self._read(family, tenant, limits, since, until)
                if stored is not None:
                    return stored
                until = since
        stored = await self._read(family, tenant, self._from_start, None, None)
        self.limited |= stored is None and self._from_start.are_reached
        return stored

    async def find_moved(self, family: Family, tenant: str, key: str, moved_at: float) -> Stored | None:
        """Return the job in the lane of this value of its limited key, where a worker has moved it at that time."""
        for token in (subjects.hashed(key), subjects.REST):
            where = subjects.lane(family.name, tenant, "*", token)
            since, until = max(0.0, moved_at - MOVED_SLACK_S), moved_at + LATER_S
            stored = await self._read(family, tenant, _ScanAllowance(), since, until, where=where)
            if stored is not None:
                return stored
        return None

    async def _read(
        self, family: Family, tenant: str, limits: _ScanAllowance, since: float | None, until: float | None,
        *, where: str = "",
    ) -> Stored | None:  # fmt: skip
        """Return the job among those stored from `since` to `until` (None: all), within the limits. `where`: on these
        subjects, by default on all of the tenant's.
        """
        where = where or f"ai.{family.name}.{tenant}.{'>' if family.limit_key else '*'}"
        with contextlib.suppress(NotFound):
            read = self._connection.read(family.stream, where, since=since)
            async with contextlib.aclosing(read) as found:
                async for stored in found:
                    if (until is not None and stored.time > until) or not limits.take(stored):
                        return None
                    if has_id(stored, family, self._job_id):
                        return stored
        return None


class _ScanAllowance:
    """How much a scan may still read."""

    def __init__(self, times: int = 1) -> None:
        self.jobs_max = self.jobs = SCAN_JOBS_MAX * times
        self.bytes = SCAN_BYTES_MAX * times
        self.are_reached = False

    def take(self, stored: Stored) -> bool:
        """Count a stored job that is read. False: the limits do not allow it."""
        if self.jobs <= 0 or self.bytes <= 0:
            self.are_reached = True
            return False
        self.jobs, self.bytes = self.jobs - 1, self.bytes - len(stored.data)
        return True


def has_id(stored: Stored, family: Family, job_id: str) -> bool:
    """Whether a stored job has this id. It is in the library's header, or the caller's key is, or a body's field."""
    job_headers = dict(stored.headers)
    headers.restore_case(job_headers)
    stored = stored._replace(headers=job_headers)
    found: Any = job_headers.get(headers.JOB_ID)
    if not found and family.key:
        found = headers.find(job_headers, family.key) or _key_in_body(stored, family, family.key)
    if isinstance(found, str | int) and str(found):
        return subjects.foreign_id(str(found)) == job_id
    stream_id = _STREAM_ID.fullmatch(job_id)
    if stream_id is None or int(stream_id[1]) != stored.seq:
        return False
    return abs(int(stream_id[2], 16) - stored.time * 1e6) < 2  # microseconds, rounded either way


def _key_in_body(stored: Stored, family: Family, key: str) -> Any:
    try:
        incoming = codec.decode_message(
            stored.data,
            content_type=stored.headers.get(headers.CONTENT_TYPE, ""),
            kind=stored.headers.get(headers.KIND, ""),
            default_kind=family.default_kind,
            aliases=family.aliases,
        )
    except DecodeError:
        return None
    return incoming.data.get(key)
