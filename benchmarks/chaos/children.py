"""The processes of a run: workers and producers, started, killed, stopped and ended by their pids."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from aiqueue.server import supervisor

ROOT = Path(__file__).resolve().parent.parent.parent
END_S = 40.0
IMPORTS_S = 10.0  # of a life in which a process may not have begun to heed signals


class Child:
    """A Python program of this run. It ends with this process, on Linux whatever happens."""

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str], log: Path, prefix: Sequence[str] = ()) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [*prefix, sys.executable, *arguments],
                cwd=log.parent,
                env={**os.environ, **env, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                preexec_fn=supervisor.die_with(os.getpid()),  # noqa: PLW1509 - one system call
            )
        self.pid = self._process.pid
        self.stopped = False
        self._begun = time.monotonic()

    @property
    def young(self) -> bool:
        """Whether it may still be importing."""
        return time.monotonic() - self._begun < IMPORTS_S

    @property
    def code(self) -> int | None:
        """Its exit code, None while it lives."""
        return self._process.poll()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)
        self.stopped = True

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)
        self.stopped = False

    def end(self, within_s: float = END_S) -> int:
        """SIGTERM, and SIGKILL after so many seconds; its exit code."""
        if self.stopped:
            self.resume()
        self._process.terminate()
        try:
            return self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return -signal.SIGKILL


class Workers:
    """So many worker processes of one kind."""

    def __init__(
        self, arguments: Sequence[str], env: Mapping[str, str], log: Path, *, count: int, prefix: Sequence[str] = ()
    ) -> None:
        self._arguments = arguments
        self.env = dict(env)
        self._log = log
        self._count = count
        self._prefix = prefix
        self.alive: list[Child] = []
        self.surprises: list[str] = []  # those that ended though nobody killed them

    def start(self) -> None:
        """Start those that are missing."""
        for child in [each for each in self.alive if each.code is not None]:
            self.alive.remove(child)
            said = [line for line in self._log.read_text(errors="replace").splitlines() if "error" in line.lower()]
            self.surprises.append(f"worker {child.pid} ended by itself with {child.code}; errors: {said[-3:]}")
        while len(self.alive) < self._count:
            self.alive.append(Child(self._arguments, self.env, self._log, self._prefix))

    def kill(self, child: Child) -> None:
        child.kill()
        self.alive.remove(child)

    def kill_all(self) -> None:
        for child in list(self.alive):
            self.kill(child)

    def end(self) -> None:
        """Drain all; one that does not end with 0 is a surprise."""
        for child in self.alive:
            if child.stopped:
                child.resume()
        for child in self.alive:
            fine = (0, -signal.SIGTERM) if child.young else (0,)
            if (code := child.end()) not in fine:
                self.surprises.append(f"worker {child.pid} ended its drain with {code}")
        self.alive.clear()
