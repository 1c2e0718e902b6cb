"""Compares the server's streams and lanes with the topology (`plan`), and creates and updates them (`apply`).

Undeclared streams are never changed, nor are fields that no file states: they may belong to another application or to
an operator. The exceptions are fields that stop aiqueue (`problems`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from .. import subjects
from ..connection import Connection
from ..errors import ConfigMismatch, DataLossRefused, NotFound
from .account import find_shortages, read_limits, sum_up
from .changes import Change, FieldChange, Plan, StorageSum, format_value
from .declared import Family, StreamSpec, Topology, lane_name
from .execution import PlanExecution, aside_subject
from .problems import (
    FATAL_LANE_SETTINGS,
    ROLES_WITH_CONSUMERS,
    Problem,
    fatal_settings,
    foreign_readers,
    is_unusable,
    list_consumers,
    list_streams,
    readers_of,
    stream_problems,
)
from .stamps import Applied, Applier, hash_declaration, read_stamp

__all__ = ["Applied", "Change", "FieldChange", "Plan", "StorageSum", "apply", "create_missing", "plan"]

ROUNDS_MAX = 3  # how often apply plans again, if another process applies at the same time

KEY_LANE_DOTS = 5  # in the subject of a lane of a limited key
_ONE_WAY = ("allow_msg_schedules", "allow_msg_ttl")  # can be switched on in place, never off


async def plan(conn: Connection, topology: Topology) -> Plan:
    """Return the differences between the server and `topology`. Reads only.

    Raises Unavailable, AccessDenied or ServerError.
    """
    families = {each.stream: each for each in topology.families.values()}
    listed = await list_streams(conn)
    readers = readers_of(listed)
    changes: list[Change] = []
    problems: list[Problem] = []
    applied: list[Applied] = []
    for spec in topology.streams.values():
        try:
            info = await conn.api(f"STREAM.INFO.{spec.name}")
        except NotFound:
            changes.append(await _plan_creation(conn, spec))
            continue
        problems += stream_problems(spec, info["config"])
        stamp = read_stamp(spec.name, info["config"], hash_declaration(topology, spec))
        applied += [stamp] if stamp else []
        if is_unusable(info["config"]):
            continue
        if change := await _plan_update(conn, spec, info):
            changes.append(change)
        if spec.role in ROLES_WITH_CONSUMERS:
            family, consumers = families.get(spec.name), await list_consumers(conn, spec.name)
            problems += foreign_readers(spec.name, spec.role, family.name if family else "", consumers, readers)
            if family is not None and family.role == "work":
                changes += _plan_lanes(family, consumers)
    changes.sort(key=_order)
    replicas = max((each.config.get("num_replicas", 1) for each in topology.streams.values()), default=1)
    limits = await read_limits(conn, replicas)
    sums = sum_up(topology, listed, changes, limits)
    shortages = find_shortages(topology, listed, changes, limits, sums, clustered=bool(conn.cluster))
    return Plan(tuple(changes), tuple(problems), sums, tuple(shortages), tuple(applied))


def _order(change: Change) -> int:
    """What gives room comes first, what cannot be undone last."""
    if change.action == "update":
        lowers = any(each.key == "max_bytes" and each.wanted < (each.live or 0) for each in change.fields)
        return 4 if change.loss else 0 if lowers else 3
    return {"create": 1, "delete-lanes": 2, "replace-needed": 3}[change.action]


async def apply(
    conn: Connection,
    topology: Topology,
    *,
    allow_data_loss: bool = False,
    allow_full: bool = False,
    on_plan: Callable[[Plan], None] | None = None,
) -> Plan:
    """Create and update the streams and lanes as `topology` declares them, and return the plan that was executed.

    Safe to repeat, and several processes may apply at the same time. All or nothing: nothing is changed if any change
    is refused, would delete messages while `allow_data_loss` is False, or would leave a stream that takes no message
    while `allow_full` is False; and if the server refuses one all the same, those before it are undone. Messages stored
    in the milliseconds between this check and the change are not counted. `on_plan` gets the plan before that check.

    Raises ConfigMismatch, which says what to do, DataLossRefused, and what `plan` raises.
    """
    executed = found = await plan(conn, topology)
    if on_plan is not None:
        on_plan(found)
    execution = _execution(conn, topology)
    for _ in range(ROUNDS_MAX):
        if not found.drift:
            return executed
        if found.refusals:
            raise ConfigMismatch("; ".join(found.refusals))
        if found.losses and not allow_data_loss:
            raise DataLossRefused(found.losses)
        if found.stops and not allow_full:
            raise ConfigMismatch("; ".join(f"{each}: to do so all the same, add --allow-full" for each in found.stops))
        await execution.run(found.changes)
        # Another process may have applied between our read and our write, so plan again. Lanes are deleted only once:
        # workers that still run with the previous declaration recreate their lanes.
        current = await plan(conn, topology)
        executed = replace(executed, problems=current.problems)
        found = replace(current, changes=tuple(each for each in current.changes if each.action != "delete-lanes"))
    if found.drift:
        problem = "the server still differs from the declaration after apply; does another program change its streams?"
        raise ConfigMismatch(f"{problem} {'; '.join(found.lines())}")
    return executed


async def create_missing(conn: Connection, topology: Topology) -> None:
    """Create the streams that the server does not have, and change nothing else. For use where `apply` was refused."""
    execution = _execution(conn, topology)
    for change in (await plan(conn, topology)).changes:
        if change.action == "create" and not change.refused:
            await execution.create(topology.streams[change.stream])


def _execution(conn: Connection, topology: Topology) -> PlanExecution:
    return PlanExecution(conn, topology, Applier.here(conn.settings.name), _wanted_config, _find_conflict)


async def _plan_creation(conn: Connection, spec: StreamSpec) -> Change:
    conflict = await _find_conflict(conn, spec.name, spec.config["subjects"])
    return Change(spec.name, "create", refused=conflict)


async def _find_conflict(conn: Connection, name: str, wanted: list[str]) -> str | None:
    """Return a sentence about another stream that has one of the wanted subjects, None if there is none."""
    for subject in wanted:
        answer = await conn.api("STREAM.NAMES", {"subject": subject})
        others = [each for each in answer.get("streams") or () if each != name]
        if others:
            return (
                f"its subject {subject} overlaps with the existing stream {others[0]}: "
                f"change the subjects of that stream or delete it, then apply again"
            )
    return None


async def _plan_update(conn: Connection, spec: StreamSpec, info: Mapping[str, Any]) -> Change | None:
    """Return how an existing stream differs from its declaration, None if it does not."""
    live, wanted = info["config"], _wanted_config(spec, info["config"])
    effects = {each.key: each.effect for each in fatal_settings(spec, live)}
    fields, losses, refusals, stops = [], [], [], []
    for key, value in wanted.items():
        if _is_same(live.get(key), value):
            continue
        refused = _refuse_in_place(spec.name, key, live, wanted)
        loss = (
            None
            if refused
            else _loss_of_replicas(key, live, wanted) or _loss_of_messages(key, live, wanted, info["state"])
        )
        stop = None if refused or loss else _stop(key, live, wanted, info["state"])
        if key == "subjects":
            refused = await _refuse_subjects(conn, spec, live.get("subjects") or [], value)
        fields.append(FieldChange(key, live.get(key), value, refused or loss or stop or effects.get(key)))
        losses += [loss] if loss else []
        stops += [stop] if stop else []
        refusals += [refused] if refused else []
    if not fields:
        return None
    if refusals:
        return Change(spec.name, "replace-needed", tuple(fields), refused="; ".join(refusals))
    return Change(spec.name, "update", tuple(fields), loss="; ".join(losses) or None, stop="; ".join(stops) or None)


def _wanted_config(spec: StreamSpec, live: Mapping[str, Any]) -> dict[str, Any]:
    """Return the declared fields, without fatal settings, and with what others need of a stream that is shared."""
    wanted = {each.key: None for each in fatal_settings(spec, live) if each.cure == "apply"} | dict(spec.config)
    if spec.role not in ("work", "inbox"):
        # Another application may have its own families on this server, and another version more subjects, such as those
        # of budgets. Without their subjects in the streams that all share, their jobs could not end.
        ours = {*wanted["subjects"], aside_subject(spec.name)}
        others = [each for each in live.get("subjects") or () if each not in ours]
        wanted["subjects"] = wanted["subjects"] + others
    return wanted


def _is_same(live: Any, wanted: Any) -> bool:
    """Return whether a live value equals the wanted one. The server omits values that are zero, false or empty."""
    if isinstance(wanted, Mapping):
        return isinstance(live, Mapping) and all(_is_same(live.get(key), each) for key, each in wanted.items())
    if isinstance(wanted, list):
        return sorted(live or ()) == sorted(wanted)
    return bool((live or None) == (wanted or None))


def _refuse_in_place(name: str, key: str, live: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Return why the server would refuse to change a field in place, None if it would not."""
    fixed = key in ("storage", "allow_msg_counter")
    fixed |= key == "retention" and "workqueue" in (live.get(key), wanted[key])
    fixed |= key in _ONE_WAY and not wanted[key]
    if not fixed:
        return None
    return (
        f"{key} cannot change in place from {format_value(key, live.get(key))} to {format_value(key, wanted[key])}: "
        f"let workers empty the stream, delete it (nats stream rm {name}, deletes its messages), then apply again"
    )


