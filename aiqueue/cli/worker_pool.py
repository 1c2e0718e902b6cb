"""``work --processes``: the parent of a worker pool, which keeps several worker processes running.

A process of the pool is an ordinary ``aiqueue work``. The parent runs no job and imports neither the user's code nor
the client: it starts processes, watches them, stops them and counts restarts. A socket pair connects the two. On it
the process reports once that it works. When the parent is gone, the socket is closed, which ends the process where no
kernel does.

The processes stay in the parent's process group, so a signal may reach them twice: Ctrl-C in a terminal goes to the
whole group, systemd's stop to the whole unit, and the parent passes on its own. So a process drains at the first
signal and ignores further ones. The parent, which gets each signal once, kills at the second one
(docs/decisions/worker-pool.md).
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import AIQueueError, BadInput
from ..units import Backoff, short_duration
from . import output
from .hangup import has_terminal
from .health import REPORT_EVERY_S, SystemdNotifier, merge_reports, read_report, write_report
from .options import FAILED, print_error

log = logging.getLogger(__name__)

RESTART = Backoff(first="200ms", factor=2, cap="30s", jitter=0.5)  # by the number of quick exits in a row
STEADY_S = 30.0  # a process that lives this long resets its slot's count of quick exits
SLACK_S = 10.0  # added to the drain timeout, for what follows the drain: lifespan, connection, interpreter
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class PoolSlot:
    """One of the pool's numbered slots and its current process. Without a process, the next one starts at `due_at`.

    Times are of the monotonic clock.
    """

    number: int
    due_at: float = 0.0
    process: subprocess.Popen[bytes] | None = None
    line: socket.socket | None = None
    started_at: float = 0.0
    works: bool = False  # the current process has reported that it works
    has_worked: bool = False  # the current process or an earlier one has
    quick_exits: int = 0  # in a row, each before STEADY_S
    drain_timeout_s: float = 0.0

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0

    def start(self, program: Sequence[str], arguments: Sequence[str]) -> None:
        """Start a process of this command. Raises OSError if the system refuses another one."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = [*_python_command(), "-m", "aiqueue", *program, f"--pool-fd={theirs.fileno()}", *arguments]
            # Ctrl-C in the terminal is handled by the parent, which tells its processes. Until a process is ready for
            # SIGINT, and unblocks it, the signal would only cause a traceback.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                self.process = subprocess.Popen(  # noqa: S603 - this program itself
                    command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),)
                )
            except BaseException:
                ours.close()
                raise
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        ours.setblocking(False)
        self.line, self.started_at, self.works = ours, time.monotonic(), False

    def read_report(self) -> bool:
        """Read the socket. Return whether the process has reported just now that it works."""
        if self.line is None or self.works:
            return False
        try:
            received = self.line.recv(64)
        except OSError:  # nothing received yet, or the process was killed
            return False
        if not received:  # the process has closed the socket; `poll` tells when it has ended
            return False
        self.drain_timeout_s = float(received)
        self.works = self.has_worked = True
        return True

    def clear(self) -> None:
        """Forget the process, which has ended."""
        assert self.line is not None
        self.line.close()
        self.process = self.line = None


@dataclass(frozen=True)
class MemberExit:
    """The exit of a slot's process, or a failed start. `fate` is what happened, for messages."""

    slot: PoolSlot
    name: str
    fate: str
    code: int = FAILED  # negative: the number of a signal
    worked: bool = False
    lived_s: float = 0.0
    has_explained: bool = False  # the process itself has printed its error


class PoolKind(NamedTuple):
    """What the processes of a pool are. `work`: what they do, in the plural. `left`: what becomes of unfinished work,
    and `killed` of that of killed processes.
    """

    command: tuple[str, ...]
    name: str
    work: str
    left: str
    killed: str


WORKERS = PoolKind(
    ("work",), "worker pool", "jobs", "these go to other workers",
    "their jobs are redelivered to other workers when their leases expire",
)  # fmt: skip


