"""Why a publish has no PubAck: the server is asked whether a stream matches its subject."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from ..errors import AccessDenied, AIQueueError
from .publish_types import Publish

log = logging.getLogger(__name__)

LOOKUPS_MAX = 16  # at a time, of streams whose publishes only wait long
NO_LEADER = "no stream matches the subject, or the stream has no leader now"

Api = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]
Finish = Callable[[str, list[Publish], str, bool], None]


class StreamLookups:
    """The lookups of one window, by subject, and the publishes that wait for them.

    `finish` is called with each result: the subject, the publishes, the problem, and whether the problem is final.
    """

    def __init__(self, api: Api, finish: Finish) -> None:
        self._api = api
        self._finish = finish
        self._waiting: dict[str, list[Publish]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, subject: str) -> None:
        """Look up the stream of a subject whose publish waits long, unless LOOKUPS_MAX lookups are under way."""
        if subject not in self._waiting and len(self._waiting) < LOOKUPS_MAX:
            self._start(subject)

    def add(self, publish: Publish) -> None:
        """Look up the stream of `publish`, which nobody took ("no responders"). It waits for the result."""
        if publish.subject not in self._waiting:
            self._start(publish.subject)
        self._waiting[publish.subject].append(publish)

    def publishes(self) -> list[Publish]:
        """The publishes that wait for a lookup."""
        return [each for waiting in self._waiting.values() for each in waiting]

    def drop(self, dropped: set[int]) -> None:
        """Forget the publishes with these `id`s."""
        for subject, waiting in self._waiting.items():
            self._waiting[subject] = [each for each in waiting if id(each) not in dropped]

    def take_late(self, now: float) -> list[Publish]:
        """Take out the publishes that are past their deadline."""
        late: list[Publish] = []
        for subject, waiting in list(self._waiting.items()):
            in_time, past = split_by_deadline(waiting, now)
            self._waiting[subject] = list(in_time)
            late += past
        return late

    def close(self) -> tuple[list[Publish], set[asyncio.Task[None]]]:
        """Cancel all lookups. Returns the publishes that waited, and the cancelled tasks, which still run."""
        for task in self._tasks:
            task.cancel()
        publishes = self.publishes()
        self._waiting.clear()
        return publishes, set(self._tasks)

    def _start(self, subject: str) -> None:
        self._waiting[subject] = []
        task = asyncio.get_running_loop().create_task(self._run(subject))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, subject: str) -> None:
        """Ask the server. The problem is final if no stream matches, or if the account has no JetStream."""
        problem, final = NO_LEADER, False
        try:
            names = await self._api("STREAM.NAMES", {"subject": subject})
            final = not names.get("streams")
        except AccessDenied:
            pass  # a tenant's user may not list streams; the stream may only lack a leader
        except AIQueueError as error:
            log.debug("cannot look up the stream of %s: %s", subject, error)
            if "JetStream" in str(error):
                problem, final = str(error), not error.retryable
        self._finish(subject, self._waiting.pop(subject, []), problem, final)


def split_by_deadline(publishes: Iterable[Publish], now: float) -> tuple[deque[Publish], list[Publish]]:
    """Return those whose deadline is still ahead, and those past it."""
    in_time: deque[Publish] = deque()
    late: list[Publish] = []
    for each in publishes:
        (in_time if each.deadline > now else late).append(each)
    return in_time, late
