"""Writes llms.txt, llms-full.txt and the Markdown of each page beside its HTML, for language models: llmstxt.org.

Files that the pages link, such as examples, lie beside them, too, so that the links of the Markdown lead somewhere.
"""

from __future__ import annotations

import posixpath
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

_OPTIONAL = ("docs/decisions/", "docs/benchmarks/", "ARCHITECTURE", "CHANGELOG", "CONTRIBUTING", "examples/", "tests/")
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_TARGET = re.compile(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)")
_ITEM = re.compile(r"^- \[[^\]]+\]\(([^)\s#]+\.md)\): (.+(?:\n  .+)*)", re.MULTILINE)
_SENTENCE = re.compile(r".+?[.:](?=\s|$)", re.DOTALL)


def in_order(env: BuildEnvironment, page: str) -> Iterator[str]:
    """Yield the page and all pages below it, in the order of the navigation."""
    yield page
    for each in env.toctree_includes.get(page, []):
        yield from in_order(env, each)


def index_of(env: BuildEnvironment, page: str) -> str:
    """Return the index page of the page's directory, or of the nearest directory above that has one."""
    directory = posixpath.dirname(page)
    while (index := posixpath.join(directory, "README")) not in env.titles:
        directory = posixpath.dirname(directory)
    return index


def first_sentence(text: str) -> str:
    """Return the first sentence of a page's prose, as plain text; "" if the page has no prose."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n", prose):
        if paragraph.strip() and not paragraph.lstrip().startswith(("#", "|", "<", "!", "-")):
            plain = " ".join(_LINK.sub(r"\1", paragraph).split())
            match = _SENTENCE.match(plain)
            return (match[0] if match else plain).removesuffix(":")
    return ""


def descriptions(index: str, text: str) -> dict[str, str]:
    """Return what an index page says of each page that an item of its lists begins with."""
    here = posixpath.dirname(index)
    found = {}
    for target, said in _ITEM.findall(text):
        page = posixpath.normpath(posixpath.join(here, target)).removesuffix(".md")
        found[page] = " ".join(_LINK.sub(r"\1", said).split())
    return found


def linked_files(page: str, text: str, root: Path) -> Iterator[Path]:
    """Yield the files that a page links and that are no pages, such as examples, by their paths below the root."""
    for target in _TARGET.findall(text):
        path = Path(posixpath.normpath(posixpath.join(posixpath.dirname(page), target)))
        if path.suffix != ".md" and ".." not in path.parts and (root / path).is_file():
            yield path


def _write(app: Sphinx, error: Exception | None) -> None:
    if error is not None or app.builder.format != "html":
        return
    env, out = app.env, Path(app.outdir)
    pages = list(dict.fromkeys(in_order(env, app.config.root_doc)))
    texts = {page: Path(env.doc2path(page)).read_text() for page in pages}
    for page, text in texts.items():
        (out / page).with_suffix(".md").write_text(text)
        for path in linked_files(page, text, Path(app.srcdir)):
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(app.srcdir, path), out / path)
    home = app.config.root_doc
    lines = [f"# {app.config.project}", "", f"> {first_sentence(texts[home])}"]
    said: dict[str, str] = {}
    for page, text in texts.items():
        if posixpath.basename(page) == "README":
            said |= descriptions(page, text)
    sections: dict[str, list[str]] = {}
    for page in pages[1:]:
        section = "Optional" if page.startswith(_OPTIONAL) else env.titles[index_of(env, page)].astext()
        described = said.get(page) or first_sentence(texts[page])
        sections.setdefault(section, []).append(f"- [{env.titles[page].astext()}]({page}.md): {described}")
    for section in sorted(sections, key=lambda each: each == "Optional"):
        lines += ["", f"## {section}", "", *sections[section]]
    (out / "llms.txt").write_text("\n".join(lines) + "\n")
    full = [f"<!-- {page}.md -->\n\n{text.strip()}\n" for page, text in texts.items() if not page.startswith(_OPTIONAL)]
    (out / "llms-full.txt").write_text("\n".join(full))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the writer with Sphinx."""
    app.connect("build-finished", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
