"""Writes results to journals. A large one is stored as a document first, and its entry is a reference.

The order is that of a job with a large body (docs/decisions/documents.md): the hold, the document, the journal entry.
The caller then acknowledges the job. A crash between two of them repeats the attempt, and leaves at most a hold that
expires, without which the collector deletes the document.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from .. import codec
from ..documents import Documents
from ..errors import AccessDenied, EncodeError, QueueFull, Stale, TooLarge, Unavailable
from ..journal import RESULT, Writer
from ..payload import HeldDocument
from .overflow import NO_ROOM_S, Overflow, write_within


class ResultRefused(Exception):
    """A large result cannot be stored as a document. The text says what to do."""


class Results:
    """Writes the results of one worker's attempts."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents
        self._inline_max = documents.inline_max
        self.overflow = Overflow()

    async def write(self, writer: Writer, value: object, *, tenant: str, kept_s: float | None) -> None:
        """Write a result. `kept_s`: for how long its entry is kept; None: as long as the journal's stream keeps it.

        While the server has no space for the entry, announce it, and let `Overflow` write it later. Raises EncodeError,
        TooLarge, ResultRefused, Stale.
        """
        encoded = codec.encode_marked(value)
        if len(encoded.body) <= self._inline_max:
            await self._write_entry(writer, encoded, None)
            return
        held = await self._hold(tenant, encoded.body, kept_s)
        reference = codec.Encoded(codec.encode(held.entry), encoded.secrets)
        try:
            await self._write_entry(writer, reference, held.headers)
        except (Stale, EncodeError, TooLarge):  # nothing was stored; after any other error, the entry may be
            await self._documents.end_result(held)
            raise

    async def _write_entry(self, writer: Writer, encoded: codec.Encoded, extra: Mapping[str, str] | None) -> None:
        if not await self.overflow.write_or_defer(writer.subject, lambda: writer.write(RESULT, encoded, extra=extra)):
            with contextlib.suppress(Unavailable):
                await writer.announce(RESULT, encoded, extra=extra)

    async def _hold(self, tenant: str, body: bytes, kept_s: float | None) -> HeldDocument:
        """Store a large result; without space for it, try for NO_ROOM_S. Raises ResultRefused, Unavailable."""
        held: list[HeldDocument] = []

        async def hold() -> None:
            held.append(await self._documents.hold_result(tenant, body, kept_s))

        what = f"{len(body):,} bytes cannot be stored as a document"
        try:
            problem = await write_within(hold, NO_ROOM_S, QueueFull)
        except AccessDenied as error:
            raise ResultRefused(
                f"{what}: {error}: give the worker's user the permissions of docs/operations/permissions.md, "
                "then replay this job"
            ) from None
        if problem is not None:
            raise ResultRefused(
                f"{what}: {getattr(problem, 'reason', problem)}: free space in {self._documents.objects.stream} "
                "(`aiqueue documents ls`), or raise max_bytes in streams/documents.toml, then replay this job"
            )
        return held[0]
