"""HTML, read by lxml: headings part it, and what is no text of the page is left out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from ..errors import ParseFailed
from ..types import ParsedDocument, Section
from .headings import HeadingPath
from .sniffing import HEAD, DocumentSource, charset_in, decode_text

if TYPE_CHECKING:
    from lxml.etree import _Element as Element

# A comment ends at its first "-->". With another way to read it, a run of comments would have exponentially many.
_START = re.compile(
    rb"(?:\xef\xbb\xbf|\xff\xfe|\xfe\xff)?\s*(?:<\?xml[^>]{0,200}\?>\s*)?(?:<!--(?:(?!-->).){0,2000}-->\s*)*<(?:!doctype\s+html|html|head|body)[\s>]",
    re.IGNORECASE | re.DOTALL,
)
_META = re.compile(rb"<meta[^>]{0,300}charset[^>]{0,100}>", re.IGNORECASE)
_SKIPPED = frozenset({
    "head", "script", "style", "template", "noscript", "svg", "math", "nav", "footer", "iframe", "object", "select",
    "button", "canvas", "audio", "video", "map",
})  # fmt: skip
_SKIPPED_ROLES = frozenset({"navigation", "search", "banner", "contentinfo"})
_SKIPPED_CLASSES = frozenset({  # of what common generators of documentation put around a page's text
    "navheader", "navfooter", "sphinxsidebar", "related", "headerlink", "breadcrumb", "breadcrumbs", "sidebar",
})  # fmt: skip
# A heading in one of these is over where the element ends: after a note, the text belongs to the section around it.
_ASIDES = frozenset({"aside", "blockquote", "details", "figure", "td", "th"})
_ASIDE_CLASSES = frozenset({
    "admonition", "note", "tip", "hint", "info", "warning", "caution", "important", "danger", "attention", "seealso",
})  # fmt: skip
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_PARAGRAPHS = frozenset({
    "p", "div", "pre", "table", "ul", "ol", "dl", "blockquote", "section", "article", "main", "header", "aside",
    "figure", "form", "fieldset", "details", "address", "hr", "body",
})  # fmt: skip
_LINES = frozenset({"li", "tr", "dt", "dd", "br", "figcaption", "summary", "caption", "option", "legend"})
_VERBATIM = frozenset({"pre", "textarea", "listing", "xmp"})
# Between a page's own name and its site's, in a title.
_SITE_AFTER = re.compile(r"(?:\s+[-\u2013\u2014|\u00b7\u2022\u00bb]|:)\s")
_SITE_BEFORE = re.compile(r"(?:\s[-\u2013\u2014|\u00b7\u2022\u00bb]|:)\s+\Z")
_SPACE = re.compile(r"\s+")
_BLANK_LINES = re.compile(r"\n{3,}")
_DEPTH_MAX = 2_048  # libxml2's own limit; deeper elements and all that follows them are not read


class HtmlParser:
    """HTML and XHTML. A page that names its main part is read without the rest."""

    format: Final = "HTML"
    suffixes: Final = (".html", ".htm", ".xhtml", ".xht")
    content_types: Final = ("text/html", "application/xhtml+xml")
    in_child: Final = True

    def recognises(self, head: bytes, source: DocumentSource) -> bool:
        """Whether it begins as HTML does: with its doctype, or the element html, head or body."""
        head = head.replace(b"\0", b"") if b"\0" in head[:4] else head  # UTF-16
        return _START.match(head) is not None

    def parse(self, content: bytes, source: DocumentSource) -> ParsedDocument:
        """Return a section for each heading with a text."""
        from lxml import etree  # noqa: PLC0415  (loaded where it is needed)

        meta = _META.search(content[:HEAD])
        text, problems = decode_text(content, source, charset_in(meta[0].decode("latin-1")) if meta else "")
        parser = etree.HTMLParser(
            encoding="utf-8", huge_tree=True, recover=True, no_network=True, remove_comments=True, remove_pis=True
        )
        try:
            root = etree.fromstring(text.encode("utf-8", "replace"), parser)
        except etree.XMLSyntaxError as error:
            raise ParseFailed(f"it is not HTML: {error.msg}") from None
        if any("Excessive depth" in each.message for each in parser.error_log):
            problem = f"its tags are nested deeper than {_DEPTH_MAX:,}: what follows there is not read"
            problems = [problem, *problems]
        if root is None:
            raise ParseFailed(f"it holds no text ({'; '.join(problems) or 'HTML without content'})")
        named = root.find(".//title")
        title = " ".join("".join(named.itertext()).split()) if named is not None else ""
        page = _Page()
        page.read(_main_part(root))
        return ParsedDocument(_own_title(title, page.first_heading) or source.stem, page.sections, problems)


def _own_title(title: str, heading: str) -> str:
    """Return the title without the name of the site: the first heading if the title only adds to it, as in
    "Install — Manual 1.0". The title is in the heading of every chunk, and what all pages share finds none of them.
    """
    before, found, after = title.partition(heading) if heading else (title, "", "")
    if found and (_SITE_AFTER.match(after) if not before else not after and _SITE_BEFORE.search(before)):
        return heading
    return title or heading


def _main_part(root: Element) -> Element:
    """Return the element that the page names as its main part, if there is one with a text; else all."""
    found = [each for each in root.iter("main", "div", "article") if each.tag == "main" or each.get("role") == "main"]
    return found[0] if len(found) == 1 and any(not each.isspace() for each in found[0].itertext()) else root


class _Page:
    """Sections in the making: `_pieces` is the text since the last heading."""

    def __init__(self) -> None:
        self.sections: list[Section] = []
        self.first_heading = ""
        self._path = HeadingPath()
        self._bare_heading = ("", 0)  # the last heading, while it has no text and no heading below it
        self._pieces: list[str] = []
        self._verbatim = 0
        self._asides: list[tuple[Element, HeadingPath]] = []  # those around this place, with the path before each
        self._start = 0

    def read(self, root: Element) -> None:
        """Read an element. Does not recurse, since a page may be nested deeply."""
        for enters, element in _walk(root):
            tag: Any = element.tag
            if enters:
                self._enter(tag)
                if tag in _ASIDES or (element.attrib and _is_note(element)):
                    self._asides.append((element, self._path.copy()))
                self._add(element.text)
            else:
                self._leave(tag)
                if self._asides and self._asides[-1][0] is element:
                    self._leave_aside(self._asides.pop()[1])
                if element is not root:
                    self._add(element.tail)
        self._end_section()
        self._say_bare_heading(0)

    def _enter(self, tag: str) -> None:
        if tag in _HEADINGS:
            self._end_section()
        elif tag in _PARAGRAPHS:
            self._break("\n\n")
        elif tag in _LINES:
            self._break("\n")
        elif tag in ("td", "th") and self._pieces and not self._pieces[-1].endswith("\n"):
            self._pieces.append(" | ")
        if tag in _VERBATIM:
            self._verbatim += 1

    def _leave(self, tag: str) -> None:
        if tag in _VERBATIM:
            self._verbatim -= 1
        if tag in _HEADINGS:
            heading = " ".join("".join(self._pieces).split()).rstrip("¶ ")
            self._pieces.clear()
            self._say_bare_heading(_HEADINGS[tag])
            self._path.enter(_HEADINGS[tag], heading)
            self._bare_heading = (heading, _HEADINGS[tag])
            self.first_heading = self.first_heading or heading
        elif tag in _PARAGRAPHS:
            self._break("\n\n")
        elif tag in _LINES:
            self._break("\n")

    def _leave_aside(self, before: HeadingPath) -> None:
        if self._path.text != before.text:
            self._end_section()
            self._say_bare_heading(0)
            self._path = before

    def _add(self, text: str | None) -> None:
        if not text:
            return
        if not self._verbatim:
            text = _SPACE.sub(" ", text)
            if not self._pieces or self._pieces[-1].endswith(("\n", " ")):
                text = text.lstrip(" ")
        if text:
            self._pieces.append(text)

    def _break(self, lines: str) -> None:
        if self._pieces:
            self._pieces.append(lines)

    def _end_section(self) -> None:
        lines = "".join(self._pieces).split("\n")
        self._pieces.clear()
        text = _BLANK_LINES.sub("\n\n", "\n".join(each.rstrip() for each in lines)).strip("\n")
        if text.strip():
            self._bare_heading = ("", 0)
            self._say(text)

    def _say_bare_heading(self, level: int) -> None:
        """Make a heading without a text, and without one below it, a text. `level`: of the next heading; 0: none."""
        heading, own_level = self._bare_heading
        self._bare_heading = ("", 0)
        if heading and level <= own_level:
            self._say(heading)

    def _say(self, text: str) -> None:
        self.sections.append(Section(self._path.text, text, self._start))
        self._start += len(text) + 1


def _walk(root: Element) -> Iterator[tuple[bool, Element]]:
    """Yield each element twice: (True, element) before what is within, (False, element) after it."""
    stack = [(root, iter(root))]
    yield True, root
    while stack:
        element, children = stack[-1]
        child = next(children, None)
        if child is None:
            stack.pop()
            yield False, element
        elif _is_skipped(child):
            child.tag, child.text = "span", None  # its tail is still text
            stack.append((child, iter(())))
        else:
            yield True, child
            if len(child):
                stack.append((child, iter(child)))
            else:
                yield False, child


def _is_note(element: Element) -> bool:
    if element.tag in _HEADINGS or element.tag in ("html", "body", "main"):
        return False
    return element.get("role") == "note" or not _ASIDE_CLASSES.isdisjoint(element.get("class", "").lower().split())


def _is_skipped(element: Element) -> bool:
    if element.tag in _SKIPPED:
        return True
    attributes = element.attrib
    return bool(attributes) and (
        "hidden" in attributes
        or attributes.get("role") in _SKIPPED_ROLES
        or attributes.get("aria-hidden") == "true"
        or not _SKIPPED_CLASSES.isdisjoint(attributes.get("class", "").split())
    )
