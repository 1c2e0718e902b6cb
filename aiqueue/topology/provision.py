"""Brings the server's streams to what the topology declares: plan says what would change, apply changes it.

Streams that are not declared are never touched, nor are fields that no file states: they may belong to
another application or to an operator.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from .. import subjects, units
from ..connection import Connection
from ..errors import ConfigMismatch, DataLossRefused, NotFound, QueueFull, ServerError, Unavailable
from .declared import Family, StreamSpec, Topology, lane_name

Action = Literal["create", "update", "replace-needed", "delete-lanes"]

ROUNDS_MAX = 3  # how often apply looks again, after another process's apply came between
_PARALLEL = 16  # lanes changed at a time: a cluster takes tens of milliseconds for each
_SHOWN = 3  # names listed before "and N more"

_DURATIONS = ("ack_wait", "duplicate_window", "inactive_threshold", "max_age")  # nanoseconds
_SIZES = ("max_bytes", "max_msg_size")
_ONE_WAY = ("allow_msg_schedules", "allow_msg_ttl")  # can be switched on in place, never off


class Field(NamedTuple):
    """A field that differs, in the API's form. `why` is what the change costs or why it is refused."""

    key: str
    live: Any
    wanted: Any
    why: str | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """One step of a plan. `lanes` names the consumers it is about; empty means the stream itself.

    `loss` says which messages it would delete, `refused` why the server cannot do it in place and what to do,
    `note` what else to expect. Each is None where there is nothing to say.
    """

    stream: str
    action: Action
    fields: tuple[Field, ...] = ()
    lanes: tuple[str, ...] = ()
    loss: str | None = None
    refused: str | None = None
    note: str | None = None

    def lines(self) -> list[str]:
        """The change as text, a line per field. It begins with ``+``, ``~``, ``-`` or, if refused, ``!``."""
        why = self.refused or self.note
        tail = f"  ({why})" if why else ""
        if self.action == "create":
            return [f"{'!' if self.refused else '+'} create stream {self.stream}{tail}"]
        if self.action == "delete-lanes":
            return [f"- {self.stream} {_names(self.lanes)}: delete{tail}"]
        if self.lanes:
            return [f"~ {self.stream} {_names(self.lanes)}.{_difference(each)}" for each in self.fields]
        sign = "!" if self.refused else "~"
        return [f"{sign} {self.stream}.{_difference(each)}" for each in self.fields]


@dataclass(frozen=True, slots=True)
class Plan:
    """What apply would change; empty when the server has everything as declared."""

    changes: tuple[Change, ...]

    @property
    def drift(self) -> bool:
        return bool(self.changes)

    @property
    def losses(self) -> tuple[str, ...]:
        """A sentence for each change that would delete messages."""
        return tuple(f"{each.stream}: {each.loss}" for each in self.changes if each.loss)

    @property
    def refusals(self) -> tuple[str, ...]:
        """A sentence for each change that cannot be made in place."""
        return tuple(f"{each.stream}: {each.refused}" for each in self.changes if each.refused)

    def lines(self) -> list[str]:
        """The plan as a text diff, a line per field."""
        return [line for change in self.changes for line in change.lines()]


async def plan(conn: Connection, topology: Topology) -> Plan:
    """What differs between the server and `topology`. Changes nothing.

    Raises Unavailable, AccessDenied or ServerError.
    """
    families = {each.stream: each for each in topology.work_families}
    changes: list[Change] = []
    for spec in topology.streams.values():
        try:
            info = await conn.api(f"STREAM.INFO.{spec.name}")
        except NotFound:
            changes.append(await _creation(conn, spec))
            continue
        if change := await _update(conn, spec, info):
            changes.append(change)
        if family := families.get(spec.name):
            changes += await _lanes(conn, family)
    order = {"create": 0, "delete-lanes": 1, "update": 2, "replace-needed": 2}
    return Plan(tuple(sorted(changes, key=lambda each: order[each.action])))


