"""All pages of the reference: name, and text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial

from aiqueue.cli.app import app
from aiqueue.cli.demo import demo
from aiqueue.cli.json_keys import OUTPUTS, Common
from aiqueue.cli.options import SERVER_OPTIONS
from aiqueue.config import Settings

from . import api, asyncapi, cli, errors, json_keys, markdown, own_files, public, settings
from .remedies import REMEDIES
from .sentences import attribute_sentences

COMMAND_LINE = "cli.md"


@cache
def commands() -> tuple[cli.Command, ...]:
    """Return the commands of aiqueue."""
    variables = {name: settings.variable_of(name) for name in SERVER_OPTIONS}
    return tuple(cli.list_commands(app, {"demo": demo}, variables))


OPENING = (
    "These pages are written from the code by `python -m tools.docs reference`. A test fails where a page differs from "
    "the code, and where a name has no sentence of its own."
)
CONTENTS = (
    ("[API](api/README.md)", "Every public name of Python."),
    ("[Command line](cli.md)", "Every command, argument and option, with defaults and exit codes."),
    ("[JSON outputs](json.md)", "The keys of what commands print with `--json`."),
    ("[Settings](settings.md)", "Every setting, with its environment variable, values and default."),
    ("[Stream files](stream-files.md)", "The keys of `streams/*.toml`."),
    ("[limits.toml](limits-file.md)", "The fields of a rule."),
    ("[gateway.toml](gateway-file.md)", "Providers, models, prices and budgets."),
    ("[rag.toml](rag-file.md)", "Store, embedder, parsing, limits, answers and tenants."),
    ("[Errors](errors.md)", "Every error, what to do next, and what raises it."),
    ("[AsyncAPI](asyncapi.md)", "An example's document for programs in other languages."),
)
PAGES: Mapping[str, Callable[[], str]] = {
    COMMAND_LINE: lambda: cli.render(list(commands())),
    "settings.md": lambda: settings.render(Settings),
    "stream-files.md": own_files.render_streams,
    "limits-file.md": own_files.render_limits,
    "gateway-file.md": own_files.render_gateway,
    "rag-file.md": own_files.render_rag,
    "errors.md": lambda: errors.render(errors.list_errors(public.names()), REMEDIES),
    "json.md": lambda: json_keys.render(OUTPUTS, attribute_sentences(Common)),
    "asyncapi.json": asyncapi.document,
    "asyncapi.md": asyncapi.render,
    "generated.md": lambda: markdown.page(
        "Generated references", OPENING, markdown.table(("page", "what it has"), CONTENTS)
    ),
    "api/README.md": lambda: api.render_index(public.GROUPS),
    **{f"api/{each.file}": partial(api.render, each) for each in public.GROUPS},
}


def render_all() -> dict[str, str]:
    """Return the text of each page, by its path in docs/reference."""
    return {name: render() for name, render in PAGES.items()}
