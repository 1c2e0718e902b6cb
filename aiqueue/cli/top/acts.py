"""What `top` changes: pauses, resumes, replays. By the functions of the other commands, with their audit lines."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .. import output
from ..audit import name_operator, work_audited
from ..dead import make_replay
from ..pause import make_pause, make_resume

if TYPE_CHECKING:
    from ...client import Client, JobPlan

ActName = Literal["pause", "resume", "count", "replay", "replay_one"]


@dataclass(frozen=True)
class TopAct:
    """What is to be done. `count` finds the dead letters of a scope, for a `replay` of exactly these: its `plan`.

    None: all tenants, kinds, keys. `seq`: of the dead letter that `replay_one` is about, of the job `item`.
    """

    name: ActName
    family: str
    tenant: str | None = None
    kind: str | None = None
    key: str | None = None
    seq: int = 0
    item: str = ""
    plan: JobPlan | None = field(default=None, compare=False)

    @property
    def scope(self) -> str:
        """Whose jobs it is about, such as "agent.tasks, tenant acme"."""
        named = [f"{name} {value}" for name in ("tenant", "kind", "key") if (value := getattr(self, name)) is not None]
        return output.escape_controls(", ".join([self.family, *named]))

    @property
    def question(self) -> str:
        """What is asked before it is done."""
        match self.name:
            case "pause":
                return f"Pause {self.scope}? No worker will start its jobs; those that run go on."
            case "resume":
                return f"Resume {self.scope}?"
            case "replay_one":
                return f"Replay dead letter {self.seq}, job {output.escape_controls(self.item)}?"
            case "replay" if self.plan is not None:
                return f"Replay {output.format_count(self.plan.count, 'dead letter')} of {self.scope}?"
        return ""


async def count_dead(client: Client, act: TopAct) -> TopAct:
    """Return the replay of all dead letters of a scope that are there now. Raises AIQueueError."""
    which: dict[str, Any] = {name: value for name in ("family", "tenant", "kind") if (value := getattr(act, name))}
    plan = await client.jobs.plan("replay", **which)
    return TopAct("replay", act.family, act.tenant, act.kind, plan=plan)


async def carry_out(client: Client, act: TopAct) -> str:
    """Do it. Return what came of it, as one line. Raises AIQueueError."""
    problems: list[str] = []
    match act.name:
        case "pause":
            target, pause = make_pause(act.family, act.tenant, act.kind, act.key)
            await work_audited(client, "pause", target, pause, warn=problems.append)
            said = f"paused {act.scope}"
        case "resume":
            target, resume = make_resume(act.family, act.tenant, act.kind, act.key)
            resumed, _ = await work_audited(client, "resume", target, resume, warn=problems.append)
            said = f"resumed {act.scope}" if resumed else f"{act.scope} was not paused any more"
        case "replay_one":
            target, replay = make_replay(act.seq)
            one = await work_audited(client, "dead.replay", target, replay, warn=problems.append)
            said = f"replayed dead letter {act.seq}" if one.done else f"not replayed: {one.errors[0][1]}"
        case _:
            assert act.plan is not None
            outcome = await client.jobs.act(act.plan, by=name_operator())
            problems.append(outcome.unaudited)
            said = f"replayed {outcome.done:,} of {output.format_count(outcome.matched, 'dead letter')} of {act.scope}"
            if outcome.ended:
                said += f"; {len(outcome.ended):,} were gone"
            if outcome.failed:
                said += f"; {len(outcome.failed):,} failed: {outcome.failed[0][1]}"
    problem = next(filter(None, problems), "")
    return f"{said} (this is not in the audit: {problem})" if problem else said
