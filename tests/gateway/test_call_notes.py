"""What a job's notes say of its run: what has failed in it, and how many attempts have ended without a note."""

from __future__ import annotations

from typing import Any

from aiqueue.gateway.call_notes import CallNotes

RUN = 1_000.0


def own(**note: Any) -> dict[str, Any]:
    return {**note, "run": RUN}


def test_failures_and_waits_are_those_of_this_run_since_it_was_parked() -> None:
    notes = [
        {"call": "a"}, {"refused": "a", "run": RUN - 1}, {"failed": "timeout", "run": RUN - 1}, {"call": "b"},
        own(failed="rate_limited"), {"call": "c"}, own(refused="c"),
    ]  # fmt: skip
    before = CallNotes.read(notes, RUN)
    assert (before.calls, before.failures, before.waits, before.parked) == (["b"], ["rate_limited"], 1, "")
    notes += [own(parked="2026-11", attempt=3), {"call": "d"}, own(failed="server")]
    after = CallNotes.read(notes, RUN)
    assert (after.calls, after.failures, after.waits, after.parked) == (["b", "d"], ["server"], 0, "2026-11")


def test_attempts_without_a_note_are_counted_from_the_last_parking() -> None:
    notes = [own(failed="rate_limited")] * 30 + [{"call": "c"}, own(refused="c")]
    assert [CallNotes.read(notes, RUN).unnoted(attempt) for attempt in (32, 33, 40)] == [0, 1, 8]
    notes += [own(parked="2026-11", attempt=40), own(failed="server")]
    assert [CallNotes.read(notes, RUN).unnoted(attempt) for attempt in (41, 42, 45)] == [0, 0, 3]
