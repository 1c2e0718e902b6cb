"""``work --processes``: a parent that keeps several worker processes, its members, running.

A member is the ordinary ``aiqueue work`` in a process of its own. The parent runs no job and imports neither the
user's code nor the client: it starts, watches, tells to stop, and counts. Between the two lies a socket pair. On it
the member says once that it works; and its end tells the member, where no kernel does, that the parent is gone.

Members stay in the parent's process group, and a signal may reach them twice: Ctrl-C in a terminal goes to the whole
group, systemd's stop to the whole unit, and the parent passes on its own. So a member drains at the first signal and
takes no notice of more; only the parent, which gets each signal once, ends things at once (docs/decisions/crew.md).
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..backoff import Backoff
from ..errors import AIQueueError, BadInput
from ..units import short_duration
from . import output
from .health import BEAT_S, Notify, merged, read, write
from .options import FAILED, complain

log = logging.getLogger("aiqueue.crew")

RESTART = Backoff(first="200ms", factor=2, cap="30s", jitter=0.5)  # by how often in a row a slot's process has ended
STEADY_S = 30.0  # a process that lived this long begins a new row
SLACK_S = 10.0  # beyond the drain timeout, for what follows it: lifespan, connection, interpreter
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Member:
    """The child's side of the socket pair, from `join` to the process's end."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line

    def works(self, drain_timeout_s: float) -> None:
        """Tell the parent that jobs are being taken, and how long their drain may last."""
        with suppress(OSError):  # it is gone, and this process soon
            self._line.sendall(f"{drain_timeout_s}\n".encode())

    @staticmethod
    def own_name(worker: str) -> str:
        """A name that no other member has: one that the module gives its worker is the same in each."""
        pid = str(os.getpid())
        return worker if worker.endswith(pid) else f"{worker}-{pid}"


def join(fd: int) -> Member:
    """Make this process a member of the crew whose socket is open as `fd`: from here on it ends with its parent."""
    try:
        line = socket.socket(fileno=fd)
    except OSError:
        raise BadInput("--crew-fd is how a crew starts its members; give --processes instead") from None
    from ..server import supervisor  # noqa: PLC0415  (the parent can do without it)

    os.set_inheritable(fd, False)
    if arrange := supervisor.die_with(os.getppid()):
        arrange()
    # Also where the kernel does it: not for a process that changes its user, nor for a parent that ended before.
    threading.Thread(target=_end_with, args=(line,), name="aiqueue-crew", daemon=True).start()
    return Member(line)


def _end_with(line: socket.socket) -> None:
    with suppress(OSError):
        while line.recv(64):
            pass
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Slot:
    """A place in the crew and the process that fills it now; None: nobody, until `due`."""

    number: int
    due: float = 0.0
    process: subprocess.Popen[bytes] | None = None
    line: socket.socket | None = None
    begun: float = 0.0
    works: bool = False  # the present process
    worked: bool = False  # this one or one before it
    ended: int = 0  # how often in a row, without a steady life between
    drain_timeout_s: float = 0.0

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0

    def start(self, arguments: Sequence[str]) -> None:
        """Raises OSError when the system has no room for another process."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = [*_python(), "-m", "aiqueue", "work", f"--crew-fd={theirs.fileno()}", *arguments]
            # A Ctrl-C in the terminal is for the parent, which tells its members: until they are ready for it, which
            # unblocks it, it would only make a traceback.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                self.process = subprocess.Popen(  # noqa: S603 - this program again
                    command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),)
                )
            except BaseException:
                ours.close()
                raise
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        ours.setblocking(False)
        self.line, self.begun, self.works = ours, time.monotonic(), False

    def listen(self) -> bool:
        """Take note of what the process says. Whether it began to work just now."""
        if self.line is None or self.works:
            return False
        try:
            said = self.line.recv(64)
        except OSError:  # nothing yet, or its end was violent
            return False
        if not said:  # it has ended, which is not seen here; nothing more will come
            return False
        self.drain_timeout_s = float(said)
        self.works = self.worked = True
        return True

    def leave(self) -> None:
        """Forget the process, which has ended."""
        assert self.line is not None
        self.line.close()
        self.process = self.line = None


@dataclass(frozen=True)
class Ended:
    """The end of a slot's process, or that there could be none."""

    slot: Slot
    name: str
    fate: str
    code: int = FAILED  # negative: a signal
    worked: bool = False
    lived_s: float = 0.0
    told: bool = False  # the process itself has said what is wrong


