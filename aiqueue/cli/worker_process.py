"""One process of ``work``: its connection, its session, its signals, and its end within a bounded time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..agent import Agent, AgentGroup
from ..client import Client
from ..errors import AIQueueError
from ..job import ANY_KIND
from ..units import short_duration
from ..worker import Worker
from . import output
from .hangup import has_terminal
from .health import HealthReporter
from .options import FAILED, ServerOptions, print_error
from .pool_member import PoolMember

log = logging.getLogger(__name__)

END_S = 8.0  # after the drain timeout, for what follows: lifespan and connection; below the pool's SLACK_S
CANCEL_S = 1.0  # what follows that may take after it was cancelled
_ENDING = (signal.SIGINT, signal.SIGTERM)


class WorkerFailed(AIQueueError):
    """The user's code, such as a lifespan, kept the worker from starting or from ending. The text is one line."""


class WorkerProcess:
    """Runs a Worker or Agents until a signal. `member`: this is a process of a worker pool.

    The first signal has the worker drain. Before the worker has started, the signal ends it at once. A second signal
    kills the process, except in a pool. `_overdue`: the end was cancelled because it took too long.
    """

    def __init__(
        self,
        worker: Worker | Agent | AgentGroup,
        options: ServerOptions,
        member: PoolMember | None,
        health_file: Path | None,
    ) -> None:
        self._worker = worker
        self._client = options.client()
        self._member = member
        self._reporter = HealthReporter(health_file, partial(_report_starting, worker), notify=member is None)
        self._stop = asyncio.Event()
        self._running: asyncio.Task[Any] | None = None
        self._serving: asyncio.Task[bool] | None = None
        self._timer: threading.Timer | None = None
        self._ending = threading.Lock()  # held by who says how the process ends: its end, or the timer
        self._has_started = self._signalled = self._overdue = False
        self._loop: asyncio.AbstractEventLoop
        self._had_terminal = has_terminal()
        self._reloads: set[asyncio.Task[None]] = set()
        role = "worker " if isinstance(worker, Worker) else "agent " if isinstance(worker, Agent) else ""
        self._name = f"{role}{worker.name}"

    async def run(self) -> bool:
        """Run until a signal. Return whether all running jobs have ended in time.

        Raises WorkerFailed for errors of the user's code, and what connecting raises.
        """
        self._reporter.start()
        self._running, self._loop = asyncio.current_task(), asyncio.get_running_loop()
        self._serving = self._loop.create_task(self._serve())
        # not the loop's own handlers: those run when the user's code does not block the loop
        former = {number: signal.signal(number, self._on_signal) for number in _ENDING}
        if getattr(self._worker, "reload", None) is not None:
            self._loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        if self._member is not None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # blocked by the pool's parent
        try:
            await asyncio.wait([self._serving])
            if not self._serving.cancelled():
                if isinstance(end := self._serving.exception(), SystemExit):  # in the lifespan
                    raise WorkerFailed(f"{output.describe_error(end)} has ended {self._name}")
                return self._serving.result()
        finally:
            await self._client.close()
            await self._reporter.stop()
            if self._timer is not None:
                self._timer.cancel()
                if not self._ending.acquire(blocking=False):
                    self._timer.join()  # it ends the process
            for number, handler in former.items():
                signal.signal(number, handler)
        if self._overdue:
            raise WorkerFailed(_explain_overdue())
        output.print_notice(f"{self._name}: stopped before it had started")
        return True

    async def end(self) -> None:
        """End as after a signal, once the loop was stopped while `run` was under way. What `run` raises is dropped."""
        if not self._stop.is_set():
            self._begin_stop()
        if self._running is not None:
            await asyncio.wait([self._running])
            self._running.exception()

    async def _serve(self) -> bool:
        started_at, session = time.monotonic(), None
        await self._client.open()
        try:
            async with self._worker.running(self._client) as session:
                self._reporter.get_report = session.vitals
                output.print_notice(_describe_start(self._worker, self._client))
                self._has_started = True
                if self._member is not None:
                    self._member.report_working(self._worker.drain_timeout_s)
                await self._stop.wait()
                if session.running:
                    left = output.format_count(session.running, "running job")
                    timeout = short_duration(self._worker.drain_timeout_s)
                    output.print_line(
                        f"{self._name}: draining {left} for up to {timeout}; a second signal kills it", err=True
                    )
        except (AIQueueError, output.OutputFailed):
            raise
        except Exception as error:  # the user's lifespan may raise anything
            log.debug("the error's traceback:", exc_info=error)
            step = "start" if session is None else "end"
            raise WorkerFailed(f"{self._name} did not {step}: {output.describe_error(error)}") from error
        took = short_duration(time.monotonic() - started_at)
        ending = "all jobs finished" if session.clean else "some jobs did not finish in time and go to other workers"
        done = output.format_count(session.done, "delivery", "deliveries")
        output.print_notice(f"{self._name}: {done} in {took}; {ending}")
        return session.clean

    def _on_signal(self, number: int, _frame: object = None) -> None:
        """Runs in the main thread amid whatever that does, also while a handler blocks the event loop."""
        if not self._signalled:
            self._signalled = True
            if self._member is None:  # until the loop goes on, the next signal kills the process without Python's help
                for each in _ENDING:
                    signal.signal(each, signal.SIG_DFL)
            self._loop.call_soon_threadsafe(self._begin_stop)
        elif self._member is None:
            with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: amid another write to it
                sys.stderr.flush()
            os._exit(128 + number)

    def _begin_stop(self) -> None:
        if self._stop.is_set():
            return
        self._signalled = True
        for number in _ENDING:
            signal.signal(number, self._on_signal)
        self._stop.set()
        assert self._serving is not None
        if not self._has_started:
            self._serving.cancel()
        bound_s = END_S + (self._worker.drain_timeout_s if self._has_started else 0.0)
        asyncio.get_running_loop().call_later(bound_s, self._cancel_end)
        # a thread, because the user's code may block the event loop
        self._timer = threading.Timer(bound_s + CANCEL_S, self._exit_overdue)
        self._timer.daemon = True
        self._timer.start()

    def _on_hangup(self) -> None:
        """Have the worker read its files again: it has a method `reload`. If the terminal is gone, stop instead."""
        if self._had_terminal and not has_terminal():
            self._begin_stop()
        elif self._has_started:
            task = asyncio.get_running_loop().create_task(self._worker.reload(self._client))  # type: ignore[union-attr]
            self._reloads.add(task)
            task.add_done_callback(self._reloads.discard)

    def _exit_overdue(self) -> None:
        """End the process, whose event loop is blocked or whose cancellation was swallowed. Runs in the timer."""
        if not self._ending.acquire(blocking=False):
            return
        with contextlib.suppress(OSError):
            print_error(_explain_overdue())
            sys.stderr.flush()
        os._exit(FAILED)

    def _cancel_end(self) -> None:
        assert self._serving is not None
        self._overdue = True
        self._serving.cancel()


