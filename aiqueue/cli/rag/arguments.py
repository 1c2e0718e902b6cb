"""What commands of ``rag`` share: options, what ``KEY=VALUE`` means, and whether a worker runs at all."""

from __future__ import annotations

import json as jsonlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import AIQueueError, BadInput

if TYPE_CHECKING:
    from ...client import Client
    from ...job import Message

NO_WORKER = "no retrieval worker is running: start `aiqueue work aiqueue.rag:worker`"


def parse_place(text: str) -> Path:
    """Return the path of an argument, for typer. An empty one, as of an unset variable, would be this directory."""
    if not text:
        raise typer.BadParameter("the path is empty")
    return Path(text)


def parse_document_id(text: str) -> str:
    """Return the id of a document, for typer."""
    from ...rag import DOCUMENT_ID_CHARS_MAX  # noqa: PLC0415

    if not 1 <= len(text) <= DOCUMENT_ID_CHARS_MAX:
        raise typer.BadParameter(f"an id has 1 to {DOCUMENT_ID_CHARS_MAX:,} characters, not {len(text):,}")
    return text


Tenant = Annotated[str, typer.Option(metavar="TENANT", help="Tenant that owns the documents.")]
DocumentId = Annotated[
    str, typer.Argument(metavar="ID", parser=parse_document_id, help="Id of the document, from `rag ls`.")
]
Metadata = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Metadata of the documents, to filter by; repeatable, also for lists."),
]
Glob = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Of directories, only these files, such as '*.md'; repeatable."),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Of directories, not these files, such as '*.png'; repeatable."),
]
ByPath = Annotated[
    bool,
    typer.Option(
        "--by-path", metavar="", help="Workers read the files by their paths, where rag.toml allows the tenant to."
    ),
]
NoWait = Annotated[bool, typer.Option("--no-wait", metavar="", help="Return as soon as the jobs are stored.")]

_CONDITION = re.compile(r"([^=<>!]+)(==?|!=|>=|<=|>|<)(?![<>]\s*[-.\d])(.*)", re.DOTALL)
_OPERATORS = {"!=": "ne", ">": "gt", ">=": "gte", "<": "lt", "<=": "lte"}


def parse_metadata(given: Sequence[str] | None) -> dict[str, Any]:
    """Return the metadata of options such as ``lang=en``. A key that is given twice has a list. Raises BadInput."""
    from ...rag import check_metadata  # noqa: PLC0415

    found: dict[str, Any] = {}
    lists: set[str] = set()
    for each in given or ():
        key, equals, text = each.partition("=")
        if not equals or not key.strip():
            raise BadInput(f"--metadata {each!r}: give KEY=VALUE, such as lang=en")
        key, value = key.strip(), parse_value(text)
        if key not in found:
            found[key] = value
        elif key in lists:
            found[key].append(value)
        else:
            lists.add(key)
            found[key] = [found[key], value]
    try:
        return check_metadata(found)
    except ValueError as error:
        raise BadInput(f"--metadata: {error}") from None


def parse_where(given: Sequence[str] | None) -> dict[str, Any] | None:
    """Return the filter of options such as ``lang=en`` and ``year>=2020``; None without any.

    A key with several ``=`` matches any of these values. Raises BadInput.
    """
    from ...rag import parse_where as check_where  # noqa: PLC0415

    found: dict[str, dict[str, Any]] = {}
    for each in given or ():
        match = _CONDITION.fullmatch(each)
        if match is None:
            raise BadInput(f"--where {each!r}: give KEY=VALUE, or one of !=, >, >=, <, <= in place of the =")
        key, operator, value = match[1].strip(), match[2].replace("==", "="), parse_value(match[3])
        conditions = found.setdefault(key, {})
        if operator == "=":
            conditions.setdefault("in", []).append(value)
        elif _OPERATORS[operator] in conditions:
            raise BadInput(f"--where {each!r}: {key}{operator} is given twice")
        else:
            conditions[_OPERATORS[operator]] = value
    check_where(found)
    return found or None


def parse_value(text: str) -> Any:
    """Return a number, true, false or null as what JSON reads, and anything else as the text."""
    try:
        value = jsonlib.loads(text)
    except (ValueError, RecursionError):
        return text
    if isinstance(value, float) and value - value != 0:  # NaN and infinity, which JSON does not have
        return text
    return value if value is None or isinstance(value, bool | int | float) else text


async def is_worker_missing(client: Client, message: type[Message], tenant: str) -> bool:
    """Return whether no running worker takes such jobs of the tenant; False if that cannot be read."""
    from ...lanes import WorkerRecords, serves  # noqa: PLC0415

    try:
        records = await WorkerRecords(client.connection, client.topology).read()
    except AIQueueError:
        return False
    return not any(serves(each, message.aiq_family, message.aiq_kind, tenant) for each in records)
