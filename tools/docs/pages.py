"""All pages of the reference: name, and text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial

from aiqueue.cli.app import app
from aiqueue.cli.demo import demo
from aiqueue.cli.json_keys import OUTPUTS, Common
from aiqueue.cli.options import SERVER_OPTIONS
from aiqueue.config import Settings

from . import api, cli, errors, json_keys, own_files, public, settings
from .remedies import REMEDIES
from .sentences import attribute_sentences

COMMAND_LINE = "cli.md"


@cache
def commands() -> tuple[cli.Command, ...]:
    """Return the commands of aiqueue."""
    variables = {name: settings.variable_of(name) for name in SERVER_OPTIONS}
    return tuple(cli.list_commands(app, {"demo": demo}, variables))


PAGES: Mapping[str, Callable[[], str]] = {
    COMMAND_LINE: lambda: cli.render(list(commands())),
    "settings.md": lambda: settings.render(Settings),
    "stream-files.md": own_files.render_streams,
    "limits-file.md": own_files.render_limits,
    "gateway-file.md": own_files.render_gateway,
    "rag-file.md": own_files.render_rag,
    "errors.md": lambda: errors.render(errors.list_errors(public.names()), REMEDIES),
    "json.md": lambda: json_keys.render(OUTPUTS, attribute_sentences(Common)),
    "api/index.md": lambda: api.render_index(public.GROUPS),
    **{f"api/{each.file}": partial(api.render, each) for each in public.GROUPS},
}


def render_all() -> dict[str, str]:
    """Return the text of each page, by its path in docs/reference."""
    return {name: render() for name, render in PAGES.items()}
