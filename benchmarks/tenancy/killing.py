"""Whether each job is run, and once, while workers are killed -9, or are of two versions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from ..chaos import checker, records
from ..chaos.checker import Evidence
from ..chaos.nemesis import Fault
from ..chaos.records import Line, Run
from ..common import until
from ..scenarios import Finding
from .app import START
from .bench import Asked, Entry, accounts, ground

KILLED_JOBS, BOTH_JOBS = 150, 60  # of each tenant, at most
HANDLER_S = 0.002
ACK_WAIT_S = 15.0  # with a shorter one a busy machine's acks come too late
LEAST_SHARE = 0.02


def runs(entries: Iterable[Entry]) -> list[Run]:
    """The runs that the entries tell of: an end is that of the last run of the job in its process."""
    found: list[Run] = []
    last: dict[tuple[int, int], Run] = {}
    for each in entries:
        if each.what == START:
            run = last[each.pid, each.number] = Run(each.number, f"{each.pid}-{len(found)}", each.at)
            found.append(run)
        else:
            last[each.pid, each.number].end = each.at
    return sorted(found, key=lambda run: run.start)


def _told(found: Sequence[Run], number: int, faults: Sequence[Fault]) -> str:
    """The runs of a job in words, times from the first run of all."""
    begun = found[0].start
    ended = {fault.victim: f", killed at {fault.at - begun:.3f} s" for fault in faults}
    return "; ".join(
        f"run of {run.pid} from {run.start - begun:.3f} s to "
        f"{'no end' if run.end is None else f'{run.end - begun:.3f} s'}{ended.get(run.pid, '')}"
        for run in found if run.number == number
    )  # fmt: skip


async def _killed(asked: Asked, workers: int) -> list[Finding]:
    tenants, jobs = asked.tenants, min(asked.jobs, KILLED_JOBS)
    count = tenants * jobs
    async with ground(asked, former=(False,) * workers, ends=True, handler_s=HANDLER_S, ack_wait_s=ACK_WAIT_S) as here:
        await here.fill(tenants, jobs)
        here.workers.start()
        await until(lambda: here.entries > 0, lambda: f"no job had begun; the workers said: {here.tail()}")
        here.harm("worker-kill:2")
        left = await here.gone()
        await here.calm()
        here.workers.end()
        found = runs(here.read())
        enqueued = [Line(records.ACKED, number, "0", 0.0) for number in range(count)]
        verdict = checker.check(Evidence(enqueued, found, here.faults, None, (), left))
        dead = [each async for each in here.client.dead.find()]
    for number in verdict.unexplained:
        asked.say(f"  job {number}: {_told(found, number, here.faults)}")
    recovered = [each for every in checker.recoveries(found, here.faults) for each in every.elsewhere]
    return [
        Finding("jobs", count),
        Finding("jobs a second", count / (found[-1].start - found[0].start)),
        Finding("worker kills", len(here.faults), at_least=3),
        Finding("jobs that have not been run", len(verdict.lost), at_most=0),
        Finding("jobs left in the stream", left, at_most=0),
        Finding("dead letters", len(dead), at_most=0),
        Finding("runs in flight at a kill", verdict.in_flight),
        Finding("runs beyond a job's first", verdict.repeats, at_most=verdict.in_flight),
        Finding("of these, of a job that no kill had met", len(verdict.unexplained), at_most=0),
        Finding("longest wait of a killed worker's job, s", max(recovered, default=0.0)),
        Finding("workers that ended by themselves", len(here.workers.surprises), at_most=0),
    ]


async def kills_two(asked: Asked) -> list[Finding]:
    """Two workers, 1,000 busy tenants, and every 2 s one of them is killed -9 and replaced."""
    return await _killed(asked, 2)


async def kills_four(asked: Asked) -> list[Finding]:
    """The same with four workers."""
    return await _killed(asked, 4)


async def both(asked: Asked) -> list[Finding]:
    """A worker of the former version, where there is one, beside one of this; half-way it gives way to this version."""
    tenants, jobs = asked.tenants, min(asked.jobs, BOTH_JOBS)
    count = tenants * jobs
    async with ground(asked, former=(asked.former is not None, False)) as here:
        await here.fill(tenants, jobs)
        here.workers.start()
        pids = [each.pid for each in here.workers.alive]
        await here.begun(count // 2, within_s=120)
        here.workers.replace(0, {"TENANCY_VERSION": ""})
        left = await here.gone()
        here.workers.end()
        begun = list(here.read())
    by_pid = Counter(each.pid for each in begun)
    shares = defaultdict(float, {pid: by_pid[pid] / len(begun) for pid in by_pid})
    return [
        *accounts(begun, count),
        Finding("jobs left in the stream", left, at_most=0),
        Finding("the former worker's share of starts", shares[pids[0]], at_least=LEAST_SHARE),
        Finding("the share of the one beside it", shares[pids[1]], at_least=LEAST_SHARE),
        Finding("the share of the one that replaced it", 1 - shares[pids[0]] - shares[pids[1]], at_least=LEAST_SHARE),
        Finding("workers that ended by themselves", len(here.workers.surprises), at_most=0),
    ]
