"""Processes of a comparison: started, ended with all that they have started, and what they cost, by Linux's /proc."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from aiqueue.server import supervisor

POLL_S = 0.02
GONE_S = 5.0  # what killed processes get to disappear
TAIL = 4_096  # bytes of a log in which its last words are looked for
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_MIB = 2**20


class Failed(Exception):
    """Something of a peer did not work; the text says what, in one line."""


@dataclass(frozen=True)
class Stat:
    """One line of /proc/PID/stat. `cpu_s` has the children that were waited for in it."""

    pid: int
    parent: int
    session: int
    begun: int
    cpu_s: float
    rss_mib: float

    @classmethod
    def read(cls, pid: int) -> Stat | None:
        """None for a process that is not there, or only waits to be waited for."""
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        state, *rest = text.rpartition(")")[2].split()  # a program's name may have spaces and brackets
        if state in "ZX":
            return None
        fields = [int(each) for each in rest]
        return cls(pid, fields[0], fields[2], fields[18], sum(fields[10:14]) / _TICKS, fields[20] * _PAGE / _MIB)


def everyone() -> dict[int, Stat]:
    pids = (int(each) for each in os.listdir("/proc") if each.isdecimal())  # noqa: PTH208 - thrice as fast as Path
    return {pid: stat for pid in pids if (stat := Stat.read(pid)) is not None}


def tree(*roots: int) -> list[Stat]:
    """These processes and all below them."""
    stats = everyone()
    children: dict[int, list[int]] = {}
    for stat in stats.values():
        children.setdefault(stat.parent, []).append(stat.pid)
    found, waiting = [], list(roots)
    while waiting:
        pid = waiting.pop()
        if pid in stats:
            found.append(stats[pid])
        waiting += children.get(pid, [])
    return found


def cpu_s(*roots: int) -> float:
    """CPU seconds, user and system, of whole trees so far."""
    return sum(stat.cpu_s for stat in tree(*roots))


def rss_mib(*roots: int) -> float:
    """Resident memory of whole trees; what processes share counts in each."""
    return sum(stat.rss_mib for stat in tree(*roots))


class Others:
    """How many cores were used by programs that are not ours, since it was made."""

    def __init__(self) -> None:
        self._begun, self._foreign = time.monotonic(), self._foreign_s()

    def cores(self) -> float:
        return max(0.0, (self._foreign_s() - self._foreign) / max(time.monotonic() - self._begun, 0.001))

    @staticmethod
    def _foreign_s() -> float:
        with Path("/proc/stat").open() as file:
            user, nice, system, _, _, irq, soft, steal = (int(each) for each in file.readline().split()[1:9])
        return (user + nice + system + irq + soft + steal) / _TICKS - cpu_s(os.getpid())


class Child:
    """A program in a session of its own. It ends with this process; `end` ends what it has started, too."""

    def __init__(
        self, arguments: Sequence[str | Path], env: Mapping[str, str], log: Path, *, cwd: Path, user: str | None = None
    ) -> None:
        self.log = log
        try:
            with log.open("ab") as out:
                self._process = subprocess.Popen(
                    arguments,
                    cwd=cwd,
                    env={**os.environ, **env},
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                    user=user,
                    extra_groups=[] if user else None,
                    preexec_fn=supervisor.die_with(os.getpid()),  # noqa: PLW1509 - one system call
                )
        except OSError as error:
            raise Failed(f"{arguments[0]} does not start: {error.strerror}") from error
        self.pid = self._process.pid

    @property
    def code(self) -> int | None:
        """Its exit code, None while it lives."""
        return self._process.poll()

    def wait(self, within_s: float) -> None:
        """Raises Failed where it ends with another code than 0, or not in time."""
        try:
            code = self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise Failed(f"not done within {within_s:g} s") from None
        if code:
            raise Failed(f"ended with {code}: {last_words(self.log)}")

    def end(self, within_s: float = 5.0, *, by: signal.Signals = signal.SIGTERM) -> None:
        """This signal, and SIGKILL after so many seconds (0: at once) for all that is left of it. Safe twice."""
        family = {stat.pid: stat.begun for stat in tree(self.pid)}
        if within_s > 0 and self.code is None:
            self._process.send_signal(by)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(within_s)
        stats = everyone()
        left = [pid for pid, begun in family.items() if pid in stats and stats[pid].begun == begun]
        left += [stat.pid for stat in stats.values() if stat.session == self.pid]
        _kill(left)
        self._process.wait(GONE_S)


def _kill(pids: Iterable[int]) -> None:
    """Kill, and wait until none is there."""
    deadline = time.monotonic() + GONE_S
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        while Stat.read(pid) is not None and time.monotonic() < deadline:
            time.sleep(POLL_S)


def last_words(log: Path) -> str:
    """The last line of a log that says something."""
    try:
        text = log.read_bytes()[-TAIL:].decode(errors="replace")
    except OSError:
        return "it left no log"
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")[:200]
