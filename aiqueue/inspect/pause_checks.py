"""Doctor's checks of pauses: what is paused, by whom and since when, and which workers do not heed that."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import AsyncIterator, Collection

from .. import units
from ..errors import AccessDenied, NotFound
from ..lanes import Pause, Record, StoredPauses, WorkerRecords
from .finding import Finding, Subject, warn
from .pauses import read_key_pauses

SHOWN_MAX = 3


async def check_pauses(subject: Subject) -> AsyncIterator[Finding]:
    """Check what is paused, and whether a live worker goes on all the same."""
    of_keys: list[Pause] = []
    try:
        pauses = await StoredPauses(subject.connection, subject.topology).read()
    except NotFound:
        return  # the stream has a finding already
    with contextlib.suppress(NotFound):
        of_keys = await read_key_pauses(subject.connection, subject.topology)
    now = subject.connection.clock.now()
    for pause in [*pauses, *of_keys]:
        text = f"{pause}, since {units.short_duration(max(0.0, now - pause.since))}"
        if pause.until is not None:
            text += f", for another {units.short_duration(max(0.0, pause.until - now))}"
        yield warn("pauses", "paused", text, scope=_options(pause))
    records: list[Record] = []
    with contextlib.suppress(NotFound, AccessDenied):
        records = await WorkerRecords(subject.connection, subject.topology).read() if pauses else []
    if heedless := find_heedless(records, pauses):
        more = f" and {len(heedless) - SHOWN_MAX} more" if len(heedless) > SHOWN_MAX else ""
        names = ", ".join(heedless[:SHOWN_MAX]) + more
        yield warn("pauses", "pause-unheeded", f"workers that go on with what is paused: {names}")


def find_heedless(records: Collection[Record], pauses: Collection[Pause]) -> list[str]:
    """Return the names of the workers of paused families that know of no pauses, sorted.

    They are of a former version, or may not read the pauses.
    """
    paused = {each.family for each in pauses}
    found = []
    for each in records:
        kinds = each.get("kinds")
        if each.get("heeds_pauses") is not True and isinstance(kinds, dict) and not paused.isdisjoint(kinds):
            found.append(str(each.get("worker")))
    return sorted(found)


def _options(pause: Pause) -> str:
    """Return the arguments that name the pause on the command line."""
    tenant = f" --tenant {pause.tenant}" if pause.tenant else ""
    key = f" --key {shlex.quote(pause.key)}" if pause.key else ""
    return f"{pause.family}{tenant}{f' --kind {pause.kind}' if pause.kind else ''}{key}"
