"""What the declared streams set aside on the server, and whether the account has room for what a plan adds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..connection import Connection
from ..errors import AIQueueError
from ..units import short_size
from .changes import STORAGES, Change, Storage, StorageSum
from .declared import StreamSpec, Topology
from .problems import Problem
from .sizes import reserved_bytes

LESS = "declare less (size or overlay in aiqueue.toml)"
_LIMITS: Mapping[Storage, tuple[str, str, str]] = {  # in the account's information, and in the server's configuration
    "file": ("max_storage", "storage_max_stream_bytes", "max_file"),
    "memory": ("max_memory", "memory_max_stream_bytes", "max_mem"),
}


async def read_limits(conn: Connection, replicas: int) -> Mapping[str, Any]:
    """Return the limits of the account for streams with so many replicas; empty if this user may not read them."""
    try:
        info = await conn.api("INFO")
    except AIQueueError:
        return {}
    found: Mapping[str, Any] = (info.get("tiers") or {}).get(f"R{replicas}", info).get("limits") or {}
    return found


def sum_up(
    topology: Topology, live: Iterable[Mapping[str, Any]], changes: Sequence[Change], limits: Mapping[str, Any]
) -> tuple[StorageSum, ...]:
    """Return the sums of the declared streams. `live`: the configurations of all streams of the account."""
    configs = {each["name"]: each for each in live}
    specs, changed = topology.streams.values(), _changed_streams(topology, changes)
    sums = []
    for storage, (limit_key, _, _) in _LIMITS.items():
        limit = _limit(limits, limit_key)
        reserved = sum(_reserved(each, storage) for each in configs.values())
        wanted = {each.name: _reserved({**configs.get(each.name, {}), **each.config}, storage) for each in specs}
        declared = sum(wanted.values())
        added = sum(wanted[each.name] - _reserved(configs.get(each.name, {}), storage) for each in changed)
        if declared or added:
            free = None if limit is None else max(0, limit - reserved)
            one_copy: int = getattr(reserved_bytes(topology), storage)
            sums.append(StorageSum(storage, declared, one_copy, added, limit, free))
    return tuple(sums)


def find_shortages(
    topology: Topology, live: Sequence[Mapping[str, Any]], changes: Sequence[Change], limits: Mapping[str, Any],
    sums: Sequence[StorageSum], *, clustered: bool,
) -> list[Problem]:  # fmt: skip
    """Return what the account lacks for the changes, as far as it can be known before the server is asked."""
    found = [
        _shortage(
            f"{short_size(each.added)} more {STORAGES[each.storage]} is needed, {short_size(each.free)} is free",
            f"{LESS}, or raise {_LIMITS[each.storage][2]} of this account",
        )
        for each in sums
        if each.free is not None and each.added + _has_unlimited(topology, changes, each.storage) > each.free
    ]
    created, most = sum(each.action == "create" for each in changes), _limit(limits, "max_streams")
    if created and most is not None and len(live) + created > most:
        text = f"{created} streams more are needed, and the account may have {most:,} and has {len(live):,}"
        found.append(_shortage(text, "declare fewer families, or raise max_streams of this account"))
    for spec in _changed_streams(topology, changes):
        size = spec.config.get("max_bytes", -1)
        storage: Storage = spec.config["storage"]
        single = _limit(limits, _LIMITS[storage][1])
        if single is not None and single > 0 and size > single:
            text = f"max_bytes is {short_size(size)}, and the account allows a stream {short_size(single)}"
            found.append(Problem(spec.name, "account-stream", text, f"{LESS}, or raise the account's limit"))
        if limits.get("max_bytes_required") and size <= 0:
            text = "the account requires max_bytes, and this stream can have none"
            found.append(Problem(spec.name, "account-stream", text, "switch max_bytes_required off for this account"))
    copies = max((each.config.get("num_replicas", 1) for each in _changed_streams(topology, changes)), default=1)
    if copies > 1 and not clustered:
        text = f"{copies} replicas need a cluster, but this is a single server"
        found.append(Problem("server", "no-cluster", text, "apply with --profile single"))
    return found


def _shortage(text: str, remedy: str) -> Problem:
    return Problem("account", "account-full", text, remedy)


def _changed_streams(topology: Topology, changes: Sequence[Change]) -> list[StreamSpec]:
    names = {each.stream for each in changes if each.action in ("create", "update") and not each.lanes}
    return [each for each in topology.streams.values() if each.name in names]


def _has_unlimited(topology: Topology, changes: Sequence[Change], storage: Storage) -> bool:
    """Whether a stream without max_bytes is created: the server wants a byte of room for it (2.15.1)."""
    names = {each.stream for each in changes if each.action == "create"}
    new = [each.config for each in topology.streams.values() if each.name in names]
    return any(each["storage"] == storage and each.get("max_bytes", -1) <= 0 for each in new)


def _reserved(config: Mapping[str, Any], storage: Storage) -> int:
    if config.get("storage") != storage:
        return 0
    return max(0, int(config.get("max_bytes", 0))) * int(config.get("num_replicas", 1))


def _limit(limits: Mapping[str, Any], key: str) -> int | None:
    value = limits.get(key, -1)
    return None if value < 0 else int(value)
