"""Finds what stops or endangers a declared stream and is not drift: settings that no file states, and other programs.

`plan` and `doctor` show these problems. `apply` corrects the settings in FATAL_SETTINGS that it can, and nothing else
here: a consumer, a mirror or a source may belong to another application.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from .. import subjects
from ..connection import Connection
from ..errors import AIQueueError
from .declared import StreamSpec, lane_name
from .streamfile import FATAL_FLAGS, NEWEST_ONLY, Role

GUIDE = "docs/operations/copy-messages.md"
SERVICE_CONSUMERS: Mapping[Role, str] = {"inbox": "router", "parked": "forwarder", "stranded": "sweeper"}
TICKS_CONSUMERS = "ticks-"  # and the route: those whose workers make the jobs
ROLES_WITH_CONSUMERS: tuple[Role, ...] = (
    "work",
    "inbox",
    "parked",
    "stranded",
    "ticks",
)  # each message is for one consumer

_KEEPS_COPIES: tuple[Role, ...] = ("journal", "dead", "documents", "checkpoints", "audit", *NEWEST_ONLY)
_ALL: tuple[Role, ...] = ("work", "inbox", "parked", "stranded", "ticks", *_KEEPS_COPIES)


class FatalSetting(NamedTuple):
    """A setting of a stream that stops aiqueue, if it is set and no file states it.

    `cure`: **apply** unsets it. **edit**: an operator must unset it, because it may be wanted. **replace**: the server
    cannot unset it, so the stream must be deleted and created again.
    """

    key: str
    roles: tuple[Role, ...]
    effect: str
    cure: Literal["apply", "edit", "replace"]


FATAL_SETTINGS = (
    FatalSetting("sealed", _ALL, "it stores nothing, and no message can be removed from it", "replace"),
    FatalSetting("mirror", _ALL, "it is a copy of another stream and stores nothing that is published", "replace"),
    FatalSetting("persist_mode", _ALL, "a crash of the server loses messages that it has acknowledged", "replace"),
    FatalSetting("allow_msg_counter", FATAL_FLAGS["allow_msg_counter"], "it stores only counters", "replace"),
    FatalSetting(
        "deny_delete",
        FATAL_FLAGS["deny_delete"],
        "jobs in it cannot be cancelled, nor dead letters replayed or purged",
        "replace",
    ),
    FatalSetting("deny_purge", ("inbox", "documents"), "inboxes and documents in it cannot be removed", "replace"),
    FatalSetting("sources", _ALL, "messages of other streams come into it, past its limits and its dedup", "edit"),
    FatalSetting("no_ack", _ALL, "it acknowledges no publish, so every enqueue times out", "apply"),
    FatalSetting("subject_transform", _ALL, "it stores messages under subjects on which nobody reads them", "apply"),
    FatalSetting("consumer_limits", ROLES_WITH_CONSUMERS, "it refuses the consumers of workers", "apply"),
    FatalSetting("subject_delete_marker_ttl", _ALL, "it stores markers that are no messages of aiqueue", "apply"),
    FatalSetting(
        "discard_new_per_subject", FATAL_FLAGS["discard_new_per_subject"], "keys in it cannot be updated", "apply"
    ),
)
# The same for a lane's consumer. `apply` unsets them.
FATAL_LANE_SETTINGS: Mapping[str, str] = {
    "headers_only": "jobs arrive without their bodies",
    "backoff": "it replaces ack_wait, so jobs are redelivered while they run",
    "priority_groups": "it refuses the workers' pulls",
    "priority_policy": "it refuses the workers' pulls",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem of a stream that `apply` does not solve. `code` names its kind, `remedy` contains the command."""

    stream: str
    code: str
    """Kind of the problem, by which the page of what can go wrong names it."""
    text: str
    """What was found, in a sentence."""
    remedy: str
    """What to do about the problem, with the command."""

    def line(self) -> str:
        """Return the problem as one line."""
        return f"! {self.stream}: {self.text} -> {self.remedy}"


# The remedy of each kind of problem. doctor, plan and the workers' errors show it.
REMEDIES: Mapping[str, str] = {
    "foreign-consumer": "`nats consumer rm {stream} {name}` removes it; its program must read copies instead",
    "foreign-mirror": f"copy back what it took ({GUIDE}), then `nats stream rm {{name}}`",
    "foreign-source": f"copy back what it took ({GUIDE}), then `nats stream edit {{name}} --interactive`: delete the "
    "source",
    "stream-setting": "`nats stream edit {stream} --interactive`: delete {key}",
    "stream-unusable": f"save its messages ({GUIDE}), then `nats stream rm {{stream}}` and `aiqueue apply`",
}


def make_problem(stream: str, code: str, text: str, **values: str) -> Problem:
    """Return a problem with the remedy of its kind."""
    quoted = {key: shlex.quote(value) for key, value in values.items()}
    return Problem(stream, code, text, REMEDIES[code].format(stream=stream, **quoted))


def fatal_settings(spec: StreamSpec, live: Mapping[str, Any]) -> list[FatalSetting]:
    """Return the fatal settings of a live stream that its file does not state. Sealing a stream sets several."""
    if live.get("sealed"):
        return [each for each in FATAL_SETTINGS if each.key == "sealed"]
    return [
        each
        for each in FATAL_SETTINGS
        if spec.role in each.roles and each.key not in spec.config and live.get(each.key) not in (*_UNSET, "default")
    ]


