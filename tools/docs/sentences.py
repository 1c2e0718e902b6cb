"""Where the sentences of the reference come from, and what counts as one.

A sentence stands beside what it is about: as the text below an attribute, as an item of a class's docstring
(```name`: …``), or as the first paragraph of a docstring. It costs nothing at run time: Python drops the texts below
attributes, and this module reads them from the source.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any, is_typeddict

WORDS_MIN = 3
_STOPS = (".", "!", "?")
_NAMES = r"`\w+`(?:(?:,|,?\s+and)\s+`\w+`)*"
_ITEM = re.compile(rf"(?:\A|\n- |\A- |(?<=[.;:])\s+)({_NAMES}):\s")  # a sentence or a line of a list begins with them
_NAME = re.compile(r"`(\w+)`")
_BULLET = re.compile(r"^- ", re.MULTILINE)
_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`\"'(])")  # of a sentence
_WORD = re.compile(r"[^\W_]+")


def is_sentence(text: str, name: str = "") -> bool:
    """Whether `text` says something of `name`: it ends with a stop or has at least three words, and has a word that the
    name does not have.
    """
    words = [each.lower() for each in _WORD.findall(text)]
    of_name = {each.lower() for each in _WORD.findall(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).replace("_", " "))}
    is_long = len(words) >= WORDS_MIN or (len(words) > 1 and text.rstrip().endswith(_STOPS))
    return is_long and bool(set(words) - of_name - {"the", "a", "an", "of"})


def join_lines(text: str) -> str:
    """Return a text on one line."""
    return " ".join(text.split())


def first_paragraph(text: str | None) -> str:
    """Return the first paragraph of a docstring on one line, "" without one."""
    return join_lines(inspect.cleandoc(text or "").partition("\n\n")[0])


def sentences_of(text: str | None) -> list[str]:
    """Return the sentences of a docstring, each on one line. An item of a list ends its last sentence."""
    pieces = [piece for each in inspect.cleandoc(text or "").split("\n\n") for piece in _BULLET.split(each)]
    return [each for piece in pieces for each in _END.split(join_lines(piece)) if each]


def sentence_about(text: str | None, name: str) -> str:
    """Return the first sentence of a docstring that has this name in backquotes, "" without one.

    An item of a list, and a sentence that begins with other names and a colon, say nothing of this name.
    """
    prose = "\n\n".join(_BULLET.split(each)[0] for each in inspect.cleandoc(text or "").split("\n\n"))
    named = (each for each in sentences_of(prose) if re.search(rf"`{name}\b", each))
    return next((each for each in named if not _ITEM.match(each)), "")


def first_sentence(text: str | None) -> str:
    """Return the first sentence of a docstring on one line, "" without one."""
    return next(iter(sentences_of(text)), "").removesuffix("::").strip()


def own_doc(thing: Any) -> str:
    """Return the docstring of a class, function or property itself, "" if it has none or a made one."""
    if isinstance(thing, staticmethod | classmethod):
        thing = thing.__func__
    elif isinstance(thing, property):
        thing = thing.fget
    doc = vars(thing).get("__doc__") if inspect.isclass(thing) else getattr(thing, "__doc__", None)
    doc = doc or ""
    is_made = inspect.isclass(thing) and doc.startswith(f"{thing.__name__}(")  # by dataclass or NamedTuple
    return "" if is_made else doc


def attribute_sentences(kind: type[Any]) -> dict[str, str]:
    """Return the sentences of a class's attributes, those of its bases too."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if each.__module__.partition(".")[0] in ("builtins", "typing", "pydantic", "enum"):
            continue
        found |= docstring_items(own_doc(each)) | texts_below(each)
    if is_typeddict(kind):  # its bases are no part of its MRO
        for base in _bases_of(kind):
            found = attribute_sentences(base) | found
    return found


def docstring_items(doc: str) -> dict[str, str]:
    """Return what a docstring says of each name: the text behind ```name`:``, up to the next such item, bullet or
    paragraph.
    """
    found: dict[str, str] = {}
    for paragraph in inspect.cleandoc(doc).split("\n\n"):
        items = list(_ITEM.finditer(paragraph))
        for at, item in enumerate(items):
            end = items[at + 1].start() if at + 1 < len(items) else len(paragraph)
            text = join_lines(_BULLET.split(paragraph[item.end() : end])[0])
            found |= dict.fromkeys(_NAME.findall(item[1]), text)
    return found


@cache
def _classes_of(file: str) -> dict[str, ast.ClassDef]:
    with open(file, encoding="utf-8") as source:  # noqa: PTH123  (the name is that of inspect)
        tree = ast.parse(source.read())
    return {each.name: each for each in ast.walk(tree) if isinstance(each, ast.ClassDef)}


def _bases_of(kind: type[Any]) -> Iterator[type[Any]]:
    node = _classes_of(inspect.getsourcefile(kind) or "").get(kind.__name__)
    for each in node.bases if node else ():
        base = getattr(sys.modules[kind.__module__], getattr(each, "id", ""), None)
        if base is not None and is_typeddict(base):
            yield base


def texts_below(kind: type[Any]) -> dict[str, str]:
    """Return the texts below the attributes of a class, without those of its bases."""
    try:
        file = inspect.getsourcefile(kind)
    except TypeError:
        return {}
    node = _classes_of(file).get(kind.__name__) if file else None
    return {} if node is None else _below(node.body)


def module_texts(source: str) -> dict[str, str]:
    """Return the texts below the names of a module, by its source."""
    return _below(ast.parse(textwrap.dedent(source)).body)


def _below(body: list[ast.stmt]) -> dict[str, str]:
    found: dict[str, str] = {}
    for before, after in itertools.pairwise(body):
        text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
        if not isinstance(text, str):
            continue
        targets = before.targets if isinstance(before, ast.Assign) else [getattr(before, "target", None)]
        found |= {each.id: join_lines(text) for each in targets if isinstance(each, ast.Name)}
    return found
