"""The window of acks: how many the server may owe a worker before the worker asks for no more jobs.

The server works off acks behind deliveries. Where it has many consumers, or long searches for their next jobs, acks
fall behind by seconds and more, requests wait as long, and if the server dies then, all of these jobs are delivered
again although they are done. So one ack in EVERY is sent as a request, which the server answers once it has removed the
job, and EVERY jobs count as unconfirmed until then.
"""

from __future__ import annotations

import itertools
import logging
import time

from ..connection import ack_frame

log = logging.getLogger(__name__)

EVERY = 16
UNCONFIRMED_MAX = 2_048  # jobs
LOST_S = 10.0  # an answer that has not come by then is not waited for any more
PREFIX = "a"  # of the last token of an answer's subject; a pull request's is a number


class AckWindow:
    """Counts the acks of one worker that the server has not confirmed.

    `inbox`: where the answers go to, with a dot at its end; "": nowhere, no ack is a request. `left`: acks up to and
    with the next request. Who sends an ack counts it down, and takes the frame from here at 0: a call less for each.
    """

    __slots__ = ("_is_low", "_numbers", "_open", "inbox", "left", "unconfirmed_max")

    def __init__(self) -> None:
        self.inbox = ""
        self.unconfirmed_max = UNCONFIRMED_MAX
        self.left = EVERY
        self._numbers = itertools.count(1)
        self._open: dict[str, tuple[str, float]] = {}  # number -> the lane's token, when it was sent
        self._is_low = False  # as last asked for

    def frame(self, subject: str, token: str) -> bytes:
        """Return the PUB of an ack that is a request, of a job of the lane with this token."""
        self.left = EVERY
        if not self.inbox:
            return ack_frame(subject)
        number = f"{PREFIX}{next(self._numbers):x}"
        self._open[number] = token, time.monotonic()
        return ack_frame(subject, f"{self.inbox}{token}.{number}")

    def room(self) -> int:
        """Return for how many more jobs there is room; 0 or less: for none."""
        room = self.unconfirmed_max - EVERY * len(self._open)
        self._is_low = room * 2 < self.unconfirmed_max
        return room

    def confirm(self, number: str) -> bool:
        """An answer has come. Return whether who asks for jobs should look again: less than half was room before."""
        self._open.pop(number, None)
        was_low, self._is_low = self._is_low, False
        return was_low

    def forget(self, token: str) -> None:
        """Wait for no answers about a lane any more: its consumer is gone."""
        for number in [number for number, (lane, _) in self._open.items() if lane == token]:
            del self._open[number]

    def restart(self, inbox: str) -> None:
        """Wait for no answer any more. From now on they go to this inbox."""
        self.inbox = inbox
        self._open.clear()

    def drop_lost(self) -> None:
        """Forget answers that are missing for LOST_S. Call once a second."""
        before = time.monotonic() - LOST_S
        lost = list(itertools.takewhile(lambda each: each[1][1] < before, self._open.items()))
        for number, _ in lost:
            del self._open[number]
        if lost:
            log.debug("%d acks are not confirmed by the server after %.0f s", EVERY * len(lost), LOST_S)
