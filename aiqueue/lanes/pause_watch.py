"""Keeps a worker informed of the pauses: it hears of a change at once, and looks every second."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from .. import subjects
from ..connection import ChangeWatch, Connection, Received
from ..errors import AccessDenied, NotFound
from ..topology import Topology
from .pauses import ActivePauses, Pause, StoredPauses, has_ended, parse_pause

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
DENIED_S = 30.0  # until the next look of a worker that may not look

PausesChanged = Callable[[Sequence[Pause], Sequence[Pause]], None]


class PauseWatch:
    """Knows the pauses from `start` to `stop`.

    `active` is replaced when a pause begins or ends. Then `changed` is called, with those that have begun, also with
    one that was stored again, and with those that have ended. While the server does not answer, the pauses stay.
    `sees`: whether this worker can read the pauses at all.
    """

    def __init__(self, connection: Connection, topology: Topology, changed: PausesChanged) -> None:
        self._connection = connection
        self._pauses = StoredPauses(connection, topology)
        self._changed = changed
        self._known: dict[str, tuple[int, Pause | None]] = {}  # by subject: sequence; None: ended, or not understood
        self._begun: dict[str, tuple[int, Pause]] = {}  # what `changed` was told of
        self._watch = ChangeWatch(
            connection, subjects.PAUSES, self._look, what="pauses", key_of=self._key_of,
            every_s=lambda: LOOK_EVERY_S if self.sees else DENIED_S,
        )  # fmt: skip
        self.active = ActivePauses()
        self.sees = True

    async def start(self) -> None:
        """Read the pauses, and watch them. Raises Unavailable."""
        await self._watch.start()

    async def stop(self) -> None:
        """Safe twice and unstarted."""
        await self._watch.stop()

    def _key_of(self, message: Received) -> str:
        """Return the key of a pause that somebody says was changed: the message is its subject."""
        subject = message.data.decode(errors="replace")
        is_key = subject.startswith(self._pauses.filter.removesuffix(">")) and not set(subject) & set("*> ")
        return subject if is_key else ""

    async def _look(self) -> None:
        """Read what is stored, and call `changed` if that makes a difference. Raises Unavailable."""
        try:
            await self._read()
        except (AccessDenied, NotFound) as error:
            if self.sees:
                log.warning("this worker does not heed pauses: %s", error)
            self.sees = False
            return
        self.sees = True
        now = self._connection.clock.now()
        held = {key: (seq, each) for key, (seq, each) in self._known.items() if each and not has_ended(each, now)}
        begun = [each for key, (seq, each) in held.items() if self._begun.get(key, (0,))[0] != seq]
        ended = [each for key, (_, each) in self._begun.items() if key not in held]
        if begun or ended:
            self._begun = held
            self.active = ActivePauses(each for _, each in held.values())
            self._changed(begun, ended)

    async def _read(self) -> None:
        """Update what is known. Raises AccessDenied, NotFound, Unavailable.

        One request reads everything, perhaps from a server of a cluster that is behind. Where that differs from what is
        known, or a notice named a key, the stream's leader is asked.
        """
        noticed = self._watch.take_noticed()
        stream = self._pauses.stream
        try:
            read = self._connection.read(stream, self._pauses.filter, confirmed=False)
            found, now = {}, self._connection.clock.now()
            async for each in read:
                found[each.subject] = each.seq
                if each.subject not in self._known and each.subject not in noticed:
                    pause = parse_pause(each)
                    if pause is None or has_ended(pause, now):  # thousands may have ended in the last days
                        self._known[each.subject] = each.seq, pause
            known = {subject: seq for subject, (seq, _) in self._known.items()}
            differing = noticed | {each for each in found.keys() | known.keys() if found.get(each) != known.get(each)}
            for subject in differing:
                stored = await self._connection.last(stream, subject)
                if stored is None:
                    self._known.pop(subject, None)
                else:
                    self._known[subject] = stored.seq, parse_pause(stored)
                noticed.discard(subject)
        finally:
            self._watch.noticed |= noticed  # those that the leader was not asked for
