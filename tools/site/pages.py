"""Navigation from the links of index pages, and a check of the names in code spans."""

from __future__ import annotations

import posixpath
import pydoc
import re
from collections.abc import Iterator
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

_log = logging.getLogger(__name__)
_LINK = re.compile(r"\]\(([^)\s#:]+\.md)(?:#[^)\s]*)?\)")
_INDEXES = ("README", "index")
_NAME = re.compile(r"aiqueue(?:\.\w+)*\.[A-Z]\w*")
_HOME = """<!doctype html>
<meta charset="utf-8">
<meta http-equiv="refresh" content="0; url=README.html">
<title>aiqueue</title>
"""


def children(page: str, text: str) -> list[str]:
    """Return the pages below an index page, in order: of what it links, the pages of its directory and those outside
    `docs`. Below the home page are the other index pages.
    """
    here = posixpath.dirname(page)
    found = []
    for target in _LINK.findall(text):
        path = posixpath.normpath(posixpath.join(here, target)).removesuffix(".md")
        own = posixpath.dirname(path) == here or (here and path.startswith(f"{here}/"))
        index = posixpath.basename(path) == "README" and not here
        elsewhere = here and not path.startswith("docs/")
        if path != page and (own or index or elsewhere):
            found.append(path)
    return list(dict.fromkeys(found))


def _drop_links_of_others(_app: Sphinx, page: str, source: list[str]) -> None:
    if page == "tests/guide/guide":  # a text of another project, whose links lead to that project's files
        source[0] = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", source[0])


def _add_navigation(_app: Sphinx, page: str, source: list[str]) -> None:
    if posixpath.basename(page) in _INDEXES and (below := children(page, source[0])):
        listed = "\n".join(f"/{each}" for each in below)
        source[0] += f"\n\n```{{toctree}}\n:hidden:\n\n{listed}\n```\n"


def _named(document: nodes.document) -> Iterator[tuple[nodes.literal, str]]:
    for span in document.findall(nodes.literal):
        if match := _NAME.match(span.astext()):
            yield span, match[0]


def _check_names(app: Sphinx, document: nodes.document) -> None:
    if app.env.docname == "CHANGELOG":  # names what is gone, too
        return
    for span, name in _named(document):
        if pydoc.locate(name) is None:
            _log.warning("there is no %s", name, location=span, type="aiqueue", subtype="name")


def _write_home(app: Sphinx, error: Exception | None) -> None:
    if error is None:
        Path(app.outdir, "index.html").write_text(_HOME)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the hooks of this module with Sphinx."""
    app.connect("source-read", _drop_links_of_others)
    app.connect("source-read", _add_navigation)
    app.connect("doctree-read", _check_names)
    app.connect("build-finished", _write_home)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