def run_process(process: WorkerProcess, loop_factory: Callable[[], Any] | None) -> bool:
    """Run until a signal. Return whether all running jobs have ended in time. Raises as `WorkerProcess.run`."""
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        try:
            return runner.run(process.run())
        except SystemExit as end:  # of a task that the user's code has started: asyncio lets it stop the loop
            runner.run(process.end())
            cause = output.describe_error(end)
            raise WorkerFailed(f"the worker has ended because a task of a handler raised {cause}") from None


def _explain_overdue() -> str:
    return f"the worker did not end within {END_S:g} s of its drain: does its lifespan hang?"


def _report_starting(worker: Worker | Agent | AgentGroup) -> dict[str, Any]:
    return {"state": "starting", "time": time.time(), "pid": os.getpid(), "worker": worker.name}


def _describe_start(worker: Worker | Agent | AgentGroup, client: Client) -> str:
    if isinstance(worker, AgentGroup):
        names = output.truncate(", ".join(f"{each.name} of {each.tenant}" for each in worker.agents), 200)
        return f"{worker.name}: {names}, at {client.connection.server}"
    if isinstance(worker, Agent):
        at_once = output.format_count(worker.concurrency, "conversation")
        kinds = ", ".join(sorted(worker.kinds)).replace(ANY_KIND, "every kind") or "nothing"
        return f"agent {worker.name} of {worker.tenant}: {at_once} at once, {kinds}, at {client.connection.server}"
    families = worker.families or sorted({handler.key[0] for handler in worker.handlers})
    tenants = ", ".join(worker.tenants) if worker.tenants else "all tenants"
    slots = output.format_count(worker.slots, "slot")
    return f"worker {worker.name}: {slots}, {', '.join(families)} of {tenants}, at {client.connection.server}"
