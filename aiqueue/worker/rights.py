"""What a worker cannot do without: its streams, and permissions. If the server denies one, the worker ends with
AccessDenied.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable

from .. import subjects
from ..connection import Connection
from ..errors import AccessDenied, NotFound
from ..topology import Family

CANCEL_AGAIN_S = 1.0
_CONSUMER_VERBS = ("CREATE", "MSG")  # to create a lane's consumer, and to pull from it


async def require_streams(connection: Connection, families: Iterable[Family]) -> None:
    """Raise NotFound if a family's stream is missing, before anything else complains of streams that are. Raises
    AccessDenied, Unavailable.
    """
    for family in families:
        if family.lanes == "shared":  # of other programs, which need not permit the question
            continue
        try:
            await connection.api(f"STREAM.INFO.{family.stream}")
        except NotFound:
            raise NotFound(f"there is no stream {family.stream}: run `aiqueue apply` first") from None


class Rights:
    """Watches for denials of what the worker publishes and nobody waits for, such as pulls and acks.

    `failure` is the first denial. It cancels the task that was current at `start`, and later ones do so again, because
    `asyncio.wait_for` can lose a cancellation in Python 3.11.
    """

    def __init__(
        self,
        connection: Connection,
        families: Collection[Family],
        journal_stream: str,
        writes_journal: Callable[[str], bool],
    ) -> None:
        """`writes_journal`: whether a job that runs here has its journal on a subject."""
        self._connection = connection
        self._streams = {family.stream for family in families}
        self._subjects = {f"$JS.API.{verb}.GET.{journal_stream}" for verb in ("STREAM.MSG", "DIRECT")}
        self._journals = tuple(f"{family.journal}." for family in families if family.journal)
        self._writes_journal = writes_journal
        self._owner: asyncio.Task[object] | None = None
        self._ignore: Callable[[], None] | None = None
        self._cancels = 0  # of the owner, by this watch
        self._cancelled_at = -CANCEL_AGAIN_S  # by the event loop's time
        self._cancels_before = 0  # of the owner, by others
        self.failure: AccessDenied | None = None

    def start(self) -> None:
        self._owner = asyncio.current_task()
        self._cancels_before = self._owner.cancelling() if self._owner is not None else 0
        self._ignore = self._connection.on_denied(self._on_denied)

    def stop(self) -> None:
        """Safe twice and unstarted."""
        if self._ignore is not None:
            self._ignore()

    def needs(self, subject: str) -> bool:
        """Whether the worker is of no use without the permission to publish on `subject`."""
        tokens = subject.split(".")
        if tokens[:2] == ["$JS", "ACK"] or (tokens[:3] == ["$JS", "API", "CONSUMER"] and tokens[3] in _CONSUMER_VERBS):
            return not self._streams.isdisjoint(tokens)
        if subject.startswith(self._journals):
            return self._writes_journal(subject)
        return subject in self._subjects or subject.startswith(f"{subjects.BACK}.")

    def _on_denied(self, subject: str, error: AccessDenied) -> None:
        now = asyncio.get_running_loop().time()
        if self._owner is None or now < self._cancelled_at + CANCEL_AGAIN_S or not self.needs(subject):
            return
        self.failure = self.failure or error
        self._cancels, self._cancelled_at = self._cancels + 1, now
        self._owner.cancel()

    def absolve(self) -> bool:
        """Take back the cancellations by this watch. Returns whether there is another one, or no failure."""
        left = self._owner.cancelling() if self._owner is not None else 0
        for _ in range(self._cancels):
            if self._owner is not None:
                left = self._owner.uncancel()
        self._cancels = 0
        return self.failure is None or left > self._cancels_before
