"""The command line: each command, argument and option, from the typer app."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from typer.models import ArgumentInfo, CommandInfo, OptionInfo, ParameterInfo, TyperInfo

from . import markdown
from .sentences import is_sentence, join_lines

EXIT_CODES = "Exit codes:"
COMMON_EXIT_CODES = (
    ("0", "success"),
    ("1", "failure: an error that is not of the command line, such as a server that does not answer"),
    ("2", "wrong usage, or an invalid value: nothing was done"),
    ("3", "`aiqueue plan` only: the server differs from the declaration"),
    ("130", "interrupted by Ctrl-C"),
)


_COMMENT = re.compile(r"\s{2,}(?=\S)(?!#)(.*)$")  # what an example is about, apart from it


@dataclass(frozen=True)
class Parameter:
    """An argument or option as a user writes it. `default` and `limits` are for people, "" where there are none."""

    names: tuple[str, ...]
    metavar: str
    text: str
    default: str
    limits: str
    is_argument: bool
    variable: str


@dataclass(frozen=True)
class Command:
    """A command or a group of commands: its words after `aiqueue`, its help in paragraphs, its examples."""

    words: tuple[str, ...]
    paragraphs: tuple[str, ...]
    examples: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    is_group: bool

    @property
    def exit_codes(self) -> str:
        """What the command says of its exit codes, "" if nothing."""
        found = next((each for each in self.paragraphs if each.startswith(EXIT_CODES)), "")
        return found.removeprefix(EXIT_CODES).strip()

    @property
    def has_json(self) -> bool:
        return any("--json" in each.names for each in self.parameters)


def list_commands(app: typer.Typer, instead: dict[str, Callable[..., Any]], shared: dict[str, str]) -> list[Command]:
    """Return the groups and commands of an app, in the order of its help.

    `instead`: the functions of commands that parse their own arguments. `shared`: the environment variables of
    parameters that mean the same everywhere, by the parameter's name.
    """
    return list(_walk(app, (), instead, shared))


def _walk(
    app: typer.Typer, words: tuple[str, ...], instead: dict[str, Callable[..., Any]], shared: dict[str, str]
) -> Iterator[Command]:
    callback = app.registered_callback
    function = callback.callback if callback else None
    text = _text_of(callback) or _text_of(app.info)
    yield Command(words, _paragraphs(text), (), tuple(_parameters(function, shared)), is_group=True)
    for command in app.registered_commands:
        if command.hidden or command.callback is None:
            continue
        name = command.name or command.callback.__name__.replace("_", "-")
        own = instead.get(" ".join((*words, name)), command.callback)
        text = (command.help if own is command.callback else None) or inspect.cleandoc(own.__doc__ or "")
        examples = tuple(_COMMENT.sub(r"  # \1", each.strip()) for each in (command.epilog or "").splitlines()[1:])
        yield Command((*words, name), _paragraphs(text), examples, tuple(_parameters(own, shared)), is_group=False)
    for group in app.registered_groups:
        if group.typer_instance is not None:
            yield from _walk(group.typer_instance, (*words, group.name or ""), instead, shared)


def _text_of(info: CommandInfo | TyperInfo | None) -> str:
    text = getattr(info, "help", None)
    if isinstance(text, str) and text:
        return text
    return inspect.cleandoc(getattr(getattr(info, "callback", None), "__doc__", None) or "")


def _paragraphs(text: str) -> tuple[str, ...]:
    return tuple(join_lines(each) for each in text.split("\n\n") if each.strip())


def _parameters(function: Callable[..., Any] | None, shared: dict[str, str]) -> Iterator[Parameter]:
    if function is None:
        return
    for each in inspect.signature(function, eval_str=True).parameters.values():
        if get_origin(each.annotation) is not Annotated:
            continue
        kind, *notes = get_args(each.annotation)
        info = next((note for note in notes if isinstance(note, ParameterInfo)), None)
        if info is None or info.hidden:
            continue
        is_argument = isinstance(info, ArgumentInfo)
        variables = [info.envvar] if isinstance(info.envvar, str) else list(info.envvar or ())
        if not is_argument and each.name in shared:
            variables.append(shared[each.name])
        yield Parameter(
            names=(info.metavar or each.name.upper(),) if is_argument else _flags(each.name, info, kind),
            metavar="" if is_argument or bool in (kind, *get_args(kind)) else info.metavar or "VALUE",
            text=join_lines(info.help or ""),
            default=_default(each.default, info),
            limits=_limits(info, kind),
            is_argument=is_argument,
            variable=", ".join(variables),
        )


def _flags(name: str, info: ParameterInfo, kind: Any) -> tuple[str, ...]:
    given = list(info.param_decls or ()) if isinstance(info, OptionInfo) else []
    if isinstance(info.default, str) and info.default.startswith("-"):  # the first, as typer takes it in Annotated
        given.insert(0, info.default)
    if given:
        return tuple(part for each in given for part in each.split("/") if part.startswith("-"))
    flag = f"--{name.replace('_', '-')}"
    return (flag, f"--no-{flag.removeprefix('--')}") if kind is bool else (flag,)


def _default(value: Any, info: ParameterInfo) -> str:
    if value is inspect.Parameter.empty or value is ...:
        return "required"
    if value is None or info.show_default is False or value in ("", [], ()):
        return ""
    if isinstance(value, bool):
        return "" if not value else "true"
    return markdown.code(str(value))


def _limits(info: ParameterInfo, kind: Any) -> str:
    choices = [each for part in (kind, *get_args(kind)) if get_origin(part) is Literal for each in get_args(part)]
    if choices:
        return " or ".join(markdown.code(str(each)) for each in choices)
    if info.min is not None and info.max is not None:
        return f"{info.min:,} to {info.max:,}"
    return f"from {info.min:,}" if info.min is not None else f"to {info.max:,}" if info.max is not None else ""


def gaps(commands: list[Command]) -> list[str]:
    """Name each command, argument and option that has no sentence of its own."""
    found = []
    for each in commands:
        if not is_sentence(" ".join(each.paragraphs[:1]), " ".join(each.words)):
            found.append(_title(each))
        found += [
            f"{_title(each)} {one.names[0]}" for one in each.parameters if not is_sentence(one.text, one.names[0])
        ]
    return found


def render(commands: list[Command]) -> str:
    """Return the page. Options that every command has stand in a section of their own."""
    whole, *others = commands
    common = {each.names for each in whole.parameters}
    parts = [
        "`aiqueue --help` and `aiqueue COMMAND --help` show the same in a terminal.",
        "## Options of every command that uses a server",
        "They may stand before or after the command. What is not given comes from the [settings](settings.md).",
        _table(whole.parameters),
        "## Exit codes",
        "Where a command says nothing else:",
        markdown.table(("code", "meaning"), COMMON_EXIT_CODES),
        "## Commands",
        markdown.table(
            ("command", "what the command does"),
            [(f"[`{_title(each)}`](#{_anchor(each)})", _summary(each)) for each in others if not each.is_group],
        ),
    ]
    for each in others:
        parts += list(_section(each, common))
    return markdown.page("Command line", *parts)


def _title(command: Command) -> str:
    return " ".join(("aiqueue", *command.words))


def _anchor(command: Command) -> str:
    return "-".join(("aiqueue", *command.words))


def _summary(command: Command) -> str:
    first = command.paragraphs[0] if command.paragraphs else ""
    return first.partition(". ")[0].rstrip(".") + "."


def _section(command: Command, common: set[tuple[str, ...]]) -> Iterator[str]:
    yield f"## {_title(command)}" if command.is_group else f"### {_title(command)}"
    yield from (each for each in command.paragraphs if not each.startswith(EXIT_CODES))
    own = [each for each in command.parameters if each.names not in common]
    if own:
        yield _table(own)
    taken = [each.names[0] for each in command.parameters if each.names in common]
    if taken and not command.is_group:
        yield f"Also {', '.join(map(markdown.code, taken))}."
    if command.exit_codes:
        yield f"{EXIT_CODES} {command.exit_codes}"
    if command.examples:
        yield "```sh\n" + "\n".join(command.examples) + "\n```"


def _table(parameters: list[Parameter] | tuple[Parameter, ...]) -> str:
    rows = []
    has_variable = any(each.variable for each in parameters)
    for each in parameters:
        names = ", ".join(markdown.code(f"{name} {each.metavar}".strip()) for name in each.names)
        row = [names, each.limits, each.default or "", each.text]
        rows.append([*row, markdown.code(each.variable)] if has_variable else row)
    titles = ["name", "values", "default", "meaning", *(["environment variable"] if has_variable else [])]
    return markdown.table(titles, rows)
