"""Tables that a deployment lays over stream files: the setting `overlay`, by family, or by role for other streams."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import TopologyError
from . import streamfile
from .selection import ANSWERS, DEFAULT, Stated, parse_optional
from .streamfile import StreamFile


def parse_needed(
    declared: Sequence[StreamFile],
    families: Stated[Sequence[str]] | None,
    laid_over: Stated[Mapping[str, Any]] | None,
    *,
    profile: str,
    size: str,
) -> list[StreamFile]:
    """Return the bundled files of optional families, without those that a declared file replaces, if a setting names
    something that no declared file has. Else nothing is read.
    """
    names = {_name(each) for each in declared} | ANSWERS.keys() | {DEFAULT}
    wanted = {*(families.value if families else ()), *(laid_over.value if laid_over else ())}
    if wanted <= names:
        return []
    return [each for each in parse_optional(profile, size) if _name(each) not in names]


def lay_over(
    declared: Sequence[StreamFile], optional: Sequence[StreamFile], laid_over: Stated[Mapping[str, Any]], *, size: str
) -> tuple[list[StreamFile], list[StreamFile]]:
    """Return the stream files with the tables of an overlay in them. Raises TopologyError, also for a table of a family
    that is not declared.
    """
    names = {_name(each) for each in (*declared, *optional)}
    for name in laid_over.value:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(names))}"
            tables = laid_over.value[name]
            for key in tables if isinstance(tables, Mapping) else ():
                if f"{name}.{key}" in names:  # in TOML, [overlay.agent.tasks] is a table in a table
                    hint = f'write overlay."{name}.{key}", with quotes'
            laid_over.refuse(f"is no family, and no role of a stream; {hint}", _quoted(name))

    def change(each: StreamFile) -> StreamFile:
        if (name := _name(each)) not in laid_over.value:
            return each
        prefix = ".".join(filter(None, (laid_over.key, _quoted(name))))
        return streamfile.lay_over(each, laid_over.value[name], file=laid_over.file, prefix=prefix, size=size)

    return [change(each) for each in declared], [change(each) for each in optional]


@contextlib.contextmanager
def placed(declared: Sequence[StreamFile], laid_over: Stated[Mapping[str, Any]] | None) -> Iterator[None]:
    """Have a TopologyError about keys of stream files name the overlay, if one of them is stated there."""
    try:
        yield
    except TopologyError as error:
        if laid_over is None:
            raise
        for each in declared:
            if each.file == error.file and _states(laid_over, _name(each), error.key):
                laid_over.refuse(error.problem, f"{_quoted(_name(each))}.{error.key}")
        others = [(name, error.key) for name in laid_over.value]  # the other one of two that do not go together
        for name, key in [*others, ("journal", "stream.max_age")]:
            if _states(laid_over, name, key):
                laid_over.refuse(f"does not go with {error}", f"{_quoted(name)}.{key}")
        raise


def _states(laid_over: Stated[Mapping[str, Any]], name: str, path: str) -> bool:
    table, _, key = path.partition(".")
    return key in laid_over.value.get(name, {}).get(table, {})


def _name(each: StreamFile) -> str:
    """Return the name of a stream file in an overlay."""
    return each.family["name"] if each.family else each.role


def _quoted(name: str) -> str:
    return json.dumps(name) if "." in name else name
