"""What all commands share: the server options, how a command is registered and run, and how its errors are printed.

Imports nothing heavy, so that ``--help`` is quick.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import AsyncIterable, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from typer.core import TyperCommand

from ..errors import AIQueueError, BadInput, NotFound, Unavailable
from ..units import seconds
from .output import OutputFailed, apply_style, escape_controls, print_line

if TYPE_CHECKING:
    from ..client import Client
    from ..config import Settings

T = TypeVar("T")

FAILED, USAGE, DRIFT = 1, 2, 3  # exit codes
PROCESSES_MAX = 64
WATCH_S, WATCH_MIN_S = 2.0, 0.2
_NUMBER = re.compile(r"[0-9]{1,18}(\.[0-9]*)?|\.[0-9]+")

_FAMILY = re.compile(r"[A-Za-z0-9_-]*\.[A-Za-z0-9_.-]*")
_PANEL = "Server and streams"
Url = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="NATS server URL. Default: NATS_URL, else this directory's embedded server.",
        rich_help_panel=_PANEL,
    ),
]
Context = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Take URL and credentials from this context of the nats CLI.", rich_help_panel=_PANEL
    ),
]
Profile = Annotated[
    Literal["single", "cluster"] | None,
    typer.Option(
        metavar="PROFILE",
        help="Stream replicas: single (1 server, default) or cluster (3 servers).",
        rich_help_panel=_PANEL,
    ),
]
Streams = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Directory of additional stream files (*.toml).", rich_help_panel=_PANEL, show_default=False
    ),
]
Directory = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Data directory of the embedded server. Default: the nearest .aiqueue, here or in a parent.",
        rich_help_panel=_PANEL,
    ),
]
SERVER_OPTIONS: dict[str, Any] = {
    "url": Url, "context": Context, "profile": Profile, "streams": Streams, "directory": Directory,
}  # fmt: skip

LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"],
    typer.Option(metavar="LEVEL", help="Log level on stderr: debug, info, warning, error."),
]
PoolFd = Annotated[int | None, typer.Option(hidden=True)]  # of a process of a pool, see `pool_member`
Json = Annotated[bool, typer.Option("--json", metavar="", help="Print JSON.")]


@dataclass(frozen=True)
class ServerOptions:
    """The shared options as given on the command line; None: not given.

    Credentials have no options, because every user of the machine can read a command line. They come from the
    environment, aiqueue.toml or a nats context.
    """

    url: str | None = None
    context: str | None = None
    profile: str | None = None
    streams: Path | None = None
    directory: Path | None = None

    def settings(self, *, embedded: bool = False) -> Settings:
        """Return the settings in force. `embedded`: ignore settings that name another server.

        A --directory without --url and --context also means its embedded server, whatever the environment contains.
        Raises SettingsError.
        """
        from ..config import Settings  # noqa: PLC0415

        settings = Settings.load(**vars(self))
        if embedded or (self.directory and not self.url and not self.context):
            none = dict.fromkeys(("url", "context", "user", "password", "token", "creds", "nkey"))
            settings = settings.model_copy(update={**none, **({"embedded": "auto"} if embedded else {})})
        return settings

    def client(self, *, embedded: bool = False) -> Client:
        """Return a client that is not open yet. Raises SettingsError, TopologyError."""
        from ..client import Client  # noqa: PLC0415

        return Client(self.settings(embedded=embedded))

    def run_with_client(
        self, work: Callable[[Client], Awaitable[T]], *, declare: bool = True, reads: bool = False, acts: bool = False
    ) -> T:
        """Open a client, return what `work` returns for it, and close the client. `declare` as in `Client.open`.

        `reads`: the command only reads, so no embedded server is started and no stream is created for it. `acts`: it
        changes what is stored, and stores nothing new, so an embedded server is started only where its data are.
        """
        import asyncio  # noqa: PLC0415

        async def run() -> T:
            from ..server import find_directory  # noqa: PLC0415

            client = self.client()
            start = not reads
            if acts and not client.settings.servers:
                start = (client.settings.directory or find_directory()).is_dir()
            await client.open(declare=declare and not reads, start=start)
            try:
                return await work(client)
            finally:
                await client.close()

        return asyncio.run(run())

    def list_with_client(self, find: Callable[[Client], AsyncIterable[T]], limit: int) -> tuple[list[T], bool]:
        """Return the first `limit` items that `find` yields for an open client, and whether there are more."""

        async def take(client: Client) -> tuple[list[T], bool]:
            found: list[T] = []
            async for each in find(client):
                if len(found) == limit:
                    return found, True
                found.append(each)
            return found, False

        return self.run_with_client(take, reads=True)


class WatchesByDefault(TyperCommand):
    """A command whose option --watch may come without its value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, add_watch_value(args))


def add_watch_value(args: list[str]) -> list[str]:
    """Return the arguments with a value after each --watch that has none. What follows is one if it is a duration."""
    found: list[str] = []
    for at, each in enumerate(args):
        if each == "--":
            return [*found, *args[at:]]
        has_value = at + 1 < len(args) and _is_duration(args[at + 1])
        found.append(f"{each}={WATCH_S:g}" if each == "--watch" and not has_value else each)
    return found


