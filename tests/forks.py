"""Programs in processes that are forked from one which has loaded aiqueue: its imports are most of a short program.

For tests of what programs do to each other and to the server. A test of a start, of a command line as others see it,
or of Python's own options runs `sys.executable` instead.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn, Self, TextIO

ROOT = Path(__file__).resolve().parent.parent
COMMAND_LINE = ("aiqueue.cli.app", "aiqueue.cli.work", "aiqueue.cli.worker_process", "uvloop")
_NUMBER = struct.Struct("=q")


class Program:
    """A program that was started, with what tests need of `subprocess.Popen`. What it says is text."""

    def __init__(self, args: Sequence[str], status: int, stdout: TextIO | None, stderr: TextIO | None) -> None:
        self.args = list(args)
        self.stdout = stdout
        self.stderr = stderr
        self.returncode: int | None = None
        self._status = os.fdopen(status, "rb", buffering=0)
        pid = self._status.read(_NUMBER.size)
        assert pid, "the server of forks has ended: its error is in the output of pytest"
        self.pid = int(_NUMBER.unpack(pid)[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        self._close()

    def poll(self) -> int | None:
        return self._end(0)

    def wait(self, timeout: float | None = None) -> int:
        """Return its exit code, negative for a signal. Raises subprocess.TimeoutExpired."""
        code = self._end(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return code

    def communicate(self, timeout: float = 60.0) -> tuple[str, str]:
        """Wait for its end. Return what it said and nobody has read. Raises subprocess.TimeoutExpired."""
        end, said = (
            time.monotonic() + timeout,
            {file: b"" for file in (self.stdout, self.stderr) if file and not file.closed},
        )
        left = set(said)
        while left:
            ready = select.select(list(left), [], [], max(end - time.monotonic(), 0))[0]
            if not ready:
                raise subprocess.TimeoutExpired(self.args, timeout)
            for file in ready:
                piece = os.read(file.fileno(), 65_536)
                said[file] += piece
                if not piece:
                    left.remove(file)
        self.wait(max(end - time.monotonic(), 0))
        self._close()
        out, err = (said[file].decode() if file in said else "" for file in (self.stdout, self.stderr))
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _end(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            code = self._status.read(_NUMBER.size)
            self._status.close()
            self.returncode = _NUMBER.unpack(code)[0] if code else -signal.SIGKILL  # killed with the server of forks
        return self.returncode

    def _close(self) -> None:
        for file in (self.stdout, self.stderr):
            if file is not None:
                file.close()


def start(
    program: str, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None, stdout: int | IO[Any] = 1,
    stderr: int | IO[Any] = 2, start_new_session: bool = False, terminal: int | None = None,
    imports: Sequence[str] = (),
) -> Program:  # fmt: skip
    """Run ``python -m program arguments``, or a file that ends in .py. `env`: os.environ if none is given.

    `terminal`: a terminal that is its stdin, and the one whose keys send it signals, in a session of its own.
    `imports`: modules to load beforehand. Programs with the same ones share them, and no others.
    """
    request = {
        "program": program, "arguments": arguments, "cwd": str(cwd), "env": dict(os.environ if env is None else env),
        "session": start_new_session or terminal is not None, "terminal": terminal is not None,
    }  # fmt: skip
    body, channel = json.dumps(request).encode(), _server(*imports)
    status, write = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, write)
        files, ours = [os.open(os.devnull, os.O_RDONLY) if terminal is None else os.dup(terminal)], []
        stack.callback(os.close, files[0])
        for each in (stdout, stderr):
            if each == subprocess.PIPE:
                read, theirs = os.pipe()
                stack.callback(os.close, theirs)
                ours.append(os.fdopen(read, encoding="utf-8"))
            else:
                theirs = each if isinstance(each, int) else each.fileno()
                ours.append(None)
            files.append(theirs)
        socket.send_fds(channel, [_NUMBER.pack(len(body))], [*files, write])
        channel.sendall(body)
    return Program([program, *arguments], status, *ours)


def build_command_lines_once() -> None:
    """Keep what typer makes of an app: it builds all commands anew, with 80 ms of CPU, each time that one is called."""
    import typer.main  # noqa: PLC0415
    import typer.testing  # noqa: PLC0415

    built = functools.lru_cache(typer.main.get_command)
    typer.main.get_command = typer.testing._get_command = built  # type: ignore[attr-defined]


@functools.cache
def _server(*imports: str) -> socket.socket:
    """Start a process that forks. It ends with this one, and kills the programs that still run."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks", str(theirs.fileno()), *imports],
            cwd=ROOT, env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            pass_fds=[theirs.fileno()], start_new_session=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    atexit.register(process.wait)
    atexit.register(ours.close)  # the first to be called
    return ours


def _serve(channel: socket.socket) -> dict[str, Any]:
    """Fork for each request. Returns in the forked processes only, with the request."""
    running: dict[int, int] = {}  # the pipes that take the exit codes

    def reap(*_: object) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                pipe = running.pop(ended[0])
                with contextlib.suppress(BrokenPipeError):  # nobody waits for it
                    os.write(pipe, _NUMBER.pack(os.waitstatus_to_exitcode(ended[1])))
                os.close(pipe)

    signal.signal(signal.SIGCHLD, reap)
    while True:
        head, files, *_ = socket.recv_fds(channel, _NUMBER.size, 4)
        if not head:
            _end_all(running)
        (size,), body = _NUMBER.unpack(head), b""
        while len(body) < size:  # a program that ends may interrupt it
            body += channel.recv(size - len(body))
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
            for target, file in enumerate(files[:3]):
                os.dup2(file, target)
            for file in (*files, *running.values()):
                os.close(file)
            channel.close()
            return dict(json.loads(body))
        running[pid] = files[3]
        os.write(files[3], _NUMBER.pack(pid))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        for file in files[:3]:
            os.close(file)


def _end_all(running: Mapping[int, int]) -> NoReturn:
    for pid in list(running):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    sys.exit()


def _run(request: Mapping[str, Any]) -> None:
    """Be what a new process with this request would be."""
    if request["session"]:
        os.setsid()
    if request["terminal"]:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for number, (name, mode) in enumerate([("stdin", "r"), ("stdout", "w"), ("stderr", "w")]):
        old, lines = getattr(sys, name), name == "stderr" or os.isatty(number)
        new = open(number, mode, 1 if lines else -1, old.encoding, old.errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    added = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:1] = [request["cwd"], *added]
    sys.argv = [request["program"], *request["arguments"]]
    run: Any = (
        runpy.run_path if request["program"].endswith(".py") else functools.partial(runpy.run_module, alter_sys=True)
    )
    run(request["program"], run_name="__main__")


if __name__ == "__main__":
    import typer.main

    import aiqueue

    for _name in aiqueue.__all__:
        getattr(aiqueue, _name)
    for _name in (*COMMAND_LINE, *sys.argv[2:]):
        importlib.import_module(_name)
    build_command_lines_once()
    typer.main.get_command(importlib.import_module("aiqueue.cli.app").app)
    gc.freeze()  # a collection in a forked process would copy all that it looks at
    _run(_serve(socket.socket(fileno=int(sys.argv[1]))))
