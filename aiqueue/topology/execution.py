"""Makes the changes of a plan, and takes all of them back if one fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from ..connection import Connection, to_its_end
from ..errors import AIQueueError, ConfigMismatch, NotFound, QueueFull, ServerError, Unavailable
from .account import LESS
from .changes import Change, format_value
from .declared import Family, StreamSpec, Topology
from .problems import FATAL_LANE_SETTINGS
from .stamps import Applier, hash_declaration

log = logging.getLogger(__name__)

_PARALLEL = 16  # lanes changed at once: in a cluster each takes tens of milliseconds
_DERIVED = ("subject_transform", "republish")  # of the subjects of a stream
WantedConfig = Callable[[StreamSpec, Mapping[str, Any]], dict[str, Any]]
FindConflict = Callable[[Connection, str, list[str]], Awaitable[str | None]]


class PlanExecution:
    """One apply: what it has changed on the server, so that it can take it back."""

    def __init__(
        self, conn: Connection, topology: Topology, applier: Applier, wanted: WantedConfig, conflict: FindConflict
    ) -> None:
        """`wanted` returns the fields to set in a live stream, `conflict` a stream in the way of subjects."""
        self._conn = conn
        self._topology = topology
        self._applier = applier
        self._wanted = wanted
        self._conflict = conflict
        # what was sent, also if its answer is not known: the stamps on the server tell what was carried out
        self._created: list[str] = []
        self._updated: dict[str, _Update] = {}
        self._lanes: list[tuple[str, dict[str, Any]]] = []  # stream, config before
        self._lossy: list[str] = []

    async def run(self, changes: Sequence[Change]) -> None:
        """Make the changes. If one fails or this is cancelled, undo all of this and earlier calls first.

        Raises what the server answered; the text says what was undone, and what could not be.
        """
        try:
            for change in changes:
                await self._execute(change)
        except AIQueueError as error:
            error.args = (f"{error}; {await to_its_end(self._undo())}", *error.args[1:])
            raise
        except BaseException:
            log.warning("apply was interrupted: %s", await to_its_end(self._undo()))
            raise

    async def create(self, spec: StreamSpec) -> None:
        """Create a stream, if no other process has done so since the plan. Raises ConfigMismatch, ServerError."""
        self._created.append(spec.name)
        try:
            await self._configure("CREATE", spec, self._stamped(spec, dict(spec.config)))
        except (ConfigMismatch, ServerError):
            # Since the plan, another process may have created the stream, or another one with its subjects.
            if conflict := await self._conflict(self._conn, spec.name, spec.config["subjects"]):
                raise ConfigMismatch(f"{spec.name}: {conflict}") from None
            try:
                await self._conn.api(f"STREAM.INFO.{spec.name}")  # compared in the next round of apply
            except NotFound:
                pass
            else:
                return
            raise

    async def _execute(self, change: Change) -> None:
        spec = self._topology.streams[change.stream]
        match change.action:
            case "create":
                await self.create(spec)
            case "update":
                if change.lanes:
                    family = next(each for each in self._topology.work_families if each.stream == change.stream)
                    await _for_each(change.lanes, lambda name: self._update_lane(family, name))
                await self._update(spec, stamp_only=bool(change.lanes))
                if change.loss:
                    self._lossy.append(spec.name)
            case "delete-lanes":
                await _for_each(change.lanes, lambda name: self._delete_lane(spec.name, name))
            case "replace-needed":
                raise AssertionError("a plan with a refused change was executed")

    async def _update(self, spec: StreamSpec, *, stamp_only: bool) -> None:
        live = (await self._conn.api(f"STREAM.INFO.{spec.name}"))["config"]
        # An update replaces the whole configuration, so undeclared fields are sent with their live values.
        config = live | ({} if stamp_only else self._wanted(spec, live))
        update = self._updated.setdefault(spec.name, _Update(live))  # in a later round, `before` stays the first
        update.after = None
        update.after = (await self._configure("UPDATE", spec, self._stamped(spec, config)))["config"]

    def _stamped(self, spec: StreamSpec, config: dict[str, Any]) -> dict[str, Any]:
        stamp = self._applier.stamp(config.get("metadata"), hash_declaration(self._topology, spec))
        return config | {"metadata": stamp}

    async def _configure(
        self, verb: Literal["CREATE", "UPDATE"], spec: StreamSpec, config: dict[str, Any]
    ) -> dict[str, Any]:
        try:
            return await self._conn.api(f"STREAM.{verb}.{spec.name}", config)
        except QueueFull as error:
            for limit in ("max_consumers", "max_streams"):
                if f" {limit.removeprefix('max_')} " in error.reason:
                    needed = f"needs {limit} of {config[limit]:,}" if limit in config else "is a stream too many"
                    remedy = f"raise {limit} of this account in the server's configuration"
                    raise ConfigMismatch(f"{spec.name} {needed}: {error.reason}: {remedy}") from None
            needed = f"{format_value('max_bytes', config.get('max_bytes', -1))} of {config['storage']} storage"
            raise ConfigMismatch(
                f"{spec.name} reserves {needed}, too much for the server: {error.reason}: {LESS}, or give it more"
            ) from None
        except (ServerError, Unavailable) as error:
            if "non-clustered" not in str(error):
                raise
            problem = f"{spec.name}: {config['num_replicas']} replicas need a cluster, but this is a single server"
            raise ConfigMismatch(f"{problem}: apply with --profile single") from None

    async def _update_lane(self, family: Family, name: str) -> None:
        """Set the declared limits of a lane. A lane that was deleted meanwhile is ignored: workers recreate it."""
        try:
            live = (await self._conn.api(f"CONSUMER.INFO.{family.stream}.{name}"))["config"]
            lane = family.lane_of(name)
            kept = {key: value for key, value in live.items() if key not in FATAL_LANE_SETTINGS}
            self._lanes.append((family.stream, live))
            await self._set_lane(family.stream, kept | family.lane_limits(lane.tenant if lane else "*"))
        except NotFound:
            return

    async def _set_lane(self, stream: str, config: dict[str, Any]) -> None:
        name = config.get("durable_name") or config["name"]
        subject = f"CONSUMER.CREATE.{stream}.{name}.{config['filter_subject']}"
        await self._conn.api(subject, {"stream_name": stream, "config": config, "action": "update"})

    async def _delete_lane(self, stream: str, name: str) -> None:
        try:
            await self._conn.api(f"CONSUMER.DELETE.{stream}.{name}")
        except NotFound:
            return

    async def _undo(self) -> str:
        """Take back what this apply has changed, what it created last. Return what was done as a sentence."""
        left = [f"messages that the change of {name} has deleted do not come back" for name in self._lossy]
        undo: list[tuple[str, Callable[[], Awaitable[bool]]]] = [
            *((f"the change of {name}", partial(self._set_back, name, each)) for name, each in self._updated.items()),
            *((f"a lane of {name}", partial(self._set_lane_back, name, before)) for name, before in self._lanes),
            *((f"the new stream {name}", partial(self._remove, name)) for name in reversed(self._created)),
        ]
        undone, lost = 0, False
        for what, take_back in undo:
            try:
                if lost:
                    raise Unavailable("the server does not answer")
                undone += await take_back()
            except AIQueueError as error:
                lost = lost or isinstance(error, Unavailable)
                left.append(f"{what} ({error})")
        self._created, self._updated, self._lanes, self._lossy = [], {}, [], []
        if left:
            return f"changes made before were undone, but for: {'; '.join(left)}"
        changes = "the change made before was" if undone == 1 else f"the {undone} changes made before were"
        return f"nothing is changed: {changes} undone" if undone else "nothing is changed"

    async def _set_back(self, stream: str, update: _Update) -> bool:
        """Give a stream its former configuration, and return whether it had another one by this apply."""
        now = (await self._conn.api(f"STREAM.INFO.{stream}"))["config"]
        if not self._applier.made(now):
            return False
        if update.after not in (None, now):
            raise ConfigMismatch("another program has changed it since")
        await self._conn.api(f"STREAM.UPDATE.{stream}", update.before)
        return True

    async def _set_lane_back(self, stream: str, before: dict[str, Any]) -> bool:
        try:
            await self._set_lane(stream, before)
        except NotFound:
            return False  # gone since: workers create it as they declare it
        return True

    async def _remove(self, stream: str) -> bool:
        """Delete a stream of this apply, unless another program uses it by now. Return whether there was one."""
        try:
            config = (await self._conn.api(f"STREAM.INFO.{stream}"))["config"]
        except NotFound:
            return False
        if not self._applier.made(config):
            return False
        # Producers may have found the stream. Away from its subjects it gets no message between the check and the end.
        aside = {key: value for key, value in config.items() if key not in _DERIVED}
        info = await self._conn.api(f"STREAM.UPDATE.{stream}", aside | {"subjects": [aside_subject(stream)]})
        if stored := info["state"]["messages"]:
            await self._conn.api(f"STREAM.UPDATE.{stream}", config)
            raise ConfigMismatch(f"it has stored {stored:,} messages meanwhile")
        await self._conn.api(f"STREAM.DELETE.{stream}")
        return True


@dataclass
class _Update:
    """A stream that was changed: its configuration before, and as the server then said it was."""

    before: dict[str, Any]
    after: dict[str, Any] | None = None


def aside_subject(stream: str) -> str:
    """Return the subject that a stream has alone before an apply deletes what it created."""
    return f"aiq.undone.{stream}"


async def _for_each(names: tuple[str, ...], do: Callable[[str], Awaitable[None]]) -> None:
    for start in range(0, len(names), _PARALLEL):
        ended = await asyncio.gather(*(do(name) for name in names[start : start + _PARALLEL]), return_exceptions=True)
        if failed := [each for each in ended if isinstance(each, BaseException)]:
            raise failed[0]  # now that no other is under way
