"""The rooms of aiqueue: what each may import, how large it is, and that ARCHITECTURE.md names what exists."""

from __future__ import annotations

import ast
import importlib
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from .support import ROOT

PACKAGE = ROOT / "aiqueue"
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = sorted(each.parent.name for each in PACKAGE.glob("*/__init__.py"))
LINES_MAX = 450
FUNCTION_LINES_MAX = 70
ENTRIES_MAX = 40


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(each): each for each in FILES}


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def imports_of(module: str) -> Iterator[str]:
    """The modules of aiqueue that this one imports anywhere: at its top, in a function, or for its types only.

    `from .x import name` is the module `x.name` where there is one, else `x`.
    """
    file = MODULES[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name.partition(".")[0] == "aiqueue")
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            if source.partition(".")[0] == "aiqueue":
                for each in node.names:
                    whole = f"{source}.{each.name}"
                    yield whole if whole in MODULES else source


def room_of(module: str) -> str:
    """The room of a module, or its own name where it lies beside the rooms."""
    return module.split(".")[1] if "." in module else ""


def test_a_listing_of_the_package_fits_on_a_screen() -> None:
    entries = [each for each in PACKAGE.iterdir() if each.name != "__pycache__"]
    assert len(entries) <= ENTRIES_MAX, sorted(each.name for each in entries)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_is_for_and_offers_only_what_it_has(room: str) -> None:
    door = importlib.import_module(f"aiqueue.{room}")
    assert door.__doc__
    assert door.__all__
    for name in door.__all__:
        if f"aiqueue.{room}.{name}" in MODULES:
            importlib.import_module(f"aiqueue.{room}.{name}")
        assert getattr(door, name) is not None


def test_no_module_imports_past_the_door_of_another_room() -> None:
    past = []
    for module in MODULES:
        for target in imports_of(module):
            room = room_of(target)
            if room not in ROOMS or room == room_of(module) or module in ("aiqueue", "aiqueue.__main__"):
                continue
            door, _, name = target.removeprefix("aiqueue.").partition(".")
            if name and name not in importlib.import_module(f"aiqueue.{door}").__all__:
                past.append(f"{module} imports {target}")
    assert not past


def test_what_other_rooms_import_is_offered() -> None:
    missing = []
    for module, file in MODULES.items():
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(tree_of(file)):
            if not isinstance(node, ast.ImportFrom) or not node.level or module == "aiqueue":
                continue
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            source = ".".join([*base, *filter(None, [node.module])])
            if (room := source.removeprefix("aiqueue.")) in ROOMS and room != room_of(module):
                offered = importlib.import_module(source).__all__
                missing += [f"{module}: {source}.{each.name}" for each in node.names if each.name not in offered]
    assert not missing


def test_no_imports_in_a_circle_with_those_for_types_counted() -> None:
    graph = {module: {each for each in imports_of(module) if each != module} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_a_module_and_its_functions_are_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= LINES_MAX
    functions = [each for each in ast.walk(tree_of(file)) if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = [each.name for each in functions if (each.end_lineno or 0) - each.lineno + 1 > FUNCTION_LINES_MAX]
    assert not long


def test_a_class_name_means_one_class() -> None:
    names = Counter(
        node.name.lstrip("_") for file in FILES for node in ast.walk(tree_of(file)) if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in names.items() if count > 1] == []


_NAMED = re.compile(r"`((?:[a-z_]+/)*[a-z_]+\.py)`(?:, `(?![a-z_/]+\.py`)([A-Za-z_.]+)`)?")


def test_architecture_names_every_room_and_only_modules_and_names_that_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for room in ROOMS:
        assert f"`{room}/`" in text, f"ARCHITECTURE.md has no room {room}"
    named = list(_NAMED.finditer(text))
    assert named
    for match in named:
        file = PACKAGE / match[1]
        assert file.is_file(), f"ARCHITECTURE.md names {match[1]}"
        if match[2]:
            assert _has(tree_of(file), match[2].split(".")), f"{match[1]} has no {match[2]}"


def _has(tree: ast.AST, path: list[str]) -> bool:
    """Whether a class, function or constant of this dotted name is defined in the tree."""
    for node in ast.iter_child_nodes(tree):
        names = [node.name] if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) else []
        names += [each.id for each in getattr(node, "targets", []) if isinstance(each, ast.Name)]
        if path[0] in names and (len(path) == 1 or _has(node, path[1:])):
            return True
    return False
