"""Sends the entries of chunks of all jobs of a connection together, so that they share what a message costs.

Entries that are there in the same turn of the event loop go in one write to the socket. While such a group waits for
its PubAcks, newcomers gather and go as the next one, after HOLD_S at the latest. So a lone stream does not wait, and
the more there are, the larger groups become.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from ..connection import Connection, Publish
from ..errors import AIQueueError

HOLD_S = 0.005
TIMEOUT_S = 30.0


class SentChunks(Publish):
    """An entry of chunks on its way into its journal, sent by a `ChunkPace`."""

    sender: ChunkSender
    pace: ChunkPace
    is_open = True  # its pace counts it as under way

    def settled(self) -> None:
        self.pace.close(self)
        self.sender.on_settled(self)


class ChunkSender(Protocol):
    """Has entries to send: `chunks.ChunkBuffer`."""

    def begin(self) -> SentChunks | None: ...
    def on_settled(self, sent: SentChunks) -> None: ...


class ChunkPace:
    """The entries of chunks of one connection that wait, and how many are under way."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: dict[ChunkSender, None] = {}  # in their order
        self._under_way = 0
        self._planned: asyncio.Handle | None = None

    def ask(self, sender: ChunkSender) -> None:
        """Send the next entry of `sender` soon: `ChunkSender.begin` is called then."""
        self._waiting[sender] = None
        if self._planned is None:
            loop = asyncio.get_running_loop()
            self._planned = loop.call_later(HOLD_S, self.send) if self._under_way else loop.call_soon(self.send)

    def send(self) -> None:
        """Send all entries that wait, now."""
        if self._planned is not None:
            self._planned.cancel()
            self._planned = None
        waiting, self._waiting = self._waiting, {}
        group = [sent for each in waiting if (sent := each.begin()) is not None]
        if not group:
            return
        for sent in group:
            sent.pace = self
        self._under_way += len(group)
        try:
            self._connection.add_all(group, TIMEOUT_S)
        except AIQueueError as error:
            for sent in group:
                sent.outcome = error
                sent.settled()
        else:
            self._connection.push()

    def close(self, sent: SentChunks) -> None:
        """Count an entry as under way no more. Safe twice."""
        if not sent.is_open:
            return
        sent.is_open = False
        self._under_way -= 1
        if not self._under_way and self._waiting:
            if self._planned is not None:
                self._planned.cancel()
            self._planned = asyncio.get_running_loop().call_soon(self.send)

    def abandon(self, sent: SentChunks) -> None:
        """Wait for an entry no longer. It may be stored all the same."""
        self._connection.window.abandon([sent])
        self.close(sent)
