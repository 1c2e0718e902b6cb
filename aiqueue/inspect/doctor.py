"""Checks what the connected server does for the promises of docs/concepts/guarantees.md, and what is about to go wrong.

Reads only. Each check yields findings: what happened, to what, and what to do.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable

from .. import units
from ..connection import timestamp
from ..errors import AIQueueError, BadInput, NotFound
from .finding import Finding, Subject, level_of_use, warn
from .lane_checks import check_kinds, check_lanes, check_tenants
from .limit_checks import check_limits
from .pause_checks import check_pauses
from .schedule_checks import check_schedules
from .stream_checks import check_answers, check_streams

API_LEVEL_MIN = 2  # message schedules: nats-server 2.12
PAYLOAD_WISE_MAX = 8 * 1024 * 1024
CLOCK_SKEW_MAX_S = 1.0
DISK_LOW_BYTES, DISK_OUT_BYTES = 1024**3, 100 * 1024**2
MONITOR_TIMEOUT_S = 3.0
SYNC_DEFAULT_S = 120.0  # nats-server's own


async def examine(subject: Subject) -> AsyncIterator[Finding]:
    """Run all checks, and yield their findings. A check that cannot be made is a finding too."""
    checks: dict[str, Callable[[Subject], AsyncIterator[Finding]]] = {
        "server": _check_server,
        "storage": _check_storage,
        "sync": _check_sync,
        "streams": check_streams,
        "answers": check_answers,
        "lanes": check_lanes,
        "pauses": check_pauses,
        "limits": check_limits,
        "schedules": check_schedules,
        "kinds": check_kinds,
        "tenants": check_tenants,
        "clock": _check_clock,
    }
    for name, check in checks.items():
        try:
            async for finding in check(subject):
                yield finding
        except AIQueueError as error:
            yield warn(name, "unchecked", f"cannot be checked: {error}", level="fail")


async def _check_server(subject: Subject) -> AsyncIterator[Finding]:
    connection = subject.connection
    info = await connection.api("INFO")
    level = (info.get("api") or {}).get("level", 0)
    where = f"nats-server {connection.server_version} at {connection.server}, JetStream API level {level}"
    if level < API_LEVEL_MIN:
        yield warn("server", "server-old", where, level="fail")
    else:
        yield Finding("server", "ok", where)
    limit = connection.max_payload
    text = f"max_payload is {units.short_size(limit)}"
    if limit > PAYLOAD_WISE_MAX:
        yield warn("payload", "payload-large", text)
    else:
        yield Finding("payload", "ok", text)


async def _check_storage(subject: Subject) -> AsyncIterator[Finding]:
    info = await subject.connection.api("INFO")
    limits = info.get("limits") or {}
    for kind in ("storage", "memory"):
        used, limit = info.get(kind, 0), limits.get(f"max_{kind}", -1)
        reserved = info.get(f"reserved_{kind}", 0)
        if kind == "memory" and not used and limit <= 0:
            continue
        bound = f"of {units.short_size(limit)}" if limit > 0 else "without a limit of the account"
        text = f"{units.short_size(used)} of {kind} used {bound}, {units.short_size(reserved)} reserved by streams"
        level = level_of_use(used, limit)
        yield Finding(kind, "ok", text) if level == "ok" else warn(kind, "account-storage", text, level=level)
    for kind in ("streams", "consumers"):
        used, limit = info.get(kind, 0), limits.get(f"max_{kind}", -1)
        if (level := level_of_use(used, limit)) != "ok":
            yield warn(kind, "account-count", f"{used:,} of {limit:,} {kind} of the account", level=level)
    if subject.directory is not None:
        free = shutil.disk_usage(subject.directory).free
        text = f"{units.short_size(free)} free in {subject.directory}"
        if free < DISK_LOW_BYTES:
            yield warn("disk", "disk-low", text, level="fail" if free < DISK_OUT_BYTES else "warn")
        else:
            yield Finding("disk", "ok", text)


async def _check_sync(subject: Subject) -> AsyncIterator[Finding]:
    """Check how often the server syncs to disk: a power cut loses what was acknowledged since."""
    if subject.directory is not None:
        interval_s = SYNC_DEFAULT_S  # the embedded server's configuration sets none
    elif subject.monitor:
        interval_s = await asyncio.to_thread(_read_sync_interval_s, subject.monitor)
    else:
        yield warn("sync", "sync-unknown", "clients cannot see how often the server syncs to disk")
        return
    if interval_s == 0:
        yield Finding("sync", "ok", "every write is synced before it is acknowledged")
        return
    text = f"synced every {units.short_duration(interval_s)}: a power cut may lose what was acknowledged since"
    where = "of several servers at once " if subject.connection.cluster else ""
    how = "run your own server with" if subject.directory is not None else "set"
    yield warn("sync", "sync-late", text, where=where, how=how)


def _read_sync_interval_s(monitor: str) -> float:
    """Return the sync interval that a server's monitoring reports; 0 for every write. Raises BadInput."""
    if not monitor.startswith(("http://", "https://")):
        raise BadInput(f"--monitor {monitor}: must be an address such as http://127.0.0.1:8222")
    try:
        with urllib.request.urlopen(f"{monitor.rstrip('/')}/varz", timeout=MONITOR_TIMEOUT_S) as answer:  # noqa: S310
            config = json.load(answer)["jetstream"]["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"--monitor {monitor}: no monitoring of a JetStream server answers there: {error}") from None
    return 0.0 if config.get("sync_always") else float(config.get("sync_interval", 0)) / 1e9


async def _check_clock(subject: Subject) -> AsyncIterator[Finding]:
    """Check this clock against the server's: plain clients set deadlines by theirs, and logs have local times."""
    name = next(iter(subject.topology.streams))
    before = time.time()
    try:
        server_time = timestamp((await subject.connection.api(f"STREAM.INFO.{name}"))["ts"])
    except NotFound:
        return
    ahead_s = server_time - (before + time.time()) / 2
    text = f"the server's clock is {abs(ahead_s):.2f} s {'ahead of' if ahead_s > 0 else 'behind'} this one"
    if abs(ahead_s) > CLOCK_SKEW_MAX_S:
        yield warn("clock", "clock-skew", text)
    else:
        yield Finding("clock", "ok", text)