_UNSET: tuple[Any, ...] = (None, False, 0, "", [], {})


def stream_problems(spec: StreamSpec, live: Mapping[str, Any]) -> list[Problem]:
    """Return the fatal settings of a stream that `apply` does not unset."""
    return [
        make_problem(
            spec.name,
            "stream-setting" if each.cure == "edit" else "stream-unusable",
            f"{each.key} is set: {each.effect}",
            key=each.key,
        )
        for each in fatal_settings(spec, live)
        if each.cure != "apply"
    ]


def is_unusable(live: Mapping[str, Any]) -> bool:
    """Whether the server refuses each update of a stream, so that its drift does not matter."""
    return bool(live.get("sealed") or live.get("mirror"))


async def list_consumers(conn: Connection, stream: str) -> list[dict[str, Any]]:
    """Return the configurations of all consumers of a stream. Reads page by page."""
    seen, configs = 0, []
    while True:
        page = await conn.api(f"CONSUMER.LIST.{stream}", {"offset": seen})
        found = page.get("consumers") or []
        configs += [each["config"] for each in found]
        seen += len(found) + len(page.get("missing") or ())
        if not found or seen >= page["total"]:
            return configs


async def list_streams(conn: Connection) -> list[dict[str, Any]]:
    """Return the configurations of the account's streams. Reads page by page."""
    configs: list[dict[str, Any]] = []
    while True:
        page = await conn.api("STREAM.LIST", {"offset": len(configs)})
        found = page.get("streams") or []
        configs += [each["config"] for each in found]
        if not found or len(configs) >= page["total"]:
            return configs


def readers_of(streams: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the configurations of those that are mirrors or have sources."""
    return [each for each in streams if each.get("mirror") or each.get("sources")]


async def list_readers(conn: Connection) -> list[Mapping[str, Any]]:
    """Return the configurations of the account's streams that are mirrors or have sources."""
    return readers_of(await list_streams(conn))


def foreign_readers(
    stream: str,
    role: Role,
    family: str,
    consumers: Sequence[Mapping[str, Any]],
    readers: Sequence[Mapping[str, Any]],
) -> list[Problem]:
    """Return the consumers, mirrors and sources of other programs that take messages from a stream of `family`.

    `role` is in ROLES_WITH_CONSUMERS. `consumers` are those of the stream, `readers` what `list_readers` returns. A
    mirror in another account or domain shows only among the consumers, from nats-server 2.15 on.
    """
    found: dict[str, Problem] = {}
    for config in readers:
        for kind, origin in [("mirror", config.get("mirror")), *(("source", s) for s in config.get("sources") or ())]:
            if origin and origin["name"] == stream and not origin.get("external"):
                found[config["name"]] = _reader_problem(stream, config["name"], kind)
    for config in consumers:
        name = config.get("durable_name") or config["name"]
        metadata = config.get("metadata") or {}
        for kind, origin in (("mirror", "_nats.mirror"), ("source", "_nats.src")):
            if reader := metadata.get(f"{origin}.stream"):
                found.setdefault(reader, _reader_problem(stream, reader, kind, metadata.get(f"{origin}.acc", "")))
                break
        else:
            if not _is_ours(role, family, name, config):
                found[f"consumer {name}"] = _consumer_problem(stream, name, config)
    return list(found.values())


def _consumer_problem(stream: str, name: str, config: Mapping[str, Any]) -> Problem:
    reads = config.get("filter_subject") or ", ".join(config.get("filter_subjects") or ()) or "all subjects"
    text = (
        f"the consumer {name} of another program takes messages on {reads}: they do not reach the workers, and workers "
        "cannot serve lanes that it covers"
    )
    return make_problem(stream, "foreign-consumer", text, name=name)


def _reader_problem(stream: str, reader: str, kind: str, account: str = "") -> Problem:
    what = "is a mirror of this stream" if kind == "mirror" else "has this stream as a source"
    where = f" of account {account}" if account else ""
    text = f"the stream {reader}{where} {what}: what it copies is deleted here, also jobs that no worker has run"
    return make_problem(stream, f"foreign-{kind}", text, name=reader)


def _is_ours(role: Role, family: str, name: str, config: Mapping[str, Any]) -> bool:
    """Whether aiqueue has created a consumer, or a plain client that reads one inbox."""
    if name == SERVICE_CONSUMERS.get(role) or (role == "ticks" and name.startswith(TICKS_CONSUMERS)):
        return True
    lane = subjects.parse_lane(config.get("filter_subject", ""))
    if lane is None or lane.family != family:
        return False
    if role == "inbox":
        return not lane.key and not {"*", ">"} & set(lane)
    is_pull = config.get("ack_policy") == "explicit" and not config.get("deliver_subject")
    return role == "work" and is_pull and name == lane_name(*lane[1:])


async def find_foreign_readers(conn: Connection, stream: str, role: Role, family: str) -> list[Problem]:
    """Return what `foreign_readers` finds on the server. What this user may not list is left out."""
    listed = []
    for read in (partial(list_consumers, conn, stream), partial(list_readers, conn)):
        try:
            listed.append(await read())
        except AIQueueError:
            listed.append([])
    return foreign_readers(stream, role, family, *listed)
