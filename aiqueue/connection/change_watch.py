"""Follows what others may change: looks when a notice comes, when a lost link is back, and every so often."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from ..errors import AIQueueError
from .frames import Received
from .subscription import Subscription

log = logging.getLogger(__name__)

APART_S = 0.02  # between two looks, however many notices there are
NOTICED_MAX = 1_000


class WatchConnection(Protocol):
    """What a watch needs of its connection."""

    async def subscribe(self, subject: str, callback: Callable[[Received], None], /) -> Subscription: ...
    def on_regained(self, callback: Callable[[], None], /) -> Callable[[], None]: ...


class ChangeWatch:
    """Calls `look`, one at a time, from `start` to `stop`. Notices only make it quick: they may be lost, or forged.

    - `what`: for the log, as in "looking for pauses failed".
    - `key_of`: the key that a notice names; "": none. `noticed` has them until `look` takes them.
    - `every_s`: how long after a look the next one is due, in seconds.
    - `regained`: is called when a lost link is back, before the look.
    """

    def __init__(
        self,
        connection: WatchConnection,
        subject: str,
        look: Callable[[], Awaitable[None]],
        *,
        what: str,
        key_of: Callable[[Received], str],
        every_s: Callable[[], float],
        regained: Callable[[], None] | None = None,
    ) -> None:
        self._connection, self._subject, self._look = connection, subject, look
        self._what, self._key_of, self._every_s, self._regained = what, key_of, every_s, regained
        self._subscription: Subscription | None = None
        self._off: Callable[[], None] | None = None
        self._task: asyncio.Task[None] | None = None
        self.noticed: set[str] = set()
        self.wake = asyncio.Event()  # set it to have a look soon

    async def start(self) -> None:
        """Look, and go on looking. Raises what the first look raises."""
        self._subscription = await self._connection.subscribe(self._subject, self._on_notice)
        self._off = self._connection.on_regained(self.on_regained)
        try:
            await self._look()
        except BaseException:
            await self.stop()
            raise
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Safe twice and unstarted."""
        if self._off is not None:
            self._off()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.close()

    def take_noticed(self) -> set[str]:
        """Return the keys that were named since the last look, and forget them."""
        noticed, self.noticed = self.noticed, set()
        return noticed

    def on_regained(self) -> None:
        if self._regained is not None:
            self._regained()
        self.wake.set()

    def _on_notice(self, message: Received) -> None:
        key = self._key_of(message)
        if key and len(self.noticed) < NOTICED_MAX:
            self.noticed.add(key)
        self.wake.set()

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._every_s()):
                    await self.wake.wait()
            self.wake.clear()
            try:
                await self._look()
            except AIQueueError as error:
                log.debug("looking for %s: %s", self._what, error)
            except Exception:
                log.exception("looking for %s failed; the next look is in %g s", self._what, self._every_s())
            await asyncio.sleep(APART_S)