async def apply(conn: Connection, topology: Topology, *, allow_data_loss: bool = False) -> Plan:
    """Makes the server as `topology` declares it and returns what that took. Repeating it changes nothing.

    Any number of processes may apply at the same time. Nothing at all is changed if a change is refused
    (ConfigMismatch, which says what to do) or would delete messages and `allow_data_loss` is False
    (DataLossRefused). Messages stored between that check and the change, milliseconds later, are not counted.
    """
    made = found = await plan(conn, topology)
    for _ in range(ROUNDS_MAX):
        if not found.drift:
            return made
        if found.refusals:
            raise ConfigMismatch("; ".join(found.refusals))
        if found.losses and not allow_data_loss:
            raise DataLossRefused(found.losses)
        for change in found.changes:
            await _execute(conn, topology, change)
        # Another process's apply may have come between a read and a write of ours, so look again. Lanes are
        # deleted once only: workers that still run with the former declaration make theirs anew.
        again = await plan(conn, topology)
        found = Plan(tuple(each for each in again.changes if each.action != "delete-lanes"))
    if found.drift:
        problem = "the server keeps differing from what is declared; is something else configuring it?"
        raise ConfigMismatch(f"{problem} {'; '.join(found.lines())}")
    return made


async def _creation(conn: Connection, spec: StreamSpec) -> Change:
    taken = await _taken(conn, spec.name, spec.config["subjects"])
    return Change(spec.name, "create", refused=taken)


async def _taken(conn: Connection, name: str, wanted: list[str]) -> str | None:
    """Which other stream has one of the wanted subjects, as a sentence; None if they are free."""
    for subject in wanted:
        answer = await conn.api("STREAM.NAMES", {"subject": subject})
        others = [each for each in answer.get("streams") or () if each != name]
        if others:
            return (
                f"its subject {subject} overlaps with stream {others[0]}, which is there already: "
                f"narrow or delete that stream and apply again"
            )
    return None


async def _update(conn: Connection, spec: StreamSpec, info: Mapping[str, Any]) -> Change | None:
    """How a stream that is there differs, None if it does not."""
    live, wanted = info["config"], _wanted(spec, info["config"])
    fields, losses, refusals = [], [], []
    for key, value in wanted.items():
        if _same(live.get(key), value):
            continue
        refused = _refused(spec.name, key, live, wanted)
        loss = None if refused else _fewer_copies(key, live, wanted) or _loss(key, live, wanted, info["state"])
        if key == "subjects":
            refused = await _subjects_refused(conn, spec, live.get("subjects") or [], value)
        fields.append(Field(key, live.get(key), value, refused or loss))
        losses += [loss] if loss else []
        refusals += [refused] if refused else []
    if not fields:
        return None
    if refusals:
        return Change(spec.name, "replace-needed", tuple(fields), refused="; ".join(refusals))
    return Change(spec.name, "update", tuple(fields), loss="; ".join(losses) or None)


def _wanted(spec: StreamSpec, live: Mapping[str, Any]) -> dict[str, Any]:
    """The declared fields, as they should be on this server."""
    wanted = dict(spec.config)
    if spec.role in ("journal", "stranded"):
        # Another application may have families of its own here. Taking their journals out of the stream would
        # leave its jobs unable to settle.
        others = [each for each in live.get("subjects") or () if each not in wanted["subjects"]]
        wanted["subjects"] = wanted["subjects"] + others
    return wanted


def _same(live: Any, wanted: Any) -> bool:
    """Whether a live value is the wanted one. The server leaves out what is zero, false or empty."""
    if isinstance(wanted, Mapping):
        return isinstance(live, Mapping) and all(_same(live.get(key), each) for key, each in wanted.items())
    if isinstance(wanted, list):
        return sorted(live or ()) == sorted(wanted)
    return bool((live or None) == (wanted or None))


