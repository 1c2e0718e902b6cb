"""End a process whose event loop is blocked for longer than any handler that runs on it may take."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Self

log = logging.getLogger(__name__)

TICK_S = 1.0
GRACE_S = 5.0  # beyond the longest timeout of the handlers that run
LOG_S = 2.0  # what the last log record gets: the log's lock may be what the loop waits for
EXIT_CODE = 70


class Watchdog:
    """A thread that checks whether the event loop still answers. It ends a process whose loop is blocked for too long
    while async handlers run that all have a timeout.

    `running` has the attempts whose handlers run on the loop, with their timeouts in seconds (None: no timeout).
    Whoever calls a handler adds its attempt there. Time in which this thread did not run either does not count: the
    process was stopped, or the machine was asleep. A handler that holds the interpreter's lock stops this thread too.

    `on_blocked` is called in this thread once a second while the loop is blocked, with for how many seconds it is and
    where, such as "app.py:17 in crawl"; and with 0 once the loop answers again.
    """

    def __init__(self, on_blocked: Callable[[float, str], None] = lambda _blocked_s, _where: None) -> None:
        self.running: dict[object, float | None] = {}
        self._on_blocked = on_blocked
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread_id = 0
        self._stop = threading.Event()
        self._answered = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Start to watch the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._loop_thread_id = threading.get_ident()
        self._thread = threading.Thread(target=self._watch_loop, name="aiqueue-watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(TICK_S)

    def _watch_loop(self) -> None:
        """Ask the loop for an answer once a tick, and end the process if none came within `_limit_s`."""
        assert self._loop is not None
        blocked_s, asked, ticks_over_limit = 0.0, False, 0
        last = time.monotonic()
        while not self._stop.wait(TICK_S):
            now = time.monotonic()
            if asked and not self._answered.is_set():
                blocked_s += min(now - last, 2 * TICK_S)
                ticks_over_limit = ticks_over_limit + 1 if blocked_s > self._limit_s() else 0
                if ticks_over_limit > 1:  # not at the first: a process that was stopped gets a tick to answer
                    self._end_process(blocked_s)
                self._on_blocked(blocked_s, self._find_frame()[0])
            else:
                if blocked_s:
                    self._on_blocked(0.0, "")
                blocked_s, ticks_over_limit, asked = 0.0, 0, True
                self._answered.clear()
                try:
                    self._loop.call_soon_threadsafe(self._answered.set)
                except RuntimeError:
                    return  # the loop is closed
            last = now

    def _limit_s(self) -> float:
        """Return for how many seconds the loop may be blocked: until the longest timeout of its handlers is over."""
        limits = [math.inf if limit is None else limit for limit in [*self.running.values()]]
        return max(limits, default=math.inf) + GRACE_S

    def _find_frame(self) -> tuple[str, list[traceback.FrameSummary]]:
        """Return where the loop's thread is, and its stack."""
        frame = sys._current_frames().get(self._loop_thread_id)
        stack = list(traceback.extract_stack(frame)) if frame else []
        where = f"{stack[-1].filename}:{stack[-1].lineno} in {stack[-1].name}" if stack else "an unknown place"
        return where, stack

    def _end_process(self, blocked_s: float) -> None:
        """Log where the loop is blocked, and exit with EXIT_CODE."""
        where, stack = self._find_frame()
        text = (
            f"the event loop has been blocked for {blocked_s:.0f} s, longer than any running handler's timeout, "
            f"at {where}: this process ends with exit code {EXIT_CODE}\n{''.join(traceback.format_list(stack))}"
        )
        logging_thread = threading.Thread(target=log.critical, args=("%s", text), daemon=True)
        logging_thread.start()
        logging_thread.join(LOG_S)
        os._exit(EXIT_CODE)
