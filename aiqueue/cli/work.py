"""``work``: run a worker that a module declares, as a service."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import BadInput, LoadError
from . import output
from .options import FAILED, Where, duration, names, verb

if TYPE_CHECKING:
    from ..agent import Agent, AgentGroup
    from ..client import Client
    from ..worker import Worker
    from .crew import Member

PROCESSES_MAX = 64
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
CREW_LOG_FORMAT = "%(asctime)s %(levelname)s [%(process)d] %(name)s: %(message)s"


def register(app: typer.Typer) -> None:
    """Add this verb."""
    verb(app, "work")(work)


def work(
    where: Where,
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:ATTRIBUTE", help="The Worker, Agent, or list of Agents to run, such as app:worker."
        ),
    ],
    *,
    processes: Annotated[
        int, typer.Option(help="How many processes run it, each replaced when it dies.", min=1, max=PROCESSES_MAX)
    ] = 1,
    concurrency: Annotated[
        int | None,
        typer.Option(help="How many jobs run at once, in each process. Default: the worker's own.", min=1, max=10_000),
    ] = None,
    families: Annotated[list[str] | None, typer.Option(help="Only these families' jobs; commas or repeated.")] = None,
    tenants: Annotated[list[str] | None, typer.Option(help="Only these tenants' jobs; commas or repeated.")] = None,
    drain_timeout: Annotated[
        float | None,
        typer.Option(parser=duration, metavar="DURATION", help="What running jobs get when told to stop, such as 30s."),
    ] = None,
    health_file: Annotated[
        Path | None, typer.Option(help="Write each second how it is, for `aiqueue health`.", show_default=False)
    ] = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(help="What goes to the log on stderr.")
    ] = "info",
    crew_fd: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run a worker, or agents, until Ctrl-C or SIGTERM, then let it finish its jobs.

    Exit code 0 when all running jobs could finish, 1 when some were handed to other workers. A second signal ends it
    at once (130, 143); its jobs are delivered again when their leases run out.
    """
    # an empty list, as of an unset variable, must not come to mean everybody's jobs
    if families is not None and names(families) is None:
        raise BadInput("--families names no family")
    if tenants is not None and names(tenants) is None:
        raise BadInput("--tenants names no tenant")
    if processes > 1:
        from .crew import Crew  # noqa: PLC0415

        _log_to_stderr(log_level, CREW_LOG_FORMAT)
        options = {"concurrency": concurrency, "families": names(families), "tenants": names(tenants),
                   "drain-timeout": drain_timeout, "log-level": log_level}  # fmt: skip
        arguments = [*_spelled({**vars(where), **options}), "--", target]
        raise typer.Exit(Crew(arguments, processes, what=target, health=health_file).run())
    import asyncio  # noqa: PLC0415

    member = None if crew_fd is None else _join(crew_fd)
    worker = load(target)
    from ..agent import Agent, AgentGroup  # noqa: PLC0415

    if concurrency is not None:
        for each in worker.agents if isinstance(worker, AgentGroup) else (worker,):
            each.concurrency = concurrency
    only, whose = names(families), names(tenants)
    if isinstance(worker, Agent | AgentGroup):
        if only is not None or whose is not None:
            raise BadInput(f"--families and --tenants are for workers, and {target} is none")
    else:
        worker.families = worker.families if only is None else tuple(only)
        worker.tenants = worker.tenants if whose is None else tuple(whose)
    if drain_timeout is not None:
        for each in worker.agents if isinstance(worker, AgentGroup) else (worker,):
            each.drain_timeout_s = drain_timeout
    if member is not None and not isinstance(worker, Agent | AgentGroup):
        worker.name = member.own_name(worker.name)
    _log_to_stderr(log_level, CREW_LOG_FORMAT if member else LOG_FORMAT)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        drained = runner.run(_run(worker, where, member, health_file))
    if not drained:
        raise typer.Exit(FAILED)


def _join(fd: int) -> Member:
    from .crew import join  # noqa: PLC0415

    return join(fd)


def _log_to_stderr(level: str, form: str) -> None:
    import logging  # noqa: PLC0415

    # does nothing where the module has set up logging itself
    logging.basicConfig(stream=sys.stderr, format=form)
    logging.getLogger("aiqueue").setLevel(level.upper())


def _spelled(options: Mapping[str, Any]) -> list[str]:
    """The options that were given, as a command line has them. What came from elsewhere, as credentials do, a child
    finds where its parent found it.
    """
    return [
        f"--{name}={','.join(value) if isinstance(value, list) else value}"
        for name, value in options.items()
        if value is not None
    ]


def _loop_factory() -> Callable[[], Any] | None:
    """The event loop of uvloop where that is installed (``aiqueue[uvloop]``), None for asyncio's own."""
    try:
        import uvloop  # noqa: PLC0415
    except ImportError:
        return None
    factory: Callable[[], Any] = uvloop.new_event_loop
    return factory


