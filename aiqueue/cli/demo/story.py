"""The stages of the demo, on an open client."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...client import Client
from ...enqueue import DeadLetter, Filter
from ...errors import AIQueueError
from ...inspect import stats
from . import analysis, view
from .handlers import BROKEN_NAME, DemoDocument, DemoHandlers, Feed
from .ledger import ANALYSIS, FAMILIES, INGEST, JournalReader, Ledger
from .view import JobBoard, Screen, short_name

TICK_S = 0.1
STUCK_S = 20.0  # without a new journal entry: stop waiting and report what is missing
LOCK_ATTEMPTS = 2  # failed attempts at the locked document before its lock is released
PRIORITIES = ("normal", "high", "normal", "low")
TERMS_SHOWN = 8
LETTERS_SHOWN = 3


class Demo:
    """One run of the demo on an open client."""

    def __init__(self, client: Client, screen: Screen, tenants: tuple[str, ...], locks: Path) -> None:
        self._client = client
        self._screen = screen
        self._ledger = Ledger(tenants)
        self._board = JobBoard(self._ledger)
        self._locks = locks
        self._handlers = DemoHandlers(client, self._ledger, locks)
        self._journals = JournalReader(client, tenants)
        self._fed_s = 0.0

    async def run(self, feed: Feed) -> dict[str, Any]:
        """Run all stages and return the report as plain data."""
        screen = self._screen
        screen.say(f'Injected fault 1: the demo holds the lock of "{short_name(feed.locked[1].name)}".', "magenta")
        screen.say(
            f'Injected fault 2: "{BROKEN_NAME}" is encoded in Windows-1252, but the handler reads UTF-8.',
            "magenta",
        )
        self._locks.mkdir()
        started_at = time.monotonic()
        async with self._handlers.worker().running(self._client):
            feeding = asyncio.create_task(self._enqueue(feed))
            try:
                with screen.watching(self._board):
                    with self._handlers.lock(feed.locked[0]):
                        await self._watch(feeding, until_retries_of=feed.locked[0])
                    screen.say("Fault 1 is fixed: the lock is released.", "magenta")
                    await self._watch(feeding)
            finally:
                feeding.cancel()
            letters = await self._find_letters()
            await self._replay(letters)
        families = await stats.overview(self._client.connection, self._client.topology, sample_s=0)
        report = await self._report(feed, letters, families, time.monotonic() - started_at)
        screen.show(
            view.jobs(report["jobs"], report["total"]), view.findings(report["findings"]), view.overview(families)
        )
        return report

    async def _enqueue(self, feed: Feed) -> None:
        started_at = due_at = time.monotonic()
        tenants = self._ledger.tenants
        for index, (document_id, source) in enumerate(feed.documents):
            tenant = tenants[index % len(tenants)]
            track = self._ledger.expect(INGEST, tenant, document_id, source.name)
            await self._client.enqueue(
                DemoDocument(document_id=document_id, path=source.name, content=source.content),
                tenant=tenant,
                priority=PRIORITIES[index // len(tenants) % len(PRIORITIES)],
                unique=document_id,
                on_full="wait",
            )
            track.stored = True
            due_at += feed.step_s
            await asyncio.sleep(max(0.0, due_at - time.monotonic()))
        self._fed_s = time.monotonic() - started_at

    async def _watch(self, feeding: asyncio.Task[None] | None, *, until_retries_of: str | None = None) -> None:
        """Follow the journals until all jobs have ended, or until document `until_retries_of` has failed often enough.

        Also returns after STUCK_S seconds without a new entry. Raises what `feeding` raised.
        """
        ledger, screen = self._ledger, self._screen
        last_entry_at = time.monotonic()
        while time.monotonic() - last_entry_at < STUCK_S:
            fed = feeding is None or feeding.done()
            if feeding is not None and fed:
                feeding.result()
            with contextlib.suppress(AIQueueError):  # no server answers now: the entries are read later
                for family, job_id, entry in await self._journals.read_new():
                    last_entry_at = time.monotonic()
                    if line := ledger.add_entry(family, job_id, entry):
                        screen.event(line)
            screen.tick(self._board)
            if until_retries_of is not None:
                locked = ledger.tracks.get((INGEST, until_retries_of))
                if locked is not None and locked.retries >= LOCK_ATTEMPTS:
                    return
            elif fed and ledger.settled:
                return
            await asyncio.sleep(TICK_S)

    async def _find_letters(self) -> list[DeadLetter]:
        """Return the dead letters of this run."""
        return [
            letter
            for tenant in self._ledger.tenants
            async for letter in self._client.dead.find(Filter(tenant=tenant))
            if letter.lane.family in FAMILIES
        ]

    async def _replay(self, letters: list[DeadLetter]) -> None:
        screen, ledger = self._screen, self._ledger
        if not letters:
            return
        paths = [ledger.tracks[letter.lane.family, letter.job_id].path for letter in letters]
        screen.show(*map(view.dead_letter, letters[:LETTERS_SHOWN], paths))
        if len(letters) > LETTERS_SHOWN:
            screen.say(f"and {len(letters) - LETTERS_SHOWN} more dead letters")
        self._handlers.charsets.append("cp1252")
        screen.say("Fault 2 is fixed: the handler falls back to Windows-1252. Replaying dead letters.", "magenta")
        for letter in letters:
            ledger.mark_replayed(letter)
            await self._client.dead.replay(letter)
        with screen.watching(self._board):
            await self._watch(None)

    async def _report(
        self, feed: Feed, letters: list[DeadLetter], families: list[stats.FamilyStats], took_s: float
    ) -> dict[str, Any]:
        ledger, remaining = self._ledger, await self._find_letters()
        missing = ledger.missing()
        total = ledger.total()
        sums = total["enqueued"] == total["succeeded"] == 2 * len(feed.documents)
        return {
            "ok": sums and not missing and not remaining,
            "documents": len(feed.documents),
            "jobs": ledger.rows(),
            "total": total,
            "missing": missing,
            "dead_letters": [letter.summary() for letter in letters],
            "dead_letters_left": len(remaining),
            "findings": self._findings(),
            "families": [asdict(each) for each in families],
            "fed_per_s": round(len(feed.documents) / self._fed_s, 1) if self._fed_s else None,
            "paced": self._fed_s < 1.1 * feed.step_s * len(feed.documents),  # False: at full speed
            "seconds": round(took_s, 2),
        }

    def _findings(self) -> list[dict[str, Any]]:
        """Summarise the analyses of each tenant's documents, whose results come from the journals."""
        by_tenant = {
            tenant: [track for track in self._ledger.of(tenant, ANALYSIS) if track.result]
            for tenant in self._ledger.tenants
        }
        terms = analysis.distinctive(
            {tenant: [track.result["terms"] for track in found] for tenant, found in by_tenant.items()}, TERMS_SHOWN
        )
        rows = []
        for tenant, found in by_tenant.items():
            prose = [track for track in found if track.result["reading_ease"] is not None]
            hardest = min(prose, key=lambda track: (track.result["reading_ease"], track.path), default=None)
            languages = Counter(track.result["language"] for track in found)
            rows.append(
                {
                    "tenant": tenant,
                    "documents": len(found),
                    "words": sum(track.result["words"] for track in found),
                    "languages": dict(languages.most_common()),
                    "hardest": hardest and {"path": hardest.path, "reading_ease": hardest.result["reading_ease"]},
                    "terms": terms[tenant],
                }
            )
        return rows
