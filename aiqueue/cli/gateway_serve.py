"""``gateway serve``: the gateway over HTTP, in one process or several."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import BadInput
from . import output
from .options import FAILED, LogLevel, PoolFd, ServerOptions, duration_option, processes_option
from .work import LogFormat, join_pool, log_to_stderr, loop_factory, spell_options

if TYPE_CHECKING:
    from .pool_member import PoolMember

DRAIN_S = 30.0


def serve(
    options: ServerOptions,
    *,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="PORT", help="Port to listen on. 0: a free one.", min=0, max=65_535)
    ] = 8000,
    processes: Annotated[int, processes_option("processes that share the port")] = 1,
    drain_timeout: Annotated[
        float | None, duration_option("Time for open requests and streams to finish on shutdown. Default: 30s.")
    ] = None,
    log_level: LogLevel = "info",
    log_format: LogFormat = "text",
    pool_fd: PoolFd = None,
) -> None:
    """Serve OpenAI's API over HTTP until Ctrl-C or SIGTERM: chats with streams, embeddings, models, files, batches.

    Requests need an API key (`aiqueue gateway keys add`), and workers to answer them (`aiqueue work
    aiqueue.gateway:worker`). For TLS, put a proxy before it.

    At the first signal, open requests may finish within the drain timeout. What is left is cut: its jobs go on, and a
    client gets the rest of a stream by Last-Event-ID. At SIGHUP, gateway.toml is read again.

    Exit codes: 0 all requests finished, 1 some did not.
    """
    try:
        from ..gateway import front  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise BadInput(f"aiqueue gateway serve needs {error.name}: pip install 'aiqueue[gateway]'") from None

    drain_s = DRAIN_S if drain_timeout is None else drain_timeout
    if processes > 1:
        from .worker_pool import PoolKind, WorkerPool  # noqa: PLC0415

        kind = PoolKind(("gateway", "serve"), "front", "requests", "their jobs go on", "the jobs of its requests go on")
        log_to_stderr(log_level, log_format, with_process=True)
        with front.reserve(host, port) as bound:
            own = {"host": host, "port": bound.getsockname()[1], "drain-timeout": drain_s, "log-level": log_level,
                   "log-format": log_format}  # fmt: skip
            arguments = spell_options({**vars(options), **own})
            raise typer.Exit(WorkerPool(arguments, processes, target=front.url_of(bound), kind=kind).run())
    import asyncio  # noqa: PLC0415

    member = None if pool_fd is None else join_pool(pool_fd)
    log_to_stderr(log_level, log_format, with_process=member is not None)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        if not runner.run(_serve(options, host, port, drain_s, member)):
            raise typer.Exit(FAILED)


async def _serve(options: ServerOptions, host: str, port: int, drain_s: float, member: PoolMember | None) -> bool:
    from ..gateway import ApiKeys, front, load  # noqa: PLC0415

    async with options.client() as client, ApiKeys(client) as keys:
        config = load(settings=client.settings)
        bound = front.listen(host, port, shared=member is not None)
        url = front.url_of(bound)

        def on_ready() -> None:
            if member is not None:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # blocked by the pool's parent
                member.report_working(drain_s)
            models = output.format_count(len(config.models), "model")
            output.print_notice(f"front: {url}, {models} of {config.file}, at {client.connection.server}")

        return await front.serve(
            front.Front.of(client, config, keys), bound, drain_timeout_s=drain_s, on_ready=on_ready,
            cuts_at_second=member is None,
        )  # fmt: skip
