"""``work``: run the Worker or Agents that a module declares, in one process or a worker pool."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import BadInput, LoadError
from ..units import module_of_path
from . import output
from .options import (
    FAILED,
    LogLevel,
    PoolFd,
    ServerOptions,
    add_command,
    duration_option,
    processes_option,
    split_names,
)

if TYPE_CHECKING:
    from ..agent import Agent, AgentGroup
    from ..worker import Worker
    from .pool_member import PoolMember

RELOAD_DRAIN_S = 1.0  # unless said: a job that still runs goes back to the queue, and the new code runs it


def register(app: typer.Typer) -> None:
    """Register the command."""
    add_command(
        app,
        "work",
        examples=(
            "  aiqueue work app:worker",
            "  aiqueue work app:worker --processes 4 --concurrency 20 --tenants acme,globex",
        ),
    )(work)


Target = Annotated[
    str,
    typer.Argument(metavar="MODULE:ATTRIBUTE", help="The Worker, Agent or list of Agents to run, such as app:worker."),
]
HealthFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        envvar="AIQUEUE_HEALTH_FILE",
        help="Write a health report every second, for `aiqueue health`.",
        show_default=False,
    ),
]


Families = Annotated[
    list[str] | None, typer.Option(metavar="FAMILY,...", help="Only jobs of these families; repeatable.")
]
Tenants = Annotated[
    list[str] | None, typer.Option(metavar="TENANT,...", help="Only jobs of these tenants; repeatable.")
]
Reload = Annotated[
    bool,
    typer.Option("--reload", help="Restart when a *.py or *.toml file here changes. Needs the extra dev."),
]
LogFormat = Annotated[
    Literal["text", "json"],
    typer.Option(metavar="FORMAT", help="Log lines on stderr: text, or json, an object a line."),
]


def work(  # noqa: PLR0913  (an option each)
    options: ServerOptions,
    target: Target,
    *,
    processes: Annotated[int, processes_option("worker processes")] = 1,
    concurrency: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Maximum number of running jobs per process. Default: from the worker.", min=1, max=10_000
        ),
    ] = None,
    families: Families = None,
    tenants: Tenants = None,
    drain_timeout: Annotated[
        float | None, duration_option("Time for running jobs to finish on shutdown, such as 30s.")
    ] = None,
    health_file: HealthFile = None,
    log_level: LogLevel = "info",
    log_format: LogFormat = "text",
    reload: Reload = False,
    pool_fd: PoolFd = None,
) -> None:
    """Run a worker or agents until Ctrl-C or SIGTERM.

    At the first signal, running jobs may finish within the drain timeout; unfinished jobs go to other workers. A second
    signal kills the process; its jobs are redelivered when their leases expire. At SIGHUP, `aiqueue.gateway:worker`
    reads gateway.toml again, and `aiqueue.rag:worker` rag.toml.

    Exit codes: 0 all running jobs finished, 1 some did not, 130 or 143 killed by a second signal.
    """
    # an empty list, for example from an unset shell variable, must not select the jobs of all families or tenants
    if families is not None and split_names(families) is None:
        raise BadInput("--families is empty: name at least one family or leave the option out")
    if tenants is not None and split_names(tenants) is None:
        raise BadInput("--tenants is empty: name at least one tenant or leave the option out")
    given = {"concurrency": concurrency, "families": split_names(families), "tenants": split_names(tenants),
             "drain-timeout": drain_timeout, "log-level": log_level, "log-format": log_format}  # fmt: skip
    if reload:
        log_to_stderr(log_level, log_format, with_process=True)
        if processes > 1 or health_file is not None:
            raise BadInput("--reload is for development: leave out --processes and --health-file")
        raise typer.Exit(_run_reloading(target, options, given))
    if processes > 1:
        from .worker_pool import WorkerPool  # noqa: PLC0415

        log_to_stderr(log_level, log_format, with_process=True)
        arguments = [*spell_options({**vars(options), **given}), "--", target]
        raise typer.Exit(WorkerPool(arguments, processes, target=target, health=health_file).run())
    from .worker_process import WorkerProcess, run_process  # noqa: PLC0415

    member = None if pool_fd is None else join_pool(pool_fd)
    worker = load(target)
    gc.freeze()  # what is loaded stays: no collection is to look at it
    _override(worker, target, concurrency, split_names(families), split_names(tenants), drain_timeout)
    if member is not None:
        _make_name_unique(worker, member)
    log_to_stderr(log_level, log_format, with_process=member is not None)
    if not run_process(WorkerProcess(worker, options, member, health_file), loop_factory()):
        raise typer.Exit(FAILED)


def _run_reloading(target: str, options: ServerOptions, given: dict[str, Any]) -> int:
    """Run a worker that restarts when its files change, and return its exit code. Raises BadInput."""
    try:
        from .reload import Reloader  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise BadInput(f"--reload needs {error.name}: pip install 'aiqueue[dev]'") from None
    drain_s = RELOAD_DRAIN_S if given["drain-timeout"] is None else given["drain-timeout"]
    arguments = [*spell_options({**vars(options), **given, "drain-timeout": drain_s}), "--", target]
    return Reloader(arguments, options.settings(), drain_s).run()


def _override(
    worker: Worker | Agent | AgentGroup,
    target: str,
    concurrency: int | None,
    families: list[str] | None,
    tenants: list[str] | None,
    drain_timeout_s: float | None,
) -> None:
    """Apply the options to a worker, or to each agent. Raises BadInput for an option that it does not have."""
    from ..agent import Agent, AgentGroup  # noqa: PLC0415

    for each in worker.agents if isinstance(worker, AgentGroup) else (worker,):
        each.concurrency = each.concurrency if concurrency is None else concurrency
        each.drain_timeout_s = each.drain_timeout_s if drain_timeout_s is None else drain_timeout_s
    if isinstance(worker, Agent | AgentGroup):
        if families is not None or tenants is not None:
            raise BadInput(f"--families and --tenants apply to a Worker, but {target} is not one")
    else:
        worker.families = worker.families if families is None else tuple(families)
        worker.tenants = worker.tenants if tenants is None else tuple(tenants)


def _make_name_unique(worker: Worker | Agent | AgentGroup, member: PoolMember) -> None:
    """Rename a worker of a pool. Agents keep their names: one process serves the inbox, the others stand by."""
    from ..worker import Worker  # noqa: PLC0415

    if isinstance(worker, Worker):
        worker.name = member.unique_name(worker.name)


def join_pool(fd: int) -> PoolMember:
    """Make this process part of the pool whose socket is open as `fd`."""
    from .pool_member import join  # noqa: PLC0415

    return join(fd)


def log_to_stderr(level: str, form: Literal["text", "json"], *, with_process: bool) -> None:
    """Log to stderr from this level on. In JSON, what a command says of itself while it runs is logged too."""
    import logging  # noqa: PLC0415

    from .. import logs  # noqa: PLC0415

    if not logs.set_up(level, form, with_process=with_process) and form == "json":
        logging.getLogger("aiqueue").warning(
            "--log-format json has no effect, because the module sets up logging itself: use aiqueue.logs.JsonFormatter"
        )
    elif form == "json":
        output.log_notices(logging.getLogger("aiqueue"))


def spell_options(options: Mapping[str, Any]) -> list[str]:
    """Return the given options as command line arguments for a process of the pool.

    Other settings, such as credentials, are found by the process where its parent found them.
    """
    return [
        f"--{name}={','.join(value) if isinstance(value, list) else value}"
        for name, value in options.items()
        if value is not None
    ]


def loop_factory() -> Callable[[], Any] | None:
    """Return uvloop's event loop if it is installed (``aiqueue[uvloop]``), None for asyncio's."""
    try:
        import uvloop  # noqa: PLC0415
    except ImportError:
        return None
    factory: Callable[[], Any] = uvloop.new_event_loop
    return factory


def load(target: str) -> Worker | Agent | AgentGroup:
    """Import and return what ``module:attribute`` names, also from the working directory. Raises LoadError."""
    from ..agent import Agent, AgentGroup  # noqa: PLC0415
    from ..worker import Worker  # noqa: PLC0415

    module_name, colon, attribute = target.partition(":")
    if not colon or not attribute or not all(part.isidentifier() for part in module_name.split(".")):
        file, module = (module_name, module_of_path(module_name)) if module_of_path(module_name) else ("app.py", "app")
        name = attribute or "worker"
        raise LoadError(
            f"{target!r} is not MODULE:ATTRIBUTE; for `{name} = aiqueue.Worker()` in {file}, give {module}:{name}"
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
            raise LoadError(f"{path} has no attribute {part!r}{_list_workers(module_name)}") from None
        path = f"{path}.{part}" if path != module_name else f"{path}:{part}"
    if isinstance(found, list | tuple) and found and all(isinstance(each, Agent) for each in found):
        return AgentGroup(found)
    if not isinstance(found, Worker | Agent):
        raise LoadError(
            f"{target} is of type {type(found).__name__}, not an aiqueue.Worker or Agent{_list_workers(module_name)}"
        )
    return found


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            module = module_of_path(name)
            advice = f"; a module is named without .py: {module}" if module else ""
            raise LoadError(f"no module {error.name!r} in {Path.cwd()} or on PYTHONPATH{advice}") from None
        raise LoadError(f"cannot import {name}: {output.describe_error(error)}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  (a module may raise anything, SystemExit too)
        raise LoadError(f"cannot import {name}: {output.describe_error(error)}") from None


def _list_workers(module_name: str) -> str:
    from ..agent import Agent  # noqa: PLC0415
    from ..worker import Worker  # noqa: PLC0415

    module = sys.modules.get(module_name)
    found = sorted(name for name, value in vars(module).items() if isinstance(value, Worker | Agent)) if module else []
    return f"; the module has {', '.join(found)}" if found else ""