def _loss_of_replicas(key: str, live: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Return a sentence if replicas are removed. Also for an empty stream: later messages would have fewer copies."""
    if key != "num_replicas" or wanted[key] >= live.get(key, 1):
        return None
    return (
        f"lowering num_replicas from {live[key]} to {wanted[key]} deletes copies; check that this is the right profile"
    )


def _loss_of_messages(
    key: str, live: Mapping[str, Any], wanted: Mapping[str, Any], state: Mapping[str, Any]
) -> str | None:
    """Return which stored messages the change of a field would delete, None if none. Measured on nats-server 2.15.1."""
    stored = state["messages"]
    if not stored:
        return None
    over = stored > _limit_or_inf(wanted.get("max_msgs")) or state["bytes"] > _limit_or_inf(wanted.get("max_bytes"))
    if key == "discard":
        return "switching discard to old deletes the oldest messages above the limits" if over else None
    if key not in ("max_age", "max_bytes", "max_msgs", "max_msgs_per_subject"):
        return None
    if _limit_or_inf(wanted[key]) >= _limit_or_inf(live.get(key)):
        return None
    lowering = f"lowering {key} from {format_value(key, live.get(key))} to {format_value(key, wanted[key])} deletes"
    if key == "max_age":
        return f"{lowering} all older messages, now and from now on"
    if key == "max_msgs_per_subject":
        deleted = "the oldest messages of every subject that has more, even with discard new"
        return f"{lowering} {deleted}" if stored > wanted[key] else None
    if wanted.get("discard", live.get("discard")) == "new":
        return None  # the stream keeps its messages, and accepts no more until it is below the limit
    return f"{lowering} the oldest messages" if over else None


def _stop(key: str, live: Mapping[str, Any], wanted: Mapping[str, Any], state: Mapping[str, Any]) -> str | None:
    """Return a sentence if the stream would store nothing more after the change of a field: it keeps what it has."""
    stored = {"max_bytes": state["bytes"], "max_msgs": state["messages"]}.get(key)
    if stored is None or not _limit_or_inf(wanted[key]) < min(stored, _limit_or_inf(live.get(key))):
        return None
    return (
        f"lowering {key} from {format_value(key, live.get(key))} to {format_value(key, wanted[key])} while "
        f"{format_value(key, stored)} are stored: until there are fewer, the stream takes no message (StreamFull)"
    )


def _limit_or_inf(value: int | None) -> float:
    return value if value and value > 0 else math.inf


async def _refuse_subjects(conn: Connection, spec: StreamSpec, live: list[str], wanted: list[str]) -> str | None:
    """Return why subjects cannot be added (another stream has them) or removed (jobs there would wait forever)."""
    conflict = await _find_conflict(conn, spec.name, [each for each in wanted if each not in live])
    if conflict or spec.role not in ("work", "inbox"):
        return conflict
    for removed in (each for each in live if each not in wanted):
        info = await conn.api(f"STREAM.INFO.{spec.name}", {"subjects_filter": removed})
        counts: dict[str, int] = info["state"].get("subjects") or {}
        waiting = sum(n for subject, n in counts.items() if not any(_matches(each, subject) for each in wanted))
        if waiting:
            are = "message is" if waiting == 1 else "messages are"
            cure = "empty it first"
            if removed.count(".") == KEY_LANE_DOTS:
                cure = "keep limit_key, remove the family's rules of limits, and apply once workers have emptied it"
            return f"{waiting} {are} stored on {removed}, which no worker would consume: {cure}"
    return None


def _matches(pattern: str, subject: str) -> bool:
    """Return whether the subject of a stored message matches a stream's subject."""
    wanted, given = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        given = given[: len(wanted) - 1] + given[len(wanted) - 1 :][:1]
    return len(wanted) == len(given) and all(a in ("*", ">", b) for a, b in zip(wanted, given, strict=True))


def _plan_lanes(family: Family, consumers: list[dict[str, Any]]) -> list[Change]:
    """Return changes for lanes whose limits differ, and for lanes that are no longer declared."""
    outdated: dict[tuple[FieldChange, ...], list[str]] = {}
    undeclared: list[str] = []
    for config in consumers:
        name = config.get("durable_name") or config["name"]
        lane = subjects.parse_lane(config.get("filter_subject", ""))
        if not lane or lane.family != family.name or name != lane_name(*lane[1:]):
            continue  # a consumer of another application
        memory = bool(config.get("mem_storage"))
        if family.lane_of(name) != lane or memory != (family.lane_storage == "memory"):
            undeclared.append(name)
            continue
        wanted = family.lane_limits(lane.tenant) | _without_fatal(config)
        fields = tuple(
            FieldChange(
                key,
                str(config[key]) if key in FATAL_LANE_SETTINGS else config.get(key),
                each,
                FATAL_LANE_SETTINGS.get(key),
            )
            for key, each in wanted.items()
            if not _is_same(config.get(key), each)
        )
        if fields:
            outdated.setdefault(fields, []).append(name)
    changes = [Change(family.stream, "update", fields, lanes=tuple(names)) for fields, names in outdated.items()]
    if undeclared:
        note = "no longer declared; queued jobs stay, jobs in flight are redelivered, and workers create the new lanes"
        changes.append(Change(family.stream, "delete-lanes", lanes=tuple(undeclared), note=note))
    return changes


def _without_fatal(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fatal settings of a lane's consumer, to be unset."""
    return {key: None for key in FATAL_LANE_SETTINGS if config.get(key) not in (None, False, [], "none")}
