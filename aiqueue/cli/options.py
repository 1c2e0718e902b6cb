"""What all verbs share: where the server is, how a verb runs, what its errors come to. Imports nothing heavy."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from ..errors import AIQueueError, BadInput
from ..units import seconds

if TYPE_CHECKING:
    from ..client import Client
    from ..config import Settings

T = TypeVar("T")

FAILED, USAGE, DRIFT = 1, 2, 3

_PANEL = "Where"
Url = Annotated[
    str | None,
    typer.Option(help="Address of the server; also NATS_URL. Default: this directory's own.", rich_help_panel=_PANEL),
]
Context = Annotated[str | None, typer.Option(help="A context of the nats command line tool.", rich_help_panel=_PANEL)]
Profile = Annotated[
    Literal["single", "cluster"] | None,
    typer.Option(help="What is declared: for one server or three.", rich_help_panel=_PANEL),
]
Streams = Annotated[
    Path | None, typer.Option(help="A directory with more streams/*.toml.", rich_help_panel=_PANEL, show_default=False)
]
Directory = Annotated[
    Path | None,
    typer.Option(help="Data of the embedded server. Default: .aiqueue here or above.", rich_help_panel=_PANEL),
]
WHERE: dict[str, Any] = {
    "url": Url, "context": Context, "profile": Profile, "streams": Streams, "directory": Directory,
}  # fmt: skip

Json = Annotated[bool, typer.Option("--json", help="Plain data instead of text.")]


@dataclass(frozen=True)
class Where:
    """The shared options as given; None was not given. Credentials come from the environment, aiqueue.toml or a
    context: on a command line every user of the machine could read them.
    """

    url: str | None = None
    context: str | None = None
    profile: str | None = None
    streams: Path | None = None
    directory: Path | None = None

    def settings(self, *, embedded: bool = False) -> Settings:
        """The settings in force; `embedded` leaves out every other server. A --directory means its own server,
        whatever the environment says. Raises SettingsError.
        """
        from ..config import Settings  # noqa: PLC0415

        settings = Settings.load(**vars(self))
        if embedded or (self.directory and not self.url and not self.context):
            none = dict.fromkeys(("url", "context", "user", "password", "token", "creds", "nkey"))
            settings = settings.model_copy(update=none)
        return settings

    def client(self, *, embedded: bool = False) -> Client:
        """A client, not yet open. Raises SettingsError, TopologyError."""
        from ..client import Client  # noqa: PLC0415

        return Client(self.settings(embedded=embedded))

    def drive(self, work: Callable[[Client], Awaitable[T]], *, declare: bool = True) -> T:
        """What `work` returns, given an open client; `declare` as for `Client.open`."""
        import asyncio  # noqa: PLC0415

        async def run() -> T:
            client = self.client()
            await client.open(declare=declare)
            try:
                return await work(client)
            finally:
                await client.close()

        return asyncio.run(run())


def verb(app: typer.Typer, name: str, *, only: tuple[str, ...] = tuple(WHERE)) -> Callable[[Callable[..., None]], Any]:
    """Make a function a command: its first parameter is a `Where`, filled from options that it need not declare
    (those in `only`), given before or after the verb. An AIQueueError ends it with one line and its exit code.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**given: Any) -> None:
            before = given.pop("ctx").find_root().params
            where = Where(**{each: _first(given.pop(each, None), before.get(each)) for each in WHERE})
            try:
                function(where, **given)
            except AIQueueError as error:
                complain(str(error))
                raise typer.Exit(USAGE if isinstance(error, BadInput) else FAILED) from None

        plain = inspect.signature(function, eval_str=True)
        parameters = [
            inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
            *(each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in list(plain.parameters.values())[1:]),
            *(
                inspect.Parameter(each, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=WHERE[each])
                for each in only
            ),
        ]
        run.__signature__ = plain.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        del run.__wrapped__
        app.command(name)(run)
        return function

    return register


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def complain(problem: str) -> None:
    """Say what is wrong, as one line on stderr."""
    from .output import clean, styled  # noqa: PLC0415

    line = " ".join(clean(problem).split())
    sys.stderr.write(f"{styled('error:', 'red', sys.stderr)} {line}\n")


def duration(value: str) -> float:
    """Seconds of an option such as "30s", for typer."""
    try:
        return seconds(float(value) if value.replace(".", "", 1).isdigit() else value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def moment(value: str) -> float:
    """Seconds since the epoch of an option such as "2026-11-24T08:00:00+01:00", for typer."""
    from datetime import datetime  # noqa: PLC0415

    if value.replace(".", "", 1).isdigit():
        return float(value)
    try:
        found = datetime.fromisoformat(value)
    except ValueError:
        found = None
    if found is None or found.utcoffset() is None:
        zone = "" if found is None else "it has no time zone: "
        raise typer.BadParameter(f'{zone}a time such as "2026-11-24T08:00:00+01:00", or seconds since the epoch')
    return found.timestamp()


def names(values: list[str] | None) -> list[str] | None:
    """An option that may be repeated and may hold several names with commas; None where it was not given."""
    found = [part.strip() for value in values or () for part in value.split(",") if part.strip()]
    return found or None
