"""Clients of a test's account, with the streams that the test needs."""

from __future__ import annotations

import asyncio
import json
import weakref
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager
from typing import Any

from ..client import Client, check_client, connect
from ..config import NONE, Settings
from ..errors import BadInput
from ..job import MakeHeaders
from ..topology import Topology
from ..units import Duration, parse_duration, texts

FIXTURE = "pass what the fixture `aiqueue_settings` gives, or aiqueue.Settings of a server that is for tests alone"

_opened: weakref.WeakSet[Client] = weakref.WeakSet()


@asynccontextmanager
async def client(
    settings: Settings,
    *,
    families: Collection[str] | None = None,
    ack_wait: Duration | None = None,
    headers: MakeHeaders | None = None,
) -> AsyncIterator[Client]:
    """Open a client, and create the streams on its account: ``async with testing.client(aiqueue_settings) as client``.

    - `settings`: of the fixture `aiqueue_settings`, or of another server that is for tests alone.
    - `families`: of what the test enqueues, such as ``["agent.tasks"]``: the setting `families` of this client. Only
      their streams are created, and those that all families share, which takes less time. None: those of the settings.
    - `ack_wait`: how long after the death of a worker its jobs are delivered again, at least 1 second; the setting
      `overlay` of each family. None: as the stream files say, mostly 30 seconds.
    - `headers`: the function of ``connect(headers=...)``. None: none.

    A second client of the same settings in a test finds the streams of the first. Raises BadInput for wrong arguments,
    TopologyError for a family that no file declares, Unavailable, and Conflict for a stream that is there with another
    configuration.
    """
    if not isinstance(settings, Settings):
        raise BadInput(f"testing.client needs settings, not {type(settings).__name__}: {FIXTURE}")
    if not settings.servers:
        raise BadInput(f"testing.client needs the address of a server, and these settings have none: {FIXTURE}")
    if families is not None:
        settings = settings.with_arguments(families=texts("families", families))
    if ack_wait is not None:
        settings = _with_ack_wait(settings, parse_duration("ack_wait", ack_wait))
    opened = connect(settings=settings, headers=headers)
    async with opened:
        await create_streams(opened)
        _opened.add(opened)
        yield opened


def _with_ack_wait(settings: Settings, ack_wait_s: float) -> Settings:
    """Return settings in which the jobs of each family have such a lease."""
    overlay = dict(settings.overlay)
    for family in Topology.of(settings).work_families:
        tables = dict(overlay.get(family.name, {}))
        overlay[family.name] = {**tables, "consumer": {**tables.get("consumer", {}), "ack_wait": f"{ack_wait_s:g}s"}}
    return settings.model_copy(update={"overlay": overlay})


async def create_streams(opened: Client) -> None:
    """Create all streams of a client at once. `apply` asks about each one before and after: five times the calls."""
    streams = opened.topology.streams.values()
    await asyncio.gather(*(opened.connection.api(f"STREAM.CREATE.{each.name}", dict(each.config)) for each in streams))


def check_test_client(opened: Any, *, what: str) -> None:
    """Raise BadInput unless the client was opened by `client`: `what` this does to a server is only for tests."""
    check_client(opened)
    if opened not in _opened:
        raise BadInput(f"{what}: open the client with `async with aiqueue.testing.client(aiqueue_settings) as client:`")


def environment(settings: Settings) -> dict[str, str]:
    """Return the environment variables by which a program uses these settings, such as one that a test starts::

    for name, value in testing.environment(aiqueue_settings).items():
        monkeypatch.setenv(name, value)  # `aiqueue.connect()` without arguments uses the test's account
    """
    if not isinstance(settings, Settings):
        raise BadInput(f"testing.environment needs settings, not {type(settings).__name__}: {FIXTURE}")
    return dict(_variables(settings))


def _variables(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield what differs from the default, and what a file or the environment states: the test's value is another."""
    plain = settings.to_plain()
    for name, field in Settings.model_fields.items():
        value = plain[name]
        if getattr(settings, name) == field.default and settings.source(name) == "default":
            continue
        if value is None and name == "url":
            continue  # no variable says that there is no address
        if value is None:
            text = NONE
        elif name == "overlay":
            text = json.dumps(value)
        else:
            text = ",".join(value) if name == "families" else str(value)
        yield f"AIQUEUE_{name.upper()}", text