async def _run(
    worker: Worker | Agent | AgentGroup, where: Where, member: Member | None, health_file: Path | None
) -> bool:
    import asyncio  # noqa: PLC0415
    import os  # noqa: PLC0415
    import signal  # noqa: PLC0415
    import time  # noqa: PLC0415

    from ..agent import Agent  # noqa: PLC0415
    from ..units import short_duration  # noqa: PLC0415
    from ..worker import Worker  # noqa: PLC0415
    from .health import Pulse  # noqa: PLC0415

    what = "worker " if isinstance(worker, Worker) else "agent " if isinstance(worker, Agent) else ""
    stop = asyncio.Event()
    pulse = Pulse(health_file, partial(_starting, worker), notify=member is None)

    def on_signal(number: int) -> None:
        if stop.is_set() and member is None:
            sys.stderr.flush()
            os._exit(128 + number)
        stop.set()

    client = where.client()
    pulse.start()
    begun = time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    if member is not None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # which the crew had blocked
    try:
        await client.open()
        async with worker.running(client) as session:
            pulse.told = session.vitals
            output.say(_start_line(worker, client))
            if member is not None:
                member.works(worker.drain_timeout_s)
            await stop.wait()
            if session.running:
                left = output.count(session.running, "running job")
                patience = short_duration(worker.drain_timeout_s)
                output.say(f"{what}{worker.name}: draining {left}, up to {patience}; again ends at once", err=True)
    finally:
        await client.close()
        await pulse.stop()
    took = short_duration(time.monotonic() - begun)
    ending = "all finished" if session.clean else "some did not finish in time and go to other workers"
    output.say(f"{what}{worker.name}: {output.count(session.done, 'delivery', 'deliveries')} in {took}, {ending}")
    return session.clean


def _starting(worker: Worker | Agent | AgentGroup) -> dict[str, Any]:
    import os  # noqa: PLC0415
    import time  # noqa: PLC0415

    return {"state": "starting", "time": time.time(), "pid": os.getpid(), "worker": worker.name}


def _start_line(worker: Worker | Agent | AgentGroup, client: Client) -> str:
    from ..agent import Agent, AgentGroup  # noqa: PLC0415

    if isinstance(worker, AgentGroup):
        names = output.cut(", ".join(f"{each.name} of {each.tenant}" for each in worker.agents), 200)
        return f"{worker.name}: {names}, at {client.connection.server}"
    if isinstance(worker, Agent):
        at_once = output.count(worker.concurrency, "conversation")
        kinds = ", ".join(sorted(worker.kinds)) or "nothing"
        return f"agent {worker.name} of {worker.tenant}: {at_once} at once, {kinds}, at {client.connection.server}"
    families = worker.families or sorted({handler.model.aiq_family for handler in worker.handlers})
    tenants = ", ".join(worker.tenants) if worker.tenants else "all tenants"
    slots = output.count(worker.slots, "slot")
    return f"worker {worker.name}: {slots}, {', '.join(families)} of {tenants}, at {client.connection.server}"


def load(target: str) -> Worker | Agent | AgentGroup:
    """What ``module:attribute`` names, the working directory being importable. Raises LoadError."""
    from ..agent import Agent, AgentGroup  # noqa: PLC0415
    from ..worker import Worker  # noqa: PLC0415

    module_name, colon, attribute = target.partition(":")
    if not colon or not attribute or not all(part.isidentifier() for part in module_name.split(".")):
        raise LoadError(
            f"{target!r} is not module:attribute; for `worker = aiqueue.Worker()` in app.py it is app:worker"
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    found: Any = _import(module_name)
    path = module_name
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise LoadError(f"{path} has no attribute {part!r}{_workers(module_name)}") from None
        path = f"{path}.{part}" if path != module_name else f"{path}:{part}"
    if isinstance(found, list | tuple) and found and all(isinstance(each, Agent) for each in found):
        return AgentGroup(found)
    if not isinstance(found, Worker | Agent):
        raise LoadError(
            f"{target} is a {type(found).__name__} and not an aiqueue.Worker or Agent{_workers(module_name)}"
        )
    return found


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise LoadError(f"there is no module {error.name!r} in {Path.cwd()} or on PYTHONPATH") from None
        raise LoadError(f"importing {name}: {_last_line(error)}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  (a module may raise anything, SystemExit too)
        raise LoadError(f"importing {name}: {_last_line(error)}") from None


def _last_line(error: BaseException) -> str:
    """The error's own line, with the place in the user's code that raised it."""
    line = traceback.format_exception_only(error)[-1].strip()
    frames = [each for each in traceback.extract_tb(error.__traceback__) if not each.filename.startswith("<frozen")]
    if isinstance(error, SyntaxError) and error.filename:
        return f"{line} ({error.filename}, line {error.lineno})"
    last = frames[-1] if frames else None
    return f"{line} ({last.filename}, line {last.lineno})" if last and last.filename != __file__ else line


def _workers(module_name: str) -> str:
    from ..agent import Agent  # noqa: PLC0415
    from ..worker import Worker  # noqa: PLC0415

    module = sys.modules.get(module_name)
    found = sorted(name for name, value in vars(module).items() if isinstance(value, Worker | Agent)) if module else []
    return f"; it has {', '.join(found)}" if found else ""
