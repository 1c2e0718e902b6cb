"""All commands in one typer app. Each module imports what it needs when its command runs: ``--help`` stays quick."""

from __future__ import annotations

import copy
from typing import Annotated

import typer

from . import (
    audit,
    cancel,
    dead,
    doctor,
    documents,
    enqueue,
    explain,
    gateway,
    health,
    history,
    inbox,
    inspect,
    job_acts,
    job_outcomes,
    jobs,
    limits,
    metrics,
    pause,
    rag,
    reschedule,
    respond,
    schedule,
    schema,
    server,
    tail,
    top,
    topology,
    work,
    workers,
)
from .options import Context, Directory, Profile, Streams, Url

app = typer.Typer(
    name="aiqueue",
    help="A durable work queue for AI workloads on NATS JetStream.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__  # noqa: PLC0415

        typer.echo(f"aiqueue {__version__}")
        raise typer.Exit


@app.callback()
def _accept_server_options(
    url: Url = None,
    context: Context = None,
    profile: Profile = None,
    streams: Streams = None,
    directory: Directory = None,
    version: Annotated[
        bool, typer.Option("--version", metavar="", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A durable work queue for AI workloads on NATS JetStream.

    Credentials come from AIQUEUE_USER, AIQUEUE_PASSWORD, AIQUEUE_CREDS … or from aiqueue.toml.
    """


@app.command(
    "demo",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def _demo(ctx: typer.Context) -> None:
    """Run a demo: text files pass through the queue, with retries, a dead letter and its replay."""
    from .demo import demo  # noqa: PLC0415  (a large module)
    from .options import help_of  # noqa: PLC0415

    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command("demo", help=help_of(demo), context_settings={"help_option_names": ["-h", "--help"]})(demo)
    # options given before the command are passed on: demo uses the server's address, and rejects the others
    before = [f"--{name}={value}" for name, value in (ctx.parent.params if ctx.parent else {}).items() if value]
    code = alone(args=[*before, *ctx.args], prog_name="aiqueue demo", standalone_mode=False)
    if isinstance(code, int):
        raise typer.Exit(code)


for module in (
    server,
    topology,
    enqueue,
    cancel,
    reschedule,
    pause,
    work,
    workers,
    schema,
    respond,
    health,
    history,
    metrics,
    inspect,
    top,
    explain,
    tail,
    audit,
    doctor,
):
    module.register(app)
app.add_typer(dead.app, name="dead")
app.add_typer(documents.app, name="documents")
app.add_typer(gateway.app, name="gateway")
app.add_typer(inbox.app, name="inbox")
job_outcomes.register(jobs.app)
job_acts.register(jobs.app)
app.add_typer(jobs.app, name="jobs")
app.add_typer(limits.app, name="limits")
app.add_typer(rag.app, name="rag")
app.add_typer(schedule.app, name="schedule")


def app_of(word: str) -> typer.Typer:
    """`app` with the only command or group of this name, with all of them if there is none: typer builds each of them
    before it runs one, which costs 30 ms.
    """
    alone = copy.copy(app)
    alone.registered_commands = [each for each in app.registered_commands if each.name == word]
    alone.registered_groups = [each for each in app.registered_groups if each.name == word]
    return alone if alone.registered_commands or alone.registered_groups else app