def _refused(name: str, key: str, live: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Why the server would refuse the change of a field, None if it would not."""
    stuck = key == "storage"
    stuck |= key == "retention" and "workqueue" in (live.get(key), wanted[key])
    stuck |= key in _ONE_WAY and not wanted[key]
    if not stuck:
        return None
    return (
        f"{key} cannot change in place from {_shown(key, live.get(key))} to {_shown(key, wanted[key])}: "
        f"let workers empty it, delete it (nats stream rm {name}, with all that is in it), apply again"
    )


def _fewer_copies(key: str, live: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Also of an empty stream: what is stored from then on would be on fewer disks."""
    if key != "num_replicas" or wanted[key] >= live.get(key, 1):
        return None
    return f"lowering num_replicas from {live[key]} to {wanted[key]} deletes copies: is this the right profile?"


def _loss(key: str, live: Mapping[str, Any], wanted: Mapping[str, Any], state: Mapping[str, Any]) -> str | None:
    """Which stored messages the change of a field would delete, None if none. Measured on 2.15.1."""
    stored = state["messages"]
    if not stored:
        return None
    over = stored > _limit(wanted.get("max_msgs")) or state["bytes"] > _limit(wanted.get("max_bytes"))
    if key == "discard":
        return "switching discard to old deletes the oldest messages above the limits" if over else None
    if key not in ("max_age", "max_bytes", "max_msgs", "max_msgs_per_subject"):
        return None
    if _limit(wanted[key]) >= _limit(live.get(key)):
        return None
    lowering = f"lowering {key} from {_shown(key, live.get(key))} to {_shown(key, wanted[key])} deletes"
    if key == "max_age":
        return f"{lowering} all that is older, now and from now on"
    if key == "max_msgs_per_subject":
        fuller = "the oldest messages of every subject that holds more, even with discard new"
        return f"{lowering} {fuller}" if stored > wanted[key] else None
    if wanted.get("discard", live.get("discard")) == "new":
        return None  # the stream takes no more until it is below, and keeps what it has
    return f"{lowering} the oldest messages" if over else None


def _limit(value: int | None) -> float:
    return value if value and value > 0 else math.inf


async def _subjects_refused(conn: Connection, spec: StreamSpec, live: list[str], wanted: list[str]) -> str | None:
    """Why subjects cannot be added (another stream's) or taken away (jobs wait there, and would for ever)."""
    taken = await _taken(conn, spec.name, [each for each in wanted if each not in live])
    if taken or spec.role not in ("work", "inbox"):
        return taken
    for removed in (each for each in live if each not in wanted):
        info = await conn.api(f"STREAM.INFO.{spec.name}", {"subjects_filter": removed})
        counts: dict[str, int] = info["state"].get("subjects") or {}
        waiting = sum(n for subject, n in counts.items() if not any(_covers(each, subject) for each in wanted))
        if waiting:
            return f"{waiting} messages wait on {removed}, which no one would consume: empty it first"
    return None


def _covers(pattern: str, subject: str) -> bool:
    """Whether a stored message's subject falls under a stream's subject."""
    wanted, given = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        given = given[: len(wanted) - 1] + given[len(wanted) - 1 :][:1]
    return len(wanted) == len(given) and all(a in ("*", ">", b) for a, b in zip(wanted, given, strict=True))


async def _lanes(conn: Connection, family: Family) -> list[Change]:
    """Lanes with other limits than declared, and those that the declaration has no more."""
    outdated: dict[tuple[Field, ...], list[str]] = {}
    leftover: list[str] = []
    for config in await _consumers(conn, family.stream):
        name = config.get("durable_name") or config["name"]
        lane = subjects.parse_lane(config.get("filter_subject", ""))
        if not lane or lane.family != family.name or name != lane_name(lane.tenant, lane.priority):
            continue  # somebody else's consumer
        memory = bool(config.get("mem_storage"))
        if family.lane_of(name) != lane or memory != (family.lane_storage == "memory"):
            leftover.append(name)
            continue
        wanted = family.lane_limits(lane.tenant)
        fields = tuple(
            Field(key, config.get(key), each) for key, each in wanted.items() if not _same(config.get(key), each)
        )
        if fields:
            outdated.setdefault(fields, []).append(name)
    changes = [Change(family.stream, "update", fields, lanes=tuple(names)) for fields, names in outdated.items()]
    if leftover:
        note = (
            "not a lane as now declared; waiting jobs stay, those in flight are delivered again, "
            "and workers make the new lanes"
        )
        changes.append(Change(family.stream, "delete-lanes", lanes=tuple(leftover), note=note))
    return changes


async def _consumers(conn: Connection, stream: str) -> list[dict[str, Any]]:
    """The configurations of all consumers of a stream, page by page."""
    configs: list[dict[str, Any]] = []
    while True:
        page = await conn.api(f"CONSUMER.LIST.{stream}", {"offset": len(configs)})
        found = page.get("consumers") or []
        configs += [each["config"] for each in found]
        if not found or len(configs) >= page["total"]:
            return configs


async def _execute(conn: Connection, topology: Topology, change: Change) -> None:
    spec = topology.streams[change.stream]
    match change.action:
        case "create":
            await _create(conn, spec)
        case "update" if change.lanes:
            family = next(each for each in topology.work_families if each.stream == change.stream)
            await _each(change.lanes, lambda name: _update_lane(conn, family, name))
        case "update":
            live = (await conn.api(f"STREAM.INFO.{spec.name}"))["config"]
            # An update replaces the whole configuration: what is not declared is sent back as it was.
            await _configure(conn, "UPDATE", spec, live | _wanted(spec, live))
        case "delete-lanes":
            await _each(change.lanes, lambda name: _delete_lane(conn, spec.name, name))
        case "replace-needed":
            raise AssertionError("refused changes are not executed")


async def _create(conn: Connection, spec: StreamSpec) -> None:
    try:
        await _configure(conn, "CREATE", spec, dict(spec.config))
    except (ConfigMismatch, ServerError):
        # Another process may have created it, or a stream in its way, since the plan.
        if taken := await _taken(conn, spec.name, spec.config["subjects"]):
            raise ConfigMismatch(f"{spec.name}: {taken}") from None
        try:
            await conn.api(f"STREAM.INFO.{spec.name}")  # it is compared in apply's next round
        except NotFound:
            pass
        else:
            return
        raise


async def _configure(
    conn: Connection, verb: Literal["CREATE", "UPDATE"], spec: StreamSpec, config: dict[str, Any]
) -> None:
    try:
        await conn.api(f"STREAM.{verb}.{spec.name}", config)
    except QueueFull as error:
        needed = f"{_shown('max_bytes', config.get('max_bytes', -1))} of {config['storage']} storage"
        raise ConfigMismatch(f"{spec.name} sets aside {needed} on the server: {error.reason}") from None
    except (ServerError, Unavailable) as error:
        if "non-clustered" not in str(error):
            raise
        problem = f"{spec.name}: {config['num_replicas']} replicas need a cluster, and this server is none"
        raise ConfigMismatch(f"{problem}: apply with profile single") from None


async def _each(names: tuple[str, ...], do: Callable[[str], Awaitable[None]]) -> None:
    for start in range(0, len(names), _PARALLEL):
        await asyncio.gather(*(do(name) for name in names[start : start + _PARALLEL]))


async def _update_lane(conn: Connection, family: Family, name: str) -> None:
    """Gives a lane its declared limits. A lane that has gone meanwhile is fine: workers make it anew."""
    try:
        live = (await conn.api(f"CONSUMER.INFO.{family.stream}.{name}"))["config"]
        subject = f"CONSUMER.CREATE.{family.stream}.{name}.{live['filter_subject']}"
        lane = family.lane_of(name)
        config = live | family.lane_limits(lane.tenant if lane else "*")
        await conn.api(subject, {"stream_name": family.stream, "config": config, "action": "update"})
    except NotFound:
        return


async def _delete_lane(conn: Connection, stream: str, name: str) -> None:
    try:
        await conn.api(f"CONSUMER.DELETE.{stream}.{name}")
    except NotFound:
        return


def _names(lanes: tuple[str, ...]) -> str:
    shown = ", ".join(lanes[:_SHOWN])
    more = f" and {len(lanes) - _SHOWN} more" if len(lanes) > _SHOWN else ""
    return f"{'lane' if len(lanes) == 1 else 'lanes'} {shown}{more}"


def _difference(field: Field) -> str:
    why = f"  ({field.why})" if field.why else ""
    if isinstance(field.wanted, list):
        gone = [f"- {each}" for each in field.live or () if each not in field.wanted]
        new = [f"+ {each}" for each in field.wanted if each not in (field.live or ())]
        return f"{field.key}: {', '.join(gone + new)}{why}"
    return f"{field.key}: {_shown(field.key, field.live)} -> {_shown(field.key, field.wanted)}{why}"


def _shown(key: str, value: Any) -> str:
    """A value for people."""
    if isinstance(value, bool) or value is None:
        return "true" if value else "false" if value is False else "unset"
    if isinstance(value, int) and key.startswith("max_") and value <= 0:
        return "unlimited"
    if key in _DURATIONS:
        return units.short_duration(value / 1_000_000_000)
    if key in _SIZES:
        return units.short_size(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {each}" for name, each in value.items() if each)
    return str(value)
