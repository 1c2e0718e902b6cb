"""aiqueue beside the queues that its users would otherwise use: rounds, rows, and what is to be said of them."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aiqueue.errors import BadInput

from ..report import OURS, RAW, Row
from . import venvs
from .catalogue import PEERS, Peer
from .processes import Failed
from .servers import SERVERS
from .trial import (
    CPU_ALL,
    CPU_PRODUCER,
    CPU_SERVER,
    CPU_WORKER,
    DRAIN,
    DRAIN_TWO,
    MANY,
    MEMORY,
    ONE,
    PERCENTILES,
    QUIET_CORES,
    Figure,
    Plan,
    Trial,
    latency,
)

QUESTION = "peers"
BEST = 4  # peers that are measured again after the first round, beside aiqueue and raw nats-py
METHOD = (
    f"aiqueue and raw nats-py run in every round, all others in the first, the {BEST} fastest at draining in all.",
    "A job is a no-op with i, t and 160 characters; its handler writes 24 bytes. Every job is checked to have run.",
    "Enqueueing is timed in the producer's process, its start and connection excluded; its CPU is its own rusage.",
    "A drain goes from the first handler to the last, so the second worker's later start counts in that of two.",
    "CPU of worker and server: user and system, all their processes, from the first handler to 0.2 s past the last.",
    "The server's CPU has that of the bulk enqueue, too. A worker's start is in neither.",
    "Memory is the resident memory of all processes of a worker after its drain, summed.",
    "Latency: one worker, an open loop whose producer awaits each call, without the first second.",
    "It goes from the call, or from its schedule where the producer was more than 5 ms late, to the handler's start.",
)
CLEAN_MIN = 2  # rounds without much use by others, for the other rounds to be left out


@dataclass
class Comparison:
    """The rows, the peers that could not be measured here and why, and what a reader of the figures must know.

    `failed` has the steps that lost a job or did not work; their rows' `how` begins with FAILED.
    """

    rows: list[Row]
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        return {
            "rows": [asdict(row) for row in self.rows],
            "skipped": self.skipped,
            "notes": self.notes,
            "failed": self.failed,
            "method": METHOD,
        }


def run(
    *, rounds: int, jobs: int, only: Collection[str] | None, scratch: Path, say: Callable[[str], None]
) -> list[Row]:
    """The rows of `compare`."""
    return compare(Plan(rounds=rounds, jobs=jobs), only=only, scratch=scratch, say=say).rows


def compare(plan: Plan, *, only: Collection[str] | None, scratch: Path, say: Callable[[str], None]) -> Comparison:
    """All peers, or those with these keys, on fresh servers below `scratch`; call it in the main thread.

    Raises BadInput for a peer that is not known, and where there is no Linux.
    """
    if sys.platform != "linux":
        raise BadInput("the comparison with other queues reads /proc: it needs Linux")
    peers = chosen(only)
    skipped: dict[str, str] = {}
    ready: dict[Peer, Path] = {}
    how: dict[str, str] = {}
    for peer in peers:
        try:
            ready[peer], how[peer.name] = _made_ready(peer, plan, say)
        except Failed as error:
            skipped[peer.name] = str(error)
            say(f"{peer.name}: skipped: {error}")
    figures, notes, failures = _rounds(plan, ready, scratch, say)
    rows, left_out = _rows(plan, figures, how, failures)
    failed = {f"{side}: {reason}" for sides in failures.values() for side, reason in sides.items()}
    return Comparison(rows, skipped, notes + left_out, sorted(failed))


def chosen(only: Collection[str] | None) -> list[Peer]:
    """The peers with these keys. Raises BadInput."""
    known = {peer.key for peer in PEERS}
    if unknown := sorted(set(only or ()) - known):
        raise BadInput(f"there is no peer {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return [peer for peer in PEERS if only is None or peer.key in only]


def _made_ready(peer: Peer, plan: Plan, say: Callable[[str], None]) -> tuple[Path, str]:
    """Its Python, and what is to be said of it. Raises Failed with the reason why it cannot be measured here."""
    server = SERVERS[peer.server]
    if reason := server.missing():
        raise Failed(reason)
    python = venvs.python(peer, say)
    jobs = f"{max(2, round(plan.jobs * peer.share)):,} jobs"
    version = venvs.version(python, peer.package)
    return (
        python,
        f"{peer.package} {version}, {server.kind} {server.version()}: {peer.how}; {server.durability}; {jobs}",
    )


def _rounds(
    plan: Plan, ready: dict[Peer, Path], scratch: Path, say: Callable[[str], None]
) -> tuple[list[Figure], list[str], dict[str, dict[str, str]]]:
    """The figures, the notes, and the failures by row and peer. Round 0 has all peers, later ones the best."""
    figures: list[Figure] = []
    notes: list[str] = []
    failures: dict[str, dict[str, str]] = {}
    peers = list(ready)
    for number in range(plan.rounds):
        for peer in peers:
            with tempfile.TemporaryDirectory(prefix="peer-", dir=scratch, ignore_cleanup_errors=True) as directory:
                Path(directory).chmod(0o711)
                trial = Trial(peer, plan, ready[peer], Path(directory))
                trial.run()
            figures += trial.figures
            notes += [f"round {number}: {note}" for note in trial.notes]
            for name, reason in trial.failures.items():
                failures.setdefault(name, {})[peer.name] = reason
            say(f"round {number}: {_told(trial)}")
        if number == 0:
            peers = best(peers, figures)
    return figures, notes, failures


def best(peers: list[Peer], figures: list[Figure]) -> list[Peer]:
    """aiqueue, raw nats-py, and the BEST others by the drain of one worker, in the old order."""
    rates = {figure.peer: figure.value for figure in figures if figure.name == DRAIN}
    others = [peer for peer in peers if peer.name not in (OURS, RAW) and peer in rates]
    kept = set(sorted(others, key=lambda peer: rates[peer], reverse=True)[:BEST])
    return [peer for peer in peers if peer.name in (OURS, RAW) or peer in kept]


def _told(trial: Trial) -> str:
    values = {figure.name: figure.value for figure in trial.figures}
    rates = [f"{name} {values[name]:,.0f}/s" for name in (ONE, MANY, DRAIN, DRAIN_TWO) if name in values]
    failed = [f"failed: {reason}" for reason in dict.fromkeys(trial.failures.values())]
    return f"{trial.peer.name}: {'; '.join([*rates, *failed])}"


def _rows(
    plan: Plan, figures: list[Figure], how: dict[str, str], failures: dict[str, dict[str, str]]
) -> tuple[list[Row], list[str]]:
    """One row a measurement, and a note for each side that others disturbed."""
    latencies = [latency(rate, percentile) for rate in plan.rates for percentile in PERCENTILES]
    units = dict.fromkeys((ONE, MANY, DRAIN, DRAIN_TWO), "/s") | dict.fromkeys(latencies, "ms")
    units |= dict.fromkeys((CPU_PRODUCER, CPU_WORKER, CPU_SERVER, CPU_ALL), "CPU s") | {MEMORY: "MiB"}
    rows: list[Row] = []
    disturbed: dict[str, list[tuple[float, bool]]] = {}
    for name, unit in units.items():
        row = Row(QUESTION, name, unit, how=dict(how))
        for side in how:
            mine = [figure for figure in figures if figure.name == name and figure.peer.name == side]
            clean = [figure for figure in mine if figure.others <= QUIET_CORES]
            kept = clean if len(clean) >= CLEAN_MIN else mine
            for figure in kept:
                row.add(side, figure.value)
            dirty = [(figure.others, kept is clean) for figure in mine if figure.others > QUIET_CORES]
            disturbed.setdefault(side, []).extend(dirty)
            if reason := failures.get(name, {}).get(side):
                row.how[side] = f"FAILED: {reason}; {row.how[side]}"
        rows.append(row)
    return rows, [_disturbance(side, dirty) for side, dirty in disturbed.items() if dirty]


def _disturbance(side: str, dirty: list[tuple[float, bool]]) -> str:
    """`dirty` has the cores that others used, and whether the figure was left out for it."""
    used = [cores for cores, _ in dirty]
    left_out = sum(out for _, out in dirty)
    return (
        f"{side}: other programs used {min(used):.2f} to {max(used):.2f} cores beside {len(dirty)} figures: "
        f"{left_out} are left out, {len(dirty) - left_out} kept for want of {CLEAN_MIN} better ones"
    )
