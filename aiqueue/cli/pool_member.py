"""One process of a worker pool, as it knows of the pool: a socket, by which it reports, and with whose end it ends."""

from __future__ import annotations

import os
import signal
import socket
import threading
from contextlib import suppress

from ..errors import BadInput


class PoolMember:
    """The process's side of the socket pair, from `join` until the process ends."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line

    def report_working(self, drain_timeout_s: float) -> None:
        """Tell the parent that this process takes jobs, and how long its drain may last."""
        with suppress(OSError):  # the parent is gone, and this process ends soon
            self._line.sendall(f"{drain_timeout_s}\n".encode())

    @staticmethod
    def unique_name(worker: str) -> str:
        """Return `worker` with the process id, because the module gives its worker the same name in each process."""
        pid = str(os.getpid())
        return worker if worker.endswith(pid) else f"{worker}-{pid}"


def join(fd: int) -> PoolMember:
    """Make this process part of the pool whose socket is open as `fd`. From here on it ends with its parent."""
    try:
        line = socket.socket(fileno=fd)
    except OSError:
        raise BadInput("--pool-fd is internal: a worker pool starts its processes with it; use --processes") from None
    from ..server import supervisor  # noqa: PLC0415  (the parent does not need it)

    os.set_inheritable(fd, False)
    if arrange := supervisor.die_with(os.getppid()):
        arrange()
    # Also on Linux: the kernel's way fails for a process that changes its user, and if the parent has already ended.
    threading.Thread(target=_kill_with_parent, args=(line,), name="aiqueue-pool", daemon=True).start()
    return PoolMember(line)


def _kill_with_parent(line: socket.socket) -> None:
    """Wait until the parent's end of the socket is closed, and kill this process."""
    with suppress(OSError):
        while line.recv(64):
            pass
    os.kill(os.getpid(), signal.SIGKILL)
