"""A worker in a process of its own, which may die at a named point."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import IO, Any, Self

from ..client import Client, check_client
from ..config import Settings
from ..errors import BadInput
from ..processes import find_reference, refer_to
from ..server import supervisor
from ..units import Duration, module_of_path, parse_duration
from ..worker import Worker, deaths
from .spawned import READY

START_S = 30.0
STOP_S = 5.0
OUTPUT_MAX = 100_000  # characters that `output` returns at most, the last ones


def spawn(client: Client, worker: Worker | str, *, die_at: deaths.DeathPoint | None = None) -> SpawnedWorker:
    """Return a worker that runs in a process of its own while an ``async with`` block does, on the client's server::

        async with testing.client(aiqueue_settings, ack_wait="1s") as client:
            handle = await client.enqueue(Pay(amount=3), tenant="acme")
            async with testing.spawn(client, worker, die_at="result_before_ack") as spawned:
                await spawned.died()
            await testing.drain(client, worker)  # the job is delivered again, and must not pay twice
            assert await handle.result() == 3

    - `worker`: a worker at the top level of a module, which the process imports; or its name, "app:worker".
    - `die_at`: where the process kills itself, as by kill -9, at the first job that comes there: ``before_handler``
      (the job is delivered), ``after_handler`` (its handler has ended, and nothing is written), ``result_before_ack``
      (its result or dead letter is stored, and it is not acknowledged). None: nowhere.

    A dead worker's job is delivered again when its lease is over: `ack_wait` of `aiqueue.testing.client` shortens that.
    Raises BadInput for wrong arguments, and for a worker, or a function `headers` of the client, that no module has.
    """
    check_client(client)
    if die_at is not None and die_at not in deaths.DEATH_POINTS:
        raise BadInput(f"die_at must be one of {', '.join(deaths.DEATH_POINTS)}, or None, not {die_at!r}")
    make_headers = "" if client.make_headers is None else refer_to(client.make_headers)
    if client.make_headers is not None and (not make_headers or make_headers.startswith("__main__:")):
        raise BadInput("testing.spawn: headers= of the client must be a function at the top level of a module")
    return SpawnedWorker(client.settings, _name_of(worker), die_at, make_headers)


class SpawnedWorker:
    """A worker in a process of its own, from the beginning of an ``async with`` block to its end. See `spawn`."""

    def __init__(
        self, settings: Settings, worker: str, die_at: deaths.DeathPoint | None, make_headers: str = ""
    ) -> None:
        """`make_headers`: the name of the function of ``connect(headers=...)``. "": none."""
        self.worker = worker
        self._given = {
            "settings": settings.to_plain(), "headers": make_headers, "worker": worker, "die_at": die_at,
        }  # fmt: skip
        self._die_at = die_at
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process. Raises BadInput if it was not started."""
        return self._started().pid

    @property
    def exit_code(self) -> int | None:
        """The process's exit code, negative for a signal; None while it runs."""
        return self._started().poll()

    @property
    def output(self) -> str:
        """What the process has written to stderr, and its handlers have printed; the last 100,000 characters."""
        if self._errors is None:
            return ""
        return os.pread(self._errors.fileno(), 4 * OUTPUT_MAX, 0).decode(errors="replace")[-OUTPUT_MAX:]

    async def __aenter__(self) -> Self:
        """Start the process, and wait until its worker runs, or has died. Raises AssertionError if it cannot."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed by __aexit__)
        self._process = subprocess.Popen(  # noqa: S603, ASYNC220  (it only forks)
            [sys.executable, "-u", "-c", _PROGRAM],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(each or os.getcwd() for each in sys.path)},  # noqa: PTH109
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            preexec_fn=supervisor.die_with(os.getpid()),  # noqa: PLW1509  (one system call)
        )  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(self._given).encode())
        self._process.stdin.close()
        try:
            line = await asyncio.wait_for(asyncio.to_thread(self._read_line), START_S)
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        if line.strip() != READY and not (self._die_at is not None and await self._wait(STOP_S) == -signal.SIGKILL):
            said = self.output.strip().splitlines()
            await self.__aexit__(None, None, None)
            raise AssertionError(f"the worker {self.worker} does not start: {said[-1] if said else 'it says nothing'}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill the process, if it runs still."""
        process, errors = self._started(), self._errors
        process.kill()
        await asyncio.to_thread(process.wait)
        assert process.stdout is not None
        process.stdout.close()
        if errors is not None:
            self._errors = None
            errors.close()

    async def died(self, *, within: Duration = "30s") -> None:
        """Wait until the process has died where `die_at` says. Raises AssertionError if it has not, or otherwise."""
        code = await self._wait(parse_duration("within", within))
        if code is None:
            raise AssertionError(f"the worker {self.worker} still runs: no job came to {self._die_at}")
        if code != -signal.SIGKILL:
            raise AssertionError(f"the worker {self.worker} ended with exit code {code}: {self.output.strip()[-500:]}")

    async def stop(self, *, within: Duration = "30s") -> None:
        """Have the worker end its jobs and stop, as by SIGTERM. Raises AssertionError if it does not in time."""
        self._started().terminate()
        if await self._wait(parse_duration("within", within)) is None:
            raise AssertionError(f"the worker {self.worker} does not stop: one of its handlers may still run")

    async def _wait(self, within_s: float) -> int | None:
        process = self._started()
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(process.wait, within_s)
        return process.poll()

    def _read_line(self) -> str:
        process = self._started()
        assert process.stdout is not None
        return process.stdout.readline().decode()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise BadInput("the worker is not started: use `async with testing.spawn(client, worker) as spawned:`")
        return self._process


_PROGRAM = "from aiqueue.testing.spawned import main; main()"


def _name_of(worker: Any) -> str:
    """Return the name under which another process finds a worker. Raises BadInput."""
    if isinstance(worker, str):
        module, colon, name = worker.partition(":")
        if not (module and colon and name):
            raise BadInput(f'worker must be a Worker, or its name, such as "app:worker", not {worker!r}')
        if found := module_of_path(module):
            raise BadInput(f'worker must be a Worker, or its name, such as "{found}:{name}", not {worker!r}, a file')
        return worker
    if not isinstance(worker, Worker):
        raise BadInput(f'testing.spawn needs a Worker or its name, such as "app:worker", not {type(worker).__name__}')
    if not (reference := find_reference(worker)):
        raise BadInput("testing.spawn: no module has this worker at its top level, where another process can import it")
    return reference