class WorkerPool:
    """One run of `size` processes of a command with these arguments. Takes over the process's signals."""

    def __init__(
        self,
        arguments: Sequence[str],
        size: int,
        *,
        target: str,
        health: Path | None = None,
        kind: PoolKind = WORKERS,
    ) -> None:
        self._kind = kind
        self._arguments = list(arguments)
        self._health = health
        self._notifier = SystemdNotifier()
        self._report_at = 0.0
        self._target = target
        self._slots = [PoolSlot(number) for number in range(1, size + 1)]
        self._selector = selectors.DefaultSelector()
        self._wake = 0
        self._started_at = time.monotonic()
        self._restarts = 0
        self._is_up = False  # some process has worked
        self._is_signalled = False
        self._had_terminal = False
        self._stopping_since: float | None = None
        self._code = 0
        self._unclean_exits = 0  # processes that did not drain when told to stop

    def run(self) -> int:
        """Run until all processes have ended, and return the exit code.

        0: all processes drained. 1: some did not. 128 + signal: a second signal killed them. If the first process does
        not get to work: its exit code.
        """
        self._handle_signals()
        try:
            while not self._is_over():
                self._start_due_slots()
                self._write_health()
                self._wait()
                exits = self._reap()
                while self._process_signals():  # after `_reap`: a Ctrl-C that ended a process has arrived here by now
                    exits += self._reap()
                for each in exits:
                    self._handle_exit(each)
                self._kill_overdue()
        finally:
            self._kill(self._running_slots())
            if self._health is not None:
                for path in (self._health, *(self._health_path(slot) for slot in self._slots)):
                    path.unlink(missing_ok=True)
        if self._is_up:
            self._print_summary()
        return self._code or (FAILED if self._unclean_exits else 0)

    def _handle_signals(self) -> None:
        """Let SIGCHLD and requests to stop wake the loop. The handlers stay: later signals find the process ending."""
        self._wake, alarm = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(alarm, False)
        signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)
        for number in (*SIGNALS, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        self._had_terminal = has_terminal()
        self._selector.register(self._wake, selectors.EVENT_READ)

    def _running_slots(self) -> list[PoolSlot]:
        return [slot for slot in self._slots if slot.process is not None]

    def _is_over(self) -> bool:
        return self._stopping_since is not None and not self._running_slots()

    # -- starting

    def _start_due_slots(self) -> None:
        """Start the processes that are due.

        Until a process works, only slot 1 is started, so that an error in the module, the options or the server is
        printed once.
        """
        if self._stopping_since is not None:
            return
        for slot in self._slots if self._is_up else self._slots[:1]:
            if slot.process is None and slot.due_at <= time.monotonic():
                try:
                    health = [f"--health-file={self._health_path(slot)}"] if self._health else []
                    slot.start(self._kind.command, [*health, *self._arguments])
                except OSError as error:
                    self._handle_exit(MemberExit(slot, self._name(slot), f"cannot be started ({error.strerror})"))
                    return  # the other slots are started in the next round, if the pool still runs
                self._restarts += slot.has_worked
                assert slot.line is not None
                self._selector.register(slot.line, selectors.EVENT_READ, slot)

    def _name(self, slot: PoolSlot) -> str:
        return f"{slot.number} of {len(self._slots)}" + (f" (pid {slot.pid})" if slot.pid else "")

    # -- watching

    def _health_path(self, slot: PoolSlot) -> Path:
        """Return the health file of one process. The pool's own file merges them."""
        return Path(f"{self._health}.{slot.number}")

    def _write_health(self) -> None:
        """Write the pool's health report, once per second."""
        if time.monotonic() < self._report_at or (self._health is None and not self._notifier.is_wanted):
            return
        self._report_at = time.monotonic() + REPORT_EVERY_S
        reports = []
        for slot in self._slots if self._health is not None else []:
            try:
                reports.append(read_report(self._health_path(slot)))
            except AIQueueError:  # not written yet, or between two processes
                reports.append({"state": "starting", "pid": slot.pid})
        if self._health is None:  # under systemd without --health-file, the pool only knows whether it is up
            reports = [{"state": "ok" if self._is_up else "starting"}]
        report = merge_reports(reports, worker=f"pool {os.getpid()}")
        if self._stopping_since is not None:
            report["state"] = "draining"
        self._notifier.notify(report)
        if self._health is not None:
            try:
                write_report(self._health, report)
            except BadInput:
                if not self._is_up:
                    raise  # once the pool is up, a full disk, for example, must not end it: the file's age shows it

    def _wait(self) -> None:
        """Wait for a signal, an ended process, a report of a process, or the time of the next action."""
        if self._is_over():
            return
        if self._stopping_since is not None:
            times = [self._kill_at(slot) for slot in self._running_slots()]
        else:
            times = [slot.due_at for slot in self._slots if slot.process is None and (self._is_up or slot.number == 1)]
        if self._report_at:
            times.append(self._report_at)
        timeout_s = max(0.0, min(times) - time.monotonic()) if times else None
        for key, _ in self._selector.select(timeout_s):
            if key.data is not None:
                self._read_report(key.data)

    def _read_report(self, slot: PoolSlot) -> None:
        if slot.read_report() and not self._is_up:
            self._is_up = True
            size = self._format_size()
            name = f"{self._kind.name} {os.getpid()}"
            output.print_notice(f"{name}: {size} of {self._target}; Ctrl-C or SIGTERM drains them")
        with suppress(KeyError, ValueError):  # a process reports once, so nothing more will be received
            self._selector.unregister(slot.line)  # type: ignore[arg-type]

    def _reap(self) -> list[MemberExit]:
        """Free the slots of processes that have ended, and return their exits."""
        exits = []
        for slot in self._running_slots():
            assert slot.process is not None
            code = slot.process.poll()
            if code is not None:
                self._read_report(slot)  # it may have reported just before its end
                lived_s = time.monotonic() - slot.started_at
                fate = _describe_exit(code) + ("" if slot.has_worked else " before it was ready")
                exits.append(
                    MemberExit(slot, self._name(slot), fate, code, slot.works, lived_s, has_explained=code > 0)
                )
                slot.clear()
        return exits

    def _handle_exit(self, ended: MemberExit) -> None:
        """Handle the end of a process. 1. The pool is stopping: note whether the process drained. 2. No process of the
        slot has ever worked: stop the pool. 3. Otherwise: schedule a replacement.
        """
        slot = ended.slot
        if self._stopping_since is not None:
            if ended.worked and ended.code != 0:
                self._unclean_exits += 1
            return
        if not slot.has_worked and (ended.code > 0 or not self._is_up):
            self._code = ended.code if ended.code > 0 else FAILED
            if self._is_up or not ended.has_explained:
                print_error(f"process {ended.name} {ended.fate}; stopping the {self._kind.name}")
            self._stop()
            return
        slot.quick_exits = 1 if ended.lived_s >= STEADY_S else slot.quick_exits + 1
        delay_s = RESTART.delay_s(slot.quick_exits)
        slot.due_at = time.monotonic() + delay_s
        log.warning("process %s %s; restarting it in %s", ended.name, ended.fate, short_duration(delay_s))

    # -- stopping

    def _process_signals(self) -> bool:
        """Handle the received signals. Return whether SIGCHLD was among them: look for ended processes again."""
        try:
            numbers = os.read(self._wake, 4096)
        except BlockingIOError:
            return False
        if signal.SIGHUP in numbers:
            self._pass_on_hangup()
        for number in numbers:
            if number not in SIGNALS:
                continue
            if self._is_signalled:
                self._code = 128 + number
                self._kill(self._running_slots())
            else:
                self._is_signalled = True
                self._stop()
        return signal.SIGCHLD in numbers

    def _pass_on_hangup(self) -> None:
        """Tell every process to read its files again; one that does not heed that ends, and is replaced. If the signal
        comes because the terminal is gone, it ends the pool, and so all processes.
        """
        if self._had_terminal and not has_terminal():
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGHUP)
        for slot in self._running_slots():
            assert slot.process is not None
            slot.process.send_signal(signal.SIGHUP)

    def _stop(self) -> None:
        """Tell every process to drain. A process that does not work yet just ends."""
        if self._stopping_since is None:
            self._stopping_since = time.monotonic()
            for slot in self._running_slots():
                assert slot.process is not None
                slot.process.send_signal(signal.SIGTERM)

    def _kill_at(self, slot: PoolSlot) -> float:
        assert self._stopping_since is not None
        return self._stopping_since + slot.drain_timeout_s + SLACK_S

    def _kill_overdue(self) -> None:
        """Kill processes that have not ended within their drain timeout and SLACK_S."""
        if self._stopping_since is None:
            return
        overdue = [slot for slot in self._running_slots() if time.monotonic() >= self._kill_at(slot)]
        for slot in overdue:
            log.error("process %s did not end within its drain timeout; killing it", self._name(slot))
        self._unclean_exits += len(overdue)
        self._kill(overdue)

    def _kill(self, slots: Sequence[PoolSlot]) -> None:
        for slot in slots:
            assert slot.process is not None
            slot.process.kill()
        for slot in slots:
            assert slot.process is not None
            slot.process.wait()
            self._read_report(slot)
            slot.clear()

    # -- printing

    def _format_size(self) -> str:
        return output.format_count(len(self._slots), "process", "processes")

    def _print_summary(self) -> None:
        took = short_duration(time.monotonic() - self._started_at)
        if self._code > 128:
            ending = f"killed: {self._kind.killed}"
        elif self._unclean_exits:
            unclean = output.format_count(self._unclean_exits, "process", "processes")
            ending = f"{unclean} did not finish all {self._kind.work}; {self._kind.left}"
        else:
            ending = f"all {self._kind.work} finished"
        restarts = f", {output.format_count(self._restarts, 'restart')}" if self._restarts else ""
        output.print_notice(f"{self._kind.name} {os.getpid()}: {self._format_size()} in {took}{restarts}; {ending}")


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _python_command() -> list[str]:
    """Return the command of this interpreter. Processes search the working directory only if this one does.

    `python -m` always would, and a file queue.py of the user would then replace the standard library's module.
    """
    here = {"", str(Path.cwd())}
    return [sys.executable] if here & set(sys.path) else [sys.executable, "-P"]
