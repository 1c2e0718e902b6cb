"""``schema``: print an AsyncAPI document, or a JSON Schema, of families and kinds."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import BadInput
from . import output
from .options import ServerOptions, add_command, split_names
from .work import load

if TYPE_CHECKING:
    from ..agent import Agent, AgentGroup
    from ..schema import HandledKind
    from ..topology import Topology
    from ..worker import Worker


def register(app: typer.Typer) -> None:
    """Register the command."""
    add_command(
        app,
        "schema",
        only=("url", "context", "profile", "streams"),
        examples=(
            "  aiqueue schema app:worker > asyncapi.json",
            "  aiqueue schema app:worker --kind summarise --format json-schema",
        ),
    )(schema)


Targets = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODULE:ATTRIBUTE]...",
        help="The Workers and Agents whose kinds to describe, such as app:worker. Default: none, only the families.",
        show_default=False,
    ),
]
Format = Annotated[
    Literal["asyncapi", "json-schema"],
    typer.Option("--format", metavar="FORMAT", help="asyncapi (3.0.0), or json-schema (2020-12)."),
]
Families = Annotated[
    list[str] | None, typer.Option("--family", metavar="FAMILY,...", help="Only these families; repeatable.")
]
Kinds = Annotated[list[str] | None, typer.Option("--kind", metavar="KIND,...", help="Only these kinds; repeatable.")]
Title = Annotated[
    str | None, typer.Option(metavar="TEXT", help="The document's title. Default: the programs.", show_default=False)
]
ApiVersion = Annotated[
    str, typer.Option("--api-version", metavar="TEXT", help="The version of what the document describes.")
]


def schema(
    options: ServerOptions,
    targets: Targets = None,
    *,
    form: Format = "asyncapi",
    family: Families = None,
    kind: Kinds = None,
    title: Title = None,
    api_version: ApiVersion = "unversioned",
) -> None:
    """Print an AsyncAPI document of families and kinds, or the JSON Schemas of their messages and results.

    The kinds are those that have a handler in the programs, the families those of the stream files. The document states
    subjects, headers and payloads, so that a NATS client in any language can publish a job and read its result. No
    server is asked, and no credentials are printed.
    """
    from .. import __version__  # noqa: PLC0415
    from ..schema import describe_servers, make_asyncapi, make_json_schema, select  # noqa: PLC0415
    from ..topology import Topology  # noqa: PLC0415

    families, names = (_only(*each) for each in (("--family", family), ("--kind", kind)))
    settings = options.settings()
    topology = Topology.of(settings)
    sources = list(dict.fromkeys(targets or ()))
    with contextlib.redirect_stdout(sys.stderr):  # a module may print when it is imported
        programs = {target: load(target) for target in sources}
    kinds = [each for target, found in programs.items() for each in _kinds_of(found, target, topology)]
    selected = select(topology, kinds, sources=sources, families=families, names=names)
    title = title or ", ".join(sources) or "aiqueue"
    if form == "json-schema":
        output.print_json(make_json_schema(selected, title=title, version=__version__))
    else:
        servers = describe_servers(settings)
        document = make_asyncapi(
            topology, selected, title=title, api_version=api_version, version=__version__, servers=servers
        )
        output.print_json(document)


def _only(option: str, given: list[str] | None) -> list[str] | None:
    found = split_names(given)
    if given is not None and found is None:  # for example from an unset shell variable
        raise BadInput(f"{option} is empty: name at least one, or leave the option out")
    return found


def _kinds_of(found: Worker | Agent | AgentGroup, target: str, topology: Topology) -> Iterator[HandledKind]:
    """Yield the kinds that a worker takes, or that agents handle."""
    from ..agent import Agent, AgentGroup  # noqa: PLC0415
    from ..mailbox import BOUNCE, FAMILY  # noqa: PLC0415
    from ..schema import HandledKind  # noqa: PLC0415

    for agent in found.agents if isinstance(found, AgentGroup) else (found,) if isinstance(found, Agent) else ():
        for each in agent.handlers:
            model = None if each.any_of else each.model
            name = each.key[1]
            yield HandledKind(FAMILY, name, model, target, is_sent=name != BOUNCE, agents=(agent.name,))
    if isinstance(found, Agent | AgentGroup):
        return
    for each in found.handlers:
        family, name = each.key
        if family in found.optional_families and family not in topology.families:
            continue
        if found.families is None or family in found.families:
            yield HandledKind(family, name, None if each.any_of else each.model, target, each.keeps_result)