class Crew:
    """One run of `size` processes of ``aiqueue work`` with these arguments. Takes over the process's signals."""

    def __init__(self, arguments: Sequence[str], size: int, *, what: str, health: Path | None = None) -> None:
        self._arguments = list(arguments)
        self._health = health
        self._notify = Notify()
        self._report_at = 0.0
        self._what = what
        self._slots = [Slot(number) for number in range(1, size + 1)]
        self._selector = selectors.DefaultSelector()
        self._wake = 0
        self._begun = time.monotonic()
        self._restarts = 0
        self._up = False  # some process has worked
        self._asked = False  # by a signal, once
        self._stopping: float | None = None  # since when
        self._code = 0
        self._given_up = 0  # processes that did not end well when told to

    def run(self) -> int:
        """The exit code, once all processes have ended: 0 when all drained, 1 when some could not, 128 + the signal
        when a second one ended them at once, and that of a process that could not begin to work.
        """
        self._handle_signals()
        try:
            while not self._over():
                self._start_due()
                self._report()
                self._sleep()
                ended = self._reap()
                while self._heed_signals():  # after: a ^C that ended a process has come here too by now
                    ended += self._reap()
                for each in ended:
                    self._judge(each)
                self._kill_late()
        finally:
            self._kill(self._alive())
            if self._health is not None:
                for path in (self._health, *(self._health_of(slot) for slot in self._slots)):
                    path.unlink(missing_ok=True)
        if self._up:
            self._say_end()
        return self._code or (FAILED if self._given_up else 0)

    def _handle_signals(self) -> None:
        """Have the end of a process, and requests to stop, wake the loop. For good: what comes later finds the
        process about to end by itself.
        """
        self._wake, alarm = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(alarm, False)
        signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)
        for number in (*SIGNALS, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        self._selector.register(self._wake, selectors.EVENT_READ)

    def _alive(self) -> list[Slot]:
        return [slot for slot in self._slots if slot.process is not None]

    def _over(self) -> bool:
        return self._stopping is not None and not self._alive()

    # -- starting

    def _start_due(self) -> None:
        """Start what is due. The first process goes ahead alone until it works: what is wrong with the module, the
        options or the server is then met, and said, once.
        """
        if self._stopping is not None:
            return
        for slot in self._slots if self._up else self._slots[:1]:
            if slot.process is None and slot.due <= time.monotonic():
                try:
                    told = [f"--health-file={self._health_of(slot)}"]
                    slot.start([*(told if self._health else []), *self._arguments])
                except OSError as error:
                    self._judge(Ended(slot, self._name(slot), f"cannot be started ({error.strerror})"))
                    return  # the others come next time, if they still are to
                self._restarts += slot.worked
                assert slot.line is not None
                self._selector.register(slot.line, selectors.EVENT_READ, slot)

    def _name(self, slot: Slot) -> str:
        return f"{slot.number} of {len(self._slots)}" + (f" (pid {slot.pid})" if slot.pid else "")

    # -- watching

    def _health_of(self, slot: Slot) -> Path:
        """Where a member says how it is. The crew's own file sums them up."""
        return Path(f"{self._health}.{slot.number}")

    def _report(self) -> None:
        """Say each second how the crew is: one answer for all."""
        if time.monotonic() < self._report_at or (self._health is None and not self._notify.wanted):
            return
        self._report_at = time.monotonic() + BEAT_S
        members = []
        for slot in self._slots if self._health is not None else []:
            try:
                members.append(read(self._health_of(slot)))
            except AIQueueError:  # not there yet, or between two processes
                members.append({"state": "starting", "pid": slot.pid})
        if self._health is None:  # a systemd unit without a file: alive is what can be said
            members = [{"state": "ok" if self._up else "starting"}]
        told = merged(members, worker=f"crew {os.getpid()}")
        if self._stopping is not None:
            told["state"] = "draining"
        self._notify.tell(told)
        if self._health is not None:
            try:
                write(self._health, told)
            except BadInput:
                if not self._up:
                    raise  # later it is a full disk, say: the file's age tells

    def _sleep(self) -> None:
        """Wait for a signal, an ended process, a word of one, or the next thing to do."""
        if self._over():
            return
        if self._stopping is not None:
            times = [self._killed_at(slot) for slot in self._alive()]
        else:
            times = [slot.due for slot in self._slots if slot.process is None and (self._up or slot.number == 1)]
        if self._report_at:
            times.append(self._report_at)
        timeout_s = max(0.0, min(times) - time.monotonic()) if times else None
        for key, _ in self._selector.select(timeout_s):
            if key.data is not None:
                self._listen(key.data)

    def _listen(self, slot: Slot) -> None:
        if slot.listen() and not self._up:
            self._up = True
            output.say(f"crew {os.getpid()}: {self._count()} of {self._what}; Ctrl-C or SIGTERM drains them")
        with suppress(KeyError, ValueError):  # the one word was said, or nothing more can be
            self._selector.unregister(slot.line)  # type: ignore[arg-type]

    def _reap(self) -> list[Ended]:
        """Free the slots of processes that have ended."""
        ended = []
        for slot in self._alive():
            assert slot.process is not None
            code = slot.process.poll()
            if code is not None:
                self._listen(slot)  # its word may have come just before
                lived_s = time.monotonic() - slot.begun
                fate = _fate(code) + ("" if slot.worked else " before it worked")
                ended.append(Ended(slot, self._name(slot), fate, code, slot.works, lived_s, told=code > 0))
                slot.leave()
        return ended

    def _judge(self, ended: Ended) -> None:
        """What the end of a process means: it was asked to, the crew cannot begin, or another takes its place."""
        slot = ended.slot
        if self._stopping is not None:
            if ended.worked and ended.code != 0:
                self._given_up += 1
            return
        if not slot.worked and (ended.code > 0 or not self._up):
            self._code = ended.code if ended.code > 0 else FAILED
            if self._up or not ended.told:
                complain(f"process {ended.name} {ended.fate}; the crew ends")
            self._stop()
            return
        slot.ended = 1 if ended.lived_s >= STEADY_S else slot.ended + 1
        delay_s = RESTART.delay_s(slot.ended)
        slot.due = time.monotonic() + delay_s
        log.warning("process %s %s; another in %s", ended.name, ended.fate, short_duration(delay_s))

    # -- stopping

    def _heed_signals(self) -> bool:
        """Do what signals ask for. Whether a process may have ended meanwhile, which no other signal will tell."""
        try:
            numbers = os.read(self._wake, 4096)
        except BlockingIOError:
            return False
        for number in numbers:
            if number not in SIGNALS:
                continue
            if self._asked:
                self._code = 128 + number
                self._kill(self._alive())
            else:
                self._asked = True
                self._stop()
        return signal.SIGCHLD in numbers

    def _stop(self) -> None:
        """Have every process drain; one that does not work yet just ends."""
        if self._stopping is None:
            self._stopping = time.monotonic()
            for slot in self._alive():
                assert slot.process is not None
                slot.process.send_signal(signal.SIGTERM)

    def _killed_at(self, slot: Slot) -> float:
        assert self._stopping is not None
        return self._stopping + slot.drain_timeout_s + SLACK_S

    def _kill_late(self) -> None:
        if self._stopping is None:
            return
        late = [slot for slot in self._alive() if time.monotonic() >= self._killed_at(slot)]
        for slot in late:
            log.error("process %s did not end in time and is killed", self._name(slot))
        self._given_up += len(late)
        self._kill(late)

    def _kill(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            assert slot.process is not None
            slot.process.kill()
        for slot in slots:
            assert slot.process is not None
            slot.process.wait()
            self._listen(slot)
            slot.leave()

    # -- saying

    def _count(self) -> str:
        return output.count(len(self._slots), "process", "processes")

    def _say_end(self) -> None:
        took = short_duration(time.monotonic() - self._begun)
        if self._code > 128:
            ending = "ended at once: their jobs go to other workers when their leases run out"
        elif self._given_up:
            ending = f"{self._given_up} left jobs, which go to other workers"
        else:
            ending = "all finished"
        restarts = f", {output.count(self._restarts, 'restart')}" if self._restarts else ""
        output.say(f"crew {os.getpid()}: {self._count()} in {took}{restarts}, {ending}")


def _fate(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _python() -> list[str]:
    """This interpreter, which searches the working directory only if this one does: `python -m` would, and a file of
    the user's called queue.py would take the place of the standard library's.
    """
    here = {"", str(Path.cwd())}
    return [sys.executable] if here & set(sys.path) else [sys.executable, "-P"]