def _is_duration(text: str) -> bool:
    try:
        _parse_duration(text)
    except typer.BadParameter:
        return False
    return True


def add_command(
    app: typer.Typer,
    name: str,
    *,
    only: tuple[str, ...] = tuple(SERVER_OPTIONS),
    examples: tuple[str, ...] = (),
    cls: type[TyperCommand] | None = None,
) -> Callable[[Callable[..., None]], Any]:
    """Return a decorator that registers a function as a command. Its docstring is the help, `examples` end the help.

    The function's first parameter is a `ServerOptions`. The options for it (those named in `only`) are added here and
    are accepted before and after the command's name. An AIQueueError is printed as one line and sets the exit code.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**given: Any) -> None:
            before = given.pop("ctx").find_root().params
            options = ServerOptions(
                **{each: _first(given.pop(each, None), before.get(each)) for each in SERVER_OPTIONS}
            )
            try:
                function(options, **given)
            except AIQueueError as error:
                print_error(with_remedy(error, options))
                raise typer.Exit(USAGE if isinstance(error, BadInput) else FAILED) from None
            except OutputFailed as failure:
                if not failure.closed:
                    print_error(str(failure))
                raise typer.Exit(FAILED) from None

        plain = inspect.signature(function, eval_str=True)
        parameters = [
            inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
            *(each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in list(plain.parameters.values())[1:]),
            *(
                inspect.Parameter(each, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=SERVER_OPTIONS[each])
                for each in only
            ),
        ]
        run.__signature__ = plain.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        del run.__wrapped__
        epilog = "\n".join(("Examples:", *examples)) if examples else None
        app.command(name, cls=cls, help=help_of(function), epilog=epilog)(run)
        return function

    return register


def with_remedy(error: AIQueueError, options: ServerOptions) -> str:
    """Return the error, with what to do next where only a command knows that."""
    text = str(error)
    if isinstance(error, Unavailable) and "no reply within" in text:
        return f"{text}: the server is away or too busy: try again; `aiqueue doctor` checks the server"
    if isinstance(error, NotFound) and text.endswith("run `aiqueue apply` first"):
        try:
            embedded = not options.settings().servers
        except AIQueueError:
            return text
        if embedded:
            return f"{text}; an embedded server that has just started creates its streams by itself, in some seconds"
    return text


def help_of(function: Callable[..., Any]) -> str:
    """Return a docstring with each paragraph on one line: typer keeps line breaks, and a terminal may be narrower."""
    paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(each.split()) for each in paragraphs)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def print_error(problem: str) -> None:
    """Write an error as one line to stderr."""
    line = " ".join(escape_controls(problem).split())
    print_line(f"{apply_style('error:', 'red', sys.stderr)} {line}", err=True)


def processes_option(what: str) -> Any:
    """Return the option --processes. `what`: that there are several of."""
    text = f"Number of {what}. With 2 or more, a process that dies is restarted."
    return typer.Option(metavar="N", help=text, min=1, max=PROCESSES_MAX)


def duration_option(text: str, *names: str, metavar: str = "DURATION", panel: str | None = None) -> Any:
    """Return an option whose value is a duration such as "30s"; `text` is its help. `names`: its flags."""
    return typer.Option(*names, parser=_parse_duration, metavar=metavar, help=text, rich_help_panel=panel)


def time_option(text: str, *names: str, panel: str | None = None) -> Any:
    """Return an option whose value is a time such as "2026-11-24T08:00:00+01:00"; `text` is its help. `names`: its
    flags.
    """
    return typer.Option(*names, parser=parse_time, metavar="TIME", help=text, rich_help_panel=panel)


def _parse_duration(value: str) -> float:
    """Return the seconds of an option such as "30s", for typer."""
    try:
        return seconds(float(value) if _NUMBER.fullmatch(value) else value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def parse_time(value: str, option: str | None = None) -> float:
    """Return seconds since the epoch for an option such as "2026-11-24T08:00:00+01:00".

    Raises typer's BadParameter. `option`: its name, where typer does not know it.
    """
    from datetime import datetime  # noqa: PLC0415

    if _NUMBER.fullmatch(value):
        return float(value)
    try:
        found = datetime.fromisoformat(value)
    except ValueError:
        found = None
    if found is None or found.utcoffset() is None:
        problem = "is not a time" if found is None else "has no time zone"
        raise typer.BadParameter(
            f'{value!r} {problem}; give "2026-11-24T08:00:00+01:00" or seconds since the epoch', param_hint=option
        )
    return found.timestamp()


def is_like_family(text: str) -> bool:
    """Return whether an argument means a family and not a job. A job's key, such as a URL, may have dots too."""
    return _FAMILY.fullmatch(text) is not None


def split_names(values: list[str] | None) -> list[str] | None:
    """Return the names in a repeatable option whose values may be comma-separated lists; None if there are none."""
    found = [part.strip() for value in values or () for part in value.split(",") if part.strip()]
    return found or None
