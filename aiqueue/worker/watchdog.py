"""Ends a process whose event loop is blocked for longer than any handler that runs on it may take."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
import threading
import time
import traceback
from collections import defaultdict
from types import TracebackType
from typing import Self

log = logging.getLogger("aiqueue.watchdog")

TICK_S = 1.0
GRACE_S = 5.0  # beyond the longest timeout of the handlers that run
SAY_S = 2.0  # what the log gets: its lock may be what the loop waits for
EXIT_CODE = 70


class Watchdog:
    """A thread that sees whether the loop still answers, while async handlers run and all have a timeout. Who runs one
    counts it in `running`.

    Time in which this thread did not run either, the process being stopped or the machine asleep, does not count.
    A handler that holds the interpreter's lock holds this thread too.
    """

    def __init__(self) -> None:
        self.running: defaultdict[float | None, int] = defaultdict(int)  # handlers on the loop, by timeout (None: none)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watched = 0  # the id of the loop's thread
        self._stop = threading.Event()
        self._answered = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Watch the running loop."""
        self._loop = asyncio.get_running_loop()
        self._watched = threading.get_ident()
        self._thread = threading.Thread(target=self._run, name="aiqueue-watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(TICK_S)

    def _run(self) -> None:
        assert self._loop is not None
        blocked_s, asked, over = 0.0, False, 0
        last = time.monotonic()
        while not self._stop.wait(TICK_S):
            now = time.monotonic()
            if asked and not self._answered.is_set():
                blocked_s += min(now - last, 2 * TICK_S)
                over = over + 1 if blocked_s > self._limit_s() else 0
                if over > 1:  # seen twice: a process that was stopped gets its tick to answer
                    self._end(blocked_s)
            else:
                blocked_s, over, asked = 0.0, 0, any([*self.running.values()])
                if asked:
                    self._answered.clear()
                    try:
                        self._loop.call_soon_threadsafe(self._answered.set)
                    except RuntimeError:
                        return  # the loop is closed
            last = now

    def _limit_s(self) -> float:
        """How long a loop may be blocked: whichever handler does it, it is past its timeout then."""
        limits = [math.inf if limit is None else limit for limit, count in [*self.running.items()] if count]
        return max(limits, default=math.inf) + GRACE_S

    def _end(self, blocked_s: float) -> None:
        frame = sys._current_frames().get(self._watched)
        stack = traceback.extract_stack(frame) if frame else []
        where = f"{stack[-1].filename}:{stack[-1].lineno} in {stack[-1].name}" if stack else "an unknown place"
        text = (
            f"the event loop has been blocked for {blocked_s:.0f} s, longer than any running handler's timeout, "
            f"at {where}: this process ends with exit code {EXIT_CODE}\n{''.join(traceback.format_list(stack))}"
        )
        saying = threading.Thread(target=log.critical, args=("%s", text), daemon=True)
        saying.start()
        saying.join(SAY_S)
        os._exit(EXIT_CODE)
