"""What a child process has started: found and killed, together with the child.

A child leads a session of its own, which what it starts belongs to. On Linux, `/proc` also shows the processes that
have left the session. Elsewhere only the child's process group is killed.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class _Process(NamedTuple):
    parent: int
    session: int
    started: int  # clock ticks since boot, as `clock_ticks`


def clock_ticks() -> int:
    """Return the time since boot in the clock ticks of `/proc`, 10 ms each as a rule. 0 where there are none."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return 0 if clock is None else int(time.clock_gettime(clock) * _TICKS_PER_S)


def find_started(leader: int) -> dict[int, int]:
    """Return the living processes that a session leader has started, and theirs: when each started, by pid."""
    return {pid: each.started for pid, each in _find_descendants(leader, {}).items()}


def kill_session(leader: int, known: Mapping[int, int] | None = None) -> None:
    """Send SIGKILL to the leader of a session and to all that it started. Safe if the leader has ended.

    All are stopped first, because a process that still runs could start another one unseen. A process that has left the
    session is missed if what started it has ended, unless it is in `known`, an earlier answer of `find_started`.
    """
    _signal_group(leader, signal.SIGSTOP)
    found: set[int] = set()
    while new := _find_descendants(leader, known or {}).keys() - found:
        for pid in new:
            _signal_process(pid, signal.SIGSTOP)
        found |= new
    _signal_group(leader, signal.SIGKILL)
    for pid in found:
        _signal_process(pid, signal.SIGKILL)


def _find_descendants(leader: int, known: Mapping[int, int]) -> dict[int, _Process]:
    """Return the living processes of the leader's session, those in `known`, and what these have started."""
    processes = _read_processes()
    processes.pop(leader, None)
    found = {pid: each for pid, each in processes.items() if known.get(pid) == each.started}
    roots = {leader, *found}
    while new := {
        pid: each
        for pid, each in processes.items()
        if pid not in found and (each.session in roots or each.parent in roots)
    }:
        found |= new
        roots |= new.keys()
    return found


def _read_processes() -> dict[int, _Process]:
    """Return all processes that `/proc` shows. Empty where there is no `/proc`."""
    processes = {}
    with suppress(OSError):
        for name in os.listdir(_PROC):  # noqa: PTH208  (there may be thousands)
            if name.isdecimal():
                with suppress(OSError):  # it has ended meanwhile
                    fields = _read_stat(name)
                    if fields[0] not in b"ZX":
                        processes[int(name)] = _Process(int(fields[1]), int(fields[3]), int(fields[19]))
    return processes


def _read_stat(pid: str) -> list[bytes]:
    """Return the fields of `/proc/PID/stat` after the command, which may hold spaces and parentheses."""
    with open(f"{_PROC}/{pid}/stat", "rb", buffering=0) as file:  # noqa: PTH123
        return file.read().rpartition(b")")[2].split()


def _signal_group(leader: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


def _signal_process(pid: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
