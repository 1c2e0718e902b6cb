"""What a user declares: handlers, and how many of them run at once. One run of a worker is a `Session`."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Generic, NamedTuple, TypeAlias, Unpack, overload

from typing_extensions import TypeVar

from ..attempt import Around, Handler, Handlers, Policies, check_cost_function, is_async_handler, parse_around
from ..client import Client, check_client
from ..errors import BadInput
from ..job import ANY_KIND, Job, M, M_co, Message, RawMessage, Reject, Retry, check_model
from ..schedules import When
from ..subjects import FAMILY, token
from ..units import Backoff, Duration, flag, parse_duration, text, texts, whole_number
from .lifespan import Lifespan, lifespan_of_children, takes_client
from .limiting import warn_of_no_field
from .scheduling import DeclaredSchedules, DeclareOptions
from .session import Session, WorkerOptions

R = TypeVar("R")
U = TypeVar("U", bound="Message[_Undeclared]")
S = TypeVar("S", default=Any)  # what the lifespan yields
F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=AbstractContextManager[Any] | AbstractAsyncContextManager[Any])
_Lifespan: TypeAlias = AbstractAsyncContextManager[S]
CONCURRENCY_MAX = 10_000
PROCESSES_MAX = 1_000
_UNNAMED = itertools.count(1)  # workers of this process without a name of their own


class _Undeclared:
    """The type of no result: only a message that declares no type of its result fits ``Message[_Undeclared]``."""


class _AnyResultDecorator(Generic[M_co, S]):
    """What `Worker.handle` returns for a message that declares no result: takes only functions of the right job.

    It is no overload of `_HandlerDecorator`: a job whose state is Any would fit each of them, for mypy.
    """

    def __init__(self, add: Callable[[Callable[[Job[M_co, S]], Any]], None]) -> None:
        self._add = add

    def __call__(self, function: Callable[[Job[M_co, S]], R]) -> Callable[[Job[M_co, S]], R]:
        self._add(function)
        return function


class _HandlerDecorator(_AnyResultDecorator[M_co, S]):
    """As `_AnyResultDecorator`, for a message that declares its result, which the function must return."""

    @overload
    def __call__(
        self: _HandlerDecorator[Message[R], S], function: Callable[[Job[M_co, S]], Coroutine[Any, Any, R]]
    ) -> Callable[[Job[M_co, S]], Coroutine[Any, Any, R]]: ...
    @overload
    def __call__(
        self: _HandlerDecorator[Message[R], S], function: Callable[[Job[M_co, S]], R]
    ) -> Callable[[Job[M_co, S]], R]: ...
    def __call__(self, function: Callable[[Job[M_co, S]], Any]) -> Callable[[Job[M_co, S]], Any]:
        return super().__call__(function)


class Worker(Generic[S]):
    """Handlers and how many of them run at once.

    `families`: the families whose jobs to take. None: those of the registered messages. `tenants`: the tenants whose
    jobs to take. None: all. `concurrency` (1 to 10,000, default 100): the number of slots. `processes` (1 to 1,000,
    default: the number of CPUs, at most `concurrency`): how many child processes run the handlers registered with
    ``process=True``. `lifespan`: an async context manager function, entered before the first job and left after the
    last one. What it yields is ``job.state``. If it needs an argument, it gets the worker's client. Each child process
    enters it too, then with a client of its own. `drain_timeout` (default "30s"): how
    long running jobs may take to end when the worker stops. `name`: each worker needs its own; the default is host name
    and pid, and a number from the second worker of a process on. `suspect_after` (1 to 1,000, default 2): a job that
    has been delivered so often without an outcome is tried in a child process, one at a time, because it may be what
    kills the workers. More is for handlers whose jobs take long, and cannot end their process. `owner`: the name of the
    service whose schedules this worker declares, see `schedule`. Where workers of several versions declare one, the
    version decides that was seen first at the latest time. `generation` (0 to 2**53, default: the setting
    `generation`, 0 if it is not set): the version with the greater one decides, whatever was seen first.
    """

    child_lifespan: Lifespan | None = None  # of a subclass: entered by child processes in place of `lifespan`
    optional_families: Collection[str] = ()  # of a subclass: their handlers count only where the family is declared

    def __init__(
        self,
        *,
        families: Collection[str] | None = None,
        tenants: Collection[str] | None = None,
        concurrency: int = 100,
        processes: int | None = None,
        lifespan: Callable[[], _Lifespan[S]] | Callable[[Client], _Lifespan[S]] | None = None,
        drain_timeout: Duration = "30s",
        name: str | None = None,
        suspect_after: int | None = None,
        owner: str | None = None,
        generation: int | None = None,
    ) -> None:
        self._lifespan_takes_client = lifespan is not None and takes_client(lifespan)
        self.families = None if families is None else texts("families", families)
        self.tenants = None if tenants is None else tuple(token("tenant", each) for each in texts("tenants", tenants))
        self.concurrency = whole_number("concurrency", concurrency, 1, CONCURRENCY_MAX)
        self.processes = None if processes is None else whole_number("processes", processes, 1, PROCESSES_MAX)
        self.lifespan: Callable[..., AbstractAsyncContextManager[S]] | None = lifespan
        self.drain_timeout_s = parse_duration("drain_timeout", drain_timeout)
        self.name = text("name", name) if name else _default_name()
        self.suspect_after = None if suspect_after is None else whole_number("suspect_after", suspect_after, 1, 1_000)
        self._handlers = Handlers()
        self.arounds: tuple[Around, ...] = ()
        self._schedules = DeclaredSchedules(owner, generation)

    @property
    def slots(self) -> int:
        """How many jobs run at once: `concurrency`, or `process_count` if all handlers need a child process.

        Otherwise a job could wait here for a child while another worker has one free.
        """
        return self.process_count if all(each.process for each in self.handlers) else self.concurrency

    @property
    def process_count(self) -> int:
        """How many child processes run the handlers registered with ``process=True``."""
        return min(self.concurrency, self.processes or os.cpu_count() or 1)

    @property
    def handlers(self) -> tuple[Handler, ...]:
        """The handlers that are registered, in the order of their registration."""
        return tuple(self._handlers.values())

    @overload
    def handle(
        self, model: type[U], *, retry: Backoff | None = None, timeout: Duration | None = "10m", result: bool = True,
        process: bool = False, on: Policies | None = None, cost: Callable[[U], float] | None = None,
    ) -> _AnyResultDecorator[U, S]: ...  # fmt: skip
    @overload
    def handle(
        self, model: type[M], *, retry: Backoff | None = None, timeout: Duration | None = "10m", result: bool = True,
        process: bool = False, on: Policies | None = None, cost: Callable[[M], float] | None = None,
    ) -> _HandlerDecorator[M, S]: ...  # fmt: skip
    def handle(
        self,
        model: type[Any],
        *,
        retry: Backoff | None = None,
        timeout: Duration | None = "10m",
        result: bool = True,
        process: bool = False,
        on: Policies | None = None,
        cost: Callable[[Any], float] | None = None,
    ) -> _AnyResultDecorator[Any, S]:
        """Register a function for a kind of message: a decorator.

        The function takes one ``Job[model]``, and returns what the model declares as its result (``Message[Summary]``).
        An async function runs on the event loop, a plain one in a thread.
        - `retry` (default ``Backoff()``: 5 attempts): when an attempt that raised is retried.
        - `timeout` (seconds or "2m"; default "10m", None: none): ends an attempt that hangs. An async handler is
          cancelled, a thread is abandoned.
        - `result=False` keeps no result and saves a write.
        - `process=True` is for work that keeps a CPU busy. The function, plain or async, runs in a child process, which
          imports it by its name: a closure or lambda is refused when the worker starts. A timeout kills the child
          and the processes that it has started. A child that dies has failed the attempt. What the function prints goes
          to stderr.
        - `on`: policies for classes of errors, instead of `retry`: ``{ValueError: Reject, Busy: Backoff(...), Limited:
          lambda error: error.retry_after}``. `Reject`: a dead letter at once. A `Backoff`: retried by that policy. A
          function of the error returns the delay ("30s", seconds; None: by `retry`). The error's nearest class decides.
          All attempts count together, whatever ended them. A raised ``Retry`` or ``Reject`` needs no policy. A timeout
          and a child process that died are no errors of the function: `retry` decides, also beside ``{Exception:
          Reject}``. With ``retry=Backoff(attempts=1)``, only the classes of `on` are retried.
        - `cost`: a plain function of the message that returns an upper bound of what an attempt uses (0 to 1e15), such
          as ``lambda message: message.max_tokens``: the `cost` of the rules in ``limits.toml``. Default: 0. The worker
          calls the function on its event loop, also with ``process=True``. Where the function raises, or returns no
          such number, the job becomes a dead letter with the reason ``cost``. The handler states with ``job.settle``
          what was really used. The family must have a `limit_key`, or the worker does not start.
        Raises BadInput for a kind that has a handler already, and for an invalid policy or cost function.
        """
        check_model("handle", model)
        options = check_attempt_options(retry, timeout, on)
        keeps_result, in_process = flag("result", result), flag("process", process)
        check_cost_function(cost)

        def add(function: Callable[[Job[Any, S]], Any]) -> None:
            if (model.aiq_family, model.aiq_kind) in self._handlers:
                raise BadInput(f"kind {model.aiq_kind!r} of {model.aiq_family} has a handler already")
            self._add(model, function, options, keeps_result, in_process, cost)

        return _AnyResultDecorator(add)

    def handle_any(
        self,
        family: str,
        *,
        retry: Backoff | None = None,
        timeout: Duration | None = "10m",
        result: bool = True,
        process: bool = False,
        on: Policies | None = None,
        cost: Callable[[RawMessage], float] | None = None,
    ) -> _AnyResultDecorator[RawMessage, S]:
        """Register a function for all jobs of a family that no other handler of this worker takes: a decorator.

        The function takes one ``Job[RawMessage]``: the body as it is stored, which no model has checked. It gets
        - jobs of every kind that has no handler here, also jobs that name no kind,
        - jobs in an envelope of a schema version that the family does not accept,
        - jobs of such a kind whose body cannot be decoded.
        So this worker takes every job of the family, and announces the kind ``*``. The options are those of `handle`.
        The function `cost` gets the ``RawMessage``.
        Raises BadInput for a second such function of a family, for what is no name of a family, and for an invalid
        policy or cost function. A family that is not declared raises UnknownFamily when the worker starts.
        """
        if not isinstance(family, str) or not FAMILY.fullmatch(family):
            raise BadInput(f'handle_any needs the name of a family, such as "agent.tasks", not {family!r}')
        options = check_attempt_options(retry, timeout, on)
        keeps_result, in_process = flag("result", result), flag("process", process)
        check_cost_function(cost)

        def add(function: Callable[[Job[RawMessage, S]], Any]) -> None:
            if (family, ANY_KIND) in self._handlers:
                raise BadInput(f"{family} has a handler for every kind already")
            self._add(RawMessage, function, options, keeps_result, in_process, cost, any_of=family)

        return _AnyResultDecorator(add)

    def around(self, function: Callable[[Job[Any, S]], C]) -> Callable[[Job[Any, S]], C]:
        """Put a context manager around each run of each handler of this worker: a decorator above @contextmanager or
        @asynccontextmanager. Several are entered in the order in which they are declared::

            @worker.around
            @contextmanager
            def session(job: Job) -> Iterator[None]:
                with Session(engine) as session, session.begin():
                    current_session.set(session)
                    yield  # the handler runs

        - What stands before the `yield` is run before the handler, and what stands behind it afterwards, within the
          handler's timeout, and before the outcome is stored. An exception of the handler comes out at the `yield`.
        - An async one runs on the event loop. A plain one runs where the handler does: on the event loop, in its
          thread, or in its child process, which finds it as it finds handlers. Around a thread, the async ones are
          outside of the plain ones. Context variables that it sets reach the handler.
        - What it raises counts as raised by the handler. If it suppresses an exception, the attempt fails all the same.

        The function may also be a class of context managers, whose instances are made with the job. Raises BadInput for
        what is no such function. Calls of `cost` and functions of ticks are not inside.
        """
        self.arounds = (*self.arounds, parse_around(function, "the job"))
        for key, handler in self._handlers.items():
            self._handlers[key] = replace(handler, arounds=self.arounds)
        return function

    def schedule(
        self, when: When, message: Message[Any] | None = None, *, tenant: str, **options: Unpack[DeclareOptions]
    ) -> Callable[[F], F]:
        """Declare a schedule, which is stored when this worker starts: each of its ticks has one job of `tenant`.

        The jobs have the `message`; the call stands alone, or above a handler, which it leaves as it is.
        Without a message this is a decorator. Above ``@worker.handle(Report)``, the message is ``Report()``. Above a
        function that takes a `Tick` and returns a message, plain or async, the function makes the message of each tick,
        on the event loop of any worker with this owner.
        - `when`: a cron line, "0 6 * * mon-fri", in the time zone `tz` (default "UTC"); an interval, "90s"; a Calendar,
          a Once, or any other Recurrence. `start`, `end`, `jitter`: as of a Recurrence.
        - `id`: a token of up to 64 characters, once in a tenant. Default: the function's name.
        - `priority`, `deadline` (after a tick was enqueued), `headers`: of the jobs, as in `Client.enqueue`.
        - `misfire`: of ticks that are more than `grace` (default "10s") late, none is enqueued ("skip"), or the newest
          ("once", the default), or the newest `bound` (default 100; "all").
        - `overlap="skip"`: a tick is skipped while the former one's job has not ended. Default: "run".
        - `makes`: the class of the messages that the function makes. Default: what the function is annotated to return.
        Raises BadInput for a worker without `owner`, a second schedule of an id, and invalid arguments. What the
        topology decides (families, priorities), and ``overlap="skip"`` for a handler with ``result=False``, is refused
        when the worker starts. A schedule of another owner stays as it is; the worker logs that once, and runs on.
        """
        recurrence, rest = self._schedules.parse(when, tenant, options)
        if message is not None:
            self._schedules.add_message(recurrence, message, tenant, rest)

        def add(function: F) -> F:
            if message is None:
                self._schedules.add_function(recurrence, function, self._handlers, tenant, rest)
            elif all(each.function is not function for each in self.handlers):
                raise BadInput("a schedule of a message stands alone, or above the @worker.handle of its handler")
            return function

        return add

    def _add(
        self,
        model: type[Any],
        function: Any,
        options: AttemptOptions,
        keeps_result: bool,
        process: bool,
        cost: Callable[[Any], float] | None,
        *,
        any_of: str = "",
    ) -> None:
        """Add a handler. Raises BadInput for a function that cannot be one."""
        handler = Handler(
            model, function, is_async_handler(function), options.retry, options.timeout_s, keeps_result, process,
            options.on, any_of, cost, self.arounds,
        )  # fmt: skip
        self._handlers[handler.key] = handler

    @asynccontextmanager
    async def running(self, client: Client) -> AsyncIterator[Session]:
        """Run beside other code on an open client. Leaving the block drains the worker.

        Raises BadInput without handlers, or for a handler with `cost` in a family without `limit_key`; UnknownFamily,
        NotFound if a stream is missing. If the server denies a permission that the worker needs, the block is
        cancelled, and AccessDenied raised once the worker is drained.
        """
        check_client(client)
        session = Session(self._make_options(client), client)
        rights = session.rights
        try:
            try:
                await session.start()
                if rights.failure is None:
                    yield session
            finally:
                rights.stop()
                await session.drain()
        except asyncio.CancelledError:
            if rights.absolve():
                raise
        except Exception as error:
            rights.absolve()
            if rights.failure is not None:
                raise rights.failure from error
            raise
        if rights.failure is not None:
            rights.absolve()
            raise rights.failure

    async def run(self, client: Client, *, until: Awaitable[Any]) -> bool:
        """Run until `until` is done, then drain. Returns whether every running job ended in time."""
        async with self.running(client) as session:
            await until
        return session.clean

    def _make_options(self, client: Client) -> WorkerOptions:
        schedules = self._schedules.check(client, self._handlers)
        lifespan, child_lifespan = self.lifespan, self.child_lifespan
        if lifespan is not None and self._lifespan_takes_client:
            child_lifespan = child_lifespan or lifespan_of_children(lifespan, client, self, self.handlers)
            lifespan = partial(lifespan, client)
        return WorkerOptions(
            self.name, self._handlers, self._resolve_families(client), self.tenants, self.slots, self.process_count,
            lifespan, self.drain_timeout_s, self, self.suspect_after, schedules, child_lifespan,
        )  # fmt: skip

    def _resolve_families(self, client: Client) -> list[str]:
        """Return the families whose jobs this worker takes, sorted. Raises BadInput, UnknownFamily."""
        if not self._handlers:
            raise BadInput("this worker has no handlers: register one with @worker.handle(YourMessage)")
        known = client.topology.families
        handled = {family for family, _ in self._handlers if family in known or family not in self.optional_families}
        wanted = handled if self.families is None else set(self.families)
        for name in sorted(handled | wanted):
            if client.topology.family(name).role != "work":
                raise BadInput(f"family {name} has no lanes: workers cannot take its messages")
        shared = [name for name in sorted(wanted) if client.topology.family(name).lanes == "shared"]
        if self.tenants is not None and shared:
            raise BadInput(
                f"do not set `tenants` for a worker of the family {', '.join(shared)}: such a worker serves all tenants"
            )
        if not wanted & handled:
            raise BadInput(f"no handler is registered for {', '.join(sorted(wanted))}")
        for each in (each for each in self.handlers if each.key[0] in handled):
            family = client.topology.family(each.key[0])
            if each.cost is not None and family.limit_key is None:
                raise BadInput(
                    f"the handler of {each.what} has a cost, and {family.name} has no limit_key, by which jobs are "
                    f"limited: {family.advise_to_set('limit_key')}, or leave cost= out"
                )
        warn_of_no_field(self.handlers, [client.topology.family(name) for name in sorted(wanted)])
        return sorted(wanted)


def _default_name() -> str:
    """Return host name and pid, and a number from the second worker of this process on."""
    number = next(_UNNAMED)
    return f"{socket.gethostname()}-{os.getpid()}{f'-{number}' if number > 1 else ''}"


class AttemptOptions(NamedTuple):
    """When an attempt is over, and what follows one that failed; see `Worker.handle`."""

    retry: Backoff
    timeout_s: float | None
    on: Policies


def check_attempt_options(retry: Backoff | None, timeout: Duration | None, on: Policies | None) -> AttemptOptions:
    """Return the options of a handler, with defaults filled in. Raises BadInput for an invalid one."""
    if retry is not None and not isinstance(retry, Backoff):
        raise BadInput(f"retry must be a Backoff, such as Backoff(attempts=3), not {retry!r}")
    policies = _check_policies({} if on is None else on)
    timeout_s = None if timeout is None else parse_duration("timeout", timeout)
    if timeout_s == 0:
        raise BadInput("timeout must be above 0: use None for no time limit")
    return AttemptOptions(retry or Backoff(), timeout_s, policies)


def _check_policies(on: Policies) -> Policies:
    """Return a copy of the policies of `Worker.handle`'s `on`. Raises BadInput for an invalid one."""
    if not isinstance(on, Mapping):
        raise BadInput(f"the argument `on` must be a mapping, such as {{ValueError: Reject}}, not {on!r}")
    for error, policy in on.items():
        if not isinstance(error, type) or not issubclass(error, Exception) or issubclass(error, Retry | Reject):
            raise BadInput(
                f"on: {error!r} cannot have a policy: give a subclass of Exception other than Retry and Reject"
            )
        if policy is Reject or isinstance(policy, Backoff) or (callable(policy) and not isinstance(policy, type)):
            continue
        raise BadInput(f"on: {error.__name__}: give Reject, a Backoff, or a function of the error, not {policy!r}")
    return dict(on)


async def drain_both(session: Session, other: Session) -> None:
    """Drain two sessions of one worker at once, so that a stop takes one drain timeout; the first one tells of both."""
    for each in (session, other):
        each.rights.stop()
    ended = await asyncio.gather(session.drain(), other.drain(), return_exceptions=True)
    session.clean = session.clean and other.clean
    session.done += other.done
    for each_end in ended:
        if isinstance(each_end, BaseException):
            raise each_end
