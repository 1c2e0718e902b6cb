"""Fingerprints of bodies: in a family with `fingerprint`, an id is of one body. docs/decisions/claims.md tells why.

The journal has the fingerprint of the body that was run under an id. A worker refuses another one. What is here lets
those who publish know at once.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any

from .. import codec, headers, subjects
from ..connection import Connection, read_headers
from ..documents import Documents
from ..errors import AccessDenied, AIQueueError, DecodeError, IdReused
from ..topology import Family, Topology

DENIED_S = 300.0  # until the next look, where this user may not look


def fingerprint_of(family: Family, data: Mapping[str, Any] | None, body: bytes) -> str:
    """Return the fingerprint of a message with this data: 32 digits. `body`: of one that cannot be decoded.

    The order of keys does not count, nor do a field that is null, the family's key, and the fields that its
    `fingerprint` ignores. The fields that headers may state have 16 digits of their own, after a dash, because a
    request may leave them out. Compare by `is_other_body`. "" in a family without `fingerprint`.
    """
    if family.fingerprint is None:
        return ""
    if data is None:
        return hashlib.sha256(body).hexdigest()[:32]
    left_out = {family.key, *family.fingerprint, *family.header_fields}
    counted = {name: value for name, value in data.items() if value is not None and name not in left_out}
    stated = {name: str(data[name]) for name in family.header_fields if data.get(name) not in (None, "")}
    return _hashed(counted)[:32] + (f"-{_hashed(stated)[:16]}" if stated else "")


def is_other_body(known: str, fingerprint: str) -> bool:
    """Whether two fingerprints are of different bodies. False also if one is not known ("")."""
    if not known or not fingerprint:
        return False
    (one, _, stated), (other, _, also) = known.partition("-"), fingerprint.partition("-")
    return one != other or bool(stated and also and stated != also)


def fingerprint_of_body(family: Family, body: bytes, job_headers: Mapping[str, str]) -> str:
    """As `fingerprint_of`, for a body as it is stored, with its headers."""
    data = None
    if family.fingerprint is not None:
        with contextlib.suppress(DecodeError):
            data = codec.decode_message(
                body, content_type=job_headers.get(headers.CONTENT_TYPE, ""), kind=job_headers.get(headers.KIND, ""),
                default_kind=family.default_kind, aliases=family.aliases,
            ).data  # fmt: skip
            headers.take_fields(job_headers, family.header_fields, data)
    return fingerprint_of(family, data, body)


def id_reused(job_id: str) -> IdReused:
    """Return the error of a job whose id is that of another body."""
    return IdReused(f"job {job_id} was stored with another body: use a new id, or send again what was sent before")


class Fingerprints:
    """Compares the bodies of one client's new jobs with those that are known under their ids."""

    def __init__(self, connection: Connection, topology: Topology, documents: Documents) -> None:
        self._connection = connection
        self._journal = topology.journal_stream.name
        self._documents = documents
        self._denied_until = 0.0  # monotonic seconds

    async def of_new(self, family: Family, tenant: str, job_id: str, header_block: bytes, body: bytes) -> str:
        """Return the fingerprint of a job that is about to be stored under an id of the caller's; "" without them.

        Raises what `check_run` raises.
        """
        if family.fingerprint is None:
            return ""
        fingerprint = fingerprint_of_body(family, body, read_headers(header_block)[0])
        await self.check_run(family, tenant, job_id, fingerprint)
        return fingerprint

    async def check_run(self, family: Family, tenant: str, job_id: str, fingerprint: str) -> None:
        """Raise IdReused if a run of this id, of another body, has begun, and has not failed.

        Where that cannot be found out now, nothing is raised: workers refuse such a job.
        """
        if not fingerprint or time.monotonic() < self._denied_until:
            return
        try:
            known = await find_fingerprint(self._connection, self._journal, family, tenant, job_id)
        except AccessDenied:
            self._denied_until = time.monotonic() + DENIED_S
        except AIQueueError:
            return
        else:
            if is_other_body(known, fingerprint):
                raise id_reused(job_id)

    async def check_stored(
        self, family: Family, tenant: str, job_id: str, fingerprint: str, stream: str, seq: int
    ) -> None:
        """As `check_run`, for a job that the server knows: it may still be stored, in this stream at this sequence."""
        stored = None
        if fingerprint:
            with contextlib.suppress(AIQueueError):
                stored = await self._connection.get(stream, seq)
        if stored is None or stored.headers.get(headers.JOB_ID, job_id) != job_id:
            await self.check_run(family, tenant, job_id, fingerprint)
            return
        body = stored.data
        if headers.DOCUMENT in stored.headers:
            try:
                body = await self._documents.read_body(tenant, stored.headers)
            except AIQueueError:
                return
        known = dict(stored.headers)
        headers.restore_case(known)
        if is_other_body(fingerprint_of_body(family, body, known), fingerprint):
            raise id_reused(job_id)


async def find_fingerprint(connection: Connection, stream: str, family: Family, tenant: str, job_id: str) -> str:
    """Return the fingerprint of the body that runs or has run under an id, from its journal in `stream`.

    "": none has begun, or only runs that have failed or were cancelled, or it is not known any more. Raises
    Unavailable, AccessDenied.
    """
    subject = subjects.journal(family.journal or "", tenant, job_id)
    newest = await connection.last(stream, subject)
    if newest is None or newest.headers.get(headers.EVENT) in ("failed", "cancelled"):
        return ""
    if headers.FINGERPRINT in newest.headers:
        return str(newest.headers[headers.FINGERPRINT])
    found = ""
    async for stored in connection.read(stream, subject):  # such as chunks: its `started` is before them
        found = stored.headers.get(headers.FINGERPRINT, found)
    return found


def _hashed(fields: dict[str, Any]) -> str:
    try:
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_in_json)
    except TypeError:  # keys of several types, in CBOR
        return hashlib.sha256(codec.encode(sorted(fields.items()))).hexdigest()
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _in_json(value: Any) -> str:
    """Return what JSON has no type for, as text."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
