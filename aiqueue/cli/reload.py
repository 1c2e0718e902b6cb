"""``work --reload``: restarts the worker when a file of the working directory changes. For development."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import watchfiles

from ..client import acquire_here
from ..config import Settings
from . import output
from .worker_pool import PoolSlot

POLL_MS = 200  # how often it looks whether the worker has ended
SETTLE_MS = 50  # without a further change: an editor, or git, writes several files
ENDS_WITHIN_S = 12.0  # a worker whose drain timeout is over; then it is killed


class Reloader:
    """Runs one worker, which is a process of a pool of one: it ends with this process, whatever ends that."""

    def __init__(self, arguments: Sequence[str], settings: Settings, drain_timeout_s: float) -> None:
        """`arguments`: of ``aiqueue work``. Watched are ``*.py`` and ``*.toml`` below the working directory."""
        self._arguments = arguments
        self._settings = settings
        self._directory = Path.cwd()
        self._ends_within_s = drain_timeout_s + ENDS_WITHIN_S
        self._slot = PoolSlot(1)
        self._stop = threading.Event()

    def run(self) -> int:
        """Run until SIGINT or SIGTERM. Return the worker's exit code; 0 if there is none by then, or it only starts.

        An embedded server is kept running between two workers. Raises EmbeddedError, SettingsError.
        """
        logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it logs each change
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        held = None if self._settings.servers else acquire_here(self._settings, start=True)
        try:
            self._start()
            for changes in watchfiles.watch(
                self._directory, watch_filter=_SourceFilter(), step=SETTLE_MS, rust_timeout=POLL_MS,
                yield_on_timeout=True, stop_event=self._stop, raise_interrupt=False,
            ):  # fmt: skip
                self._note_end()
                if changes:
                    output.print_notice(f"reload: {self._name(path for _, path in changes)} changed")
                    self._end()
                    if not self._stop.is_set():
                        self._start()
        finally:
            code = self._end()
            if held is not None:
                held.release()
        return code if code >= 0 else 128 - code

    def _start(self) -> None:
        self._slot.start(("work",), self._arguments)

    def _note_end(self) -> None:
        if self._slot.process is not None and (code := self._slot.process.poll()) is not None:
            self._slot.clear()
            output.print_notice(f"reload: the worker has ended with exit code {code}; waiting for a change")

    def _end(self) -> int:
        """End the worker and return its exit code."""
        process = self._slot.process
        if process is None:
            return 0
        process.terminate()
        try:
            code = process.wait(self._ends_within_s)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        self._slot.clear()
        # Before it works, and after its drain, when Python has given the signals back, it ends by the signal itself.
        return 0 if code == -signal.SIGTERM else code

    def _on_signal(self, number: int, _frame: Any) -> None:
        if self._stop.is_set() and self._slot.process is not None:
            self._slot.process.kill()  # a second one
        self._stop.set()

    def _name(self, paths: Iterable[str]) -> str:
        names = sorted({os.path.relpath(path, self._directory) for path in paths})
        return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


class _SourceFilter(watchfiles.PythonFilter):
    """Files of Python and of aiqueue, without those of venvs, caches and the embedded server."""

    ignore_dirs = (*watchfiles.PythonFilter.ignore_dirs, ".aiqueue", "venv", "build", "dist")

    def __init__(self) -> None:
        super().__init__(extra_extensions=(".toml",))

    def __call__(self, change: watchfiles.Change, path: str) -> bool:
        return super().__call__(change, path) and not any(
            (parent / "pyvenv.cfg").exists() for parent in Path(path).parents
        )
