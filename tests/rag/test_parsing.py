"""Bytes of each format, and bytes that are not what their name says."""

from __future__ import annotations

import contextlib
import json
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aiqueue.errors import LoadError
from aiqueue.rag import ParsedDocument, Section
from aiqueue.rag.errors import ParseFailed
from aiqueue.rag.parsing import HEAD, DocumentSource, Parsers

from .pdfs import encrypted_pdf, image_only_pdf, pdf

MD = """---
title: "The manual"
---
Before any heading.

# Install #

How to install.

## Linux

```sh
# no heading
```

Setext
======

Below setext.

## Empty one
"""
HTML = b"""<!doctype html><html><head><title>The  page</title><style>p { color: red }</style></head><body>
<nav><a href="/">Home</a></nav><h1>Install<a class="headerlink">\xc2\xb6</a></h1><p>How to
 <b>install</b> it.</p><h2>Linux</h2><pre>  apt   install
x</pre><table><tr><td>a</td><td>b</td></tr></table><script>var x = 1</script><p hidden>secret</p>tail
<h2>Empty</h2></body></html>"""


def parse(content: bytes | str, name: str = "", content_type: str = "") -> ParsedDocument:
    content = content.encode() if isinstance(content, str) else content
    return Parsers().parse(content, DocumentSource(name, content_type))


def pairs(parsed: ParsedDocument) -> list[tuple[str, str]]:
    return [(each.heading, each.text.strip()) for each in parsed.sections if each.text.strip()]


def test_a_drawing_in_a_text_is_text() -> None:
    assert "Welcome" in parse("<svg><path/></svg>\n\n# Welcome", "readme.md").sections[-1].heading


def test_markdown_is_parted_by_its_headings_and_a_fence_holds_none() -> None:
    parsed = parse(MD, "manual.md")
    assert parsed.title == "The manual"
    assert pairs(parsed) == [
        ("", "Before any heading."),
        ("Install", "How to install."),
        ("Install > Linux", "```sh\n# no heading\n```"),
        ("Setext", "Below setext."),
        ("Setext > Empty one", "## Empty one"),
    ]
    assert all(MD[each.start :].startswith(each.text) for each in parsed.sections)


def test_html_is_parted_by_its_headings_without_what_is_around_the_page() -> None:
    parsed = parse(HTML, "page.html")
    assert parsed.title == "The page"
    assert pairs(parsed) == [
        ("Install", "How to install it."),
        ("Install > Linux", "apt   install\nx\n\na | b\n\ntail"),
        ("Install > Empty", "Empty"),
    ]


def test_html_that_names_its_main_part_is_read_without_the_rest() -> None:
    page = "<html><body><div>menu</div><div role='main'><h1>A</h1>text</div><div>legal</div></body></html>"
    assert pairs(parse(page)) == [("A", "text")]


@pytest.mark.parametrize(
    ("opening", "end"),
    [
        ("<div class='note'>", "</div>"),
        ("<div class='admonition warning'>", "</div>"),
        ("<section role='note'>", "</section>"),
        ("<aside>", "</aside>"),
        ("<blockquote>", "</blockquote>"),
    ],
)
def test_the_text_after_a_note_belongs_to_the_section_around_the_note(opening: str, end: str) -> None:
    page = (
        f"<body><h1>Vacuum</h1>before{opening}<h3>Note</h3>inside<h4>Deeper</h4>{end}<p>after</p>"
        f"<div class='titlepage'><h2>Next</h2></div>{opening}no heading{end}last</body>"
    )
    assert pairs(parse(page, "x.html")) == [
        ("Vacuum", "before"),
        ("Vacuum > Note", "inside"),
        ("Vacuum > Note > Deeper", "Deeper"),
        ("Vacuum", "after"),
        ("Vacuum > Next", "no heading\n\nlast"),
    ]


@pytest.mark.parametrize(
    ("title", "own"),
    [
        ("Install \u2014 Manual 1.0 documentation", "Install"),
        ("Install | Example", "Install"),
        ("Example: Install", "Install"),
        ("Example - Install", "Install"),
        ("Install", "Install"),
        ("Installing", "Installing"),
        ("How to Install it", "How to Install it"),
        ("Pre-Install", "Pre-Install"),
        ("Another - page", "Another - page"),
        ("", "Install"),
    ],
)
def test_the_title_of_a_page_is_without_the_name_of_its_site(title: str, own: str) -> None:
    assert parse(f"<html><head><title>{title}</title></head><body><h1>Install</h1>text</body></html>").title == own


@pytest.mark.parametrize("charset", ["iso-8859-1", "windows-1252", "utf-8", "utf-16"])
def test_html_is_decoded_as_it_says(charset: str) -> None:
    page = f'<html><head><meta charset="{charset}"></head><body><p>Größe</p></body></html>'
    assert pairs(parse(page.encode(charset))) == [("", "Größe")]


def test_a_pdf_has_a_section_for_each_page_under_its_bookmarks() -> None:
    parsed = parse(pdf("One", "Two", "", "Four", title="Manual", outline=(("Intro", 0), ("Use", 3))), "x.pdf")
    assert parsed.title == "Manual"
    assert [(each.heading, each.text, each.page) for each in parsed.sections] == [
        ("Intro", "One", 1), ("Intro", "Two", 2), ("Use", "Four", 4),
    ]  # fmt: skip


def test_json_is_a_line_for_each_value_with_its_names() -> None:
    data = {
        "title": "Config",
        "on": True,
        "size": 1.50,
        "server": {"host": "a", "ports": [1, 2]},
        "rows": [{"a": 1}, {"a": 2}],
    }
    parsed = parse(json.dumps(data), "x.json")
    assert parsed.title == "Config"
    assert pairs(parsed) == [
        ("", "title: Config\non: true\nsize: 1.5"),
        ("server", "host: a\nports: 1, 2"),
        ("rows", "a: 1\n\na: 2"),
    ]


def test_json_lines_are_a_list() -> None:
    assert pairs(parse('{"a": 1}\n\n{"a": 2}\n', "x.jsonl")) == [("", "a: 1\n\na: 2")]


@pytest.mark.parametrize("text", ['{"a": 1', "[" * 100_000])
def test_what_is_called_json_and_is_none_is_read_as_text_which_is_a_problem(text: str) -> None:
    parsed = parse(text, "x.json")
    assert pairs(parsed) == [("", text)]
    assert len(parsed.problems) == 1
    assert parsed.problems[0].endswith("read as text")


@pytest.mark.parametrize(("delimiter", "name"), [(",", "x.csv"), (";", "x.csv"), ("\t", "x.tsv")])
def test_a_table_names_the_column_of_each_value(delimiter: str, name: str) -> None:
    rows = [["name", "city"], ["Ann", '"Berlin\nMitte"'], ["", ""], ["Bob", ""]]
    parsed = parse("\r\n".join(delimiter.join(each) for each in rows), name)
    assert pairs(parsed) == [("", "name | city\nname: Ann; city: Berlin Mitte\nname: Bob")]


def test_a_table_without_names_has_values_only() -> None:
    assert pairs(parse("1,a\n2,b\n", "x.csv")) == [("", "1; a\n2; b")]


@pytest.mark.parametrize(
    "content",
    ["Größe".encode(), b"\xef\xbb\xbf" + "Größe".encode(), "Größe".encode("utf-16"), "Größe".encode("utf-16-le"),
     "Größe".encode("utf-32"), "Größe".encode("cp1252")],
)  # fmt: skip
def test_text_is_decoded_by_its_mark_as_utf8_or_as_windows_1252(content: bytes) -> None:
    if content == "Größe".encode("utf-16-le"):
        content *= 3  # long enough to be told without a mark
    assert parse(content).sections[0].text.startswith("Größe")


def test_utf8_that_was_cut_off_within_a_character_stays_utf8_and_has_a_problem() -> None:
    parsed = parse("Grüße, Größe, Maße, Füße: ä".encode()[:-1])
    assert parsed.sections[0].text == "Grüße, Größe, Maße, Füße: \ufffd"
    assert parsed.problems == ["1 character is not valid UTF-8, and replaced by \ufffd"]


def test_line_ends_are_line_feeds_and_no_text_has_a_nul() -> None:
    parsed = parse("Grüße\r\nb\rc".encode() + b"x" * 70_000 + b"\0d")
    assert parsed.sections[0].text.startswith("Grüße\nb\nc")
    assert parsed.sections[0].text.endswith("x d")


@pytest.mark.parametrize(
    ("content", "name", "reason"),
    [
        (b"", "x.txt", "it is empty"),
        (b" \n\t ", "x.txt", "no text"),
        (b"<html><body><p> </p></body></html>", "x.html", "no text"),
        (b"PK\x03\x04" + b"x" * 100, "report.docx", "ZIP archive"),
        (b"PK\x03\x04" + b"x" * 100, "report.pdf", "ZIP archive"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "x.md", r"it is an image \(PNG\): run OCR"),
        (bytes(range(256)) * 8, "x.txt", "binary"),
        (bytes(range(1, 32)) * 80, "x.csv", "binary"),
        (b"\x1f\x8b\x08" + bytes(50), "x.json", "it is compressed with gzip: unpack it, and ingest what is in it$"),
        (b"BZh91AY&SY" + bytes(50), "x.bz2", "it is compressed with bzip2: unpack it"),
        (b"%PDF-1.7 and no more", "x.pdf", "damaged"),
        (encrypted_pdf(), "x.pdf", "encrypted: remove its password"),
        (image_only_pdf(), "x.pdf", "run OCR"),
        (b"<?xml version='1.0'?>\n<!-- -->\n<svg xmlns='x'><path d=''/></svg>", "x.SVG", r"an image \(SVG\): convert"),
        (pdf("", ""), "x.pdf", "2 pages; they are blank"),
    ],
)  # fmt: skip
def test_what_holds_no_text_fails_with_what_to_do(content: bytes, name: str, reason: str) -> None:
    with pytest.raises(ParseFailed, match=reason) as raised:
        parse(content, name)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["BZh is how bzip2 begins.", "GIF8 was a limit of eight."])
def test_a_text_that_begins_as_a_binary_format_does_is_a_text(text: str) -> None:
    assert pairs(parse(text, "x.txt")) == [("", text)]


@pytest.mark.parametrize("unit", [b"<!---->", b"<!-- a -->\n", b"<!--", b"<?xml ?>", b"<meta ", b"---\n", b" ", b"\0<"])
def test_the_format_of_what_nothing_recognises_is_told_in_linear_time(unit: bytes) -> None:
    for count in (24, HEAD // len(unit)):  # first so few that also exponential time ends
        head = (unit * count)[: HEAD - 1] + b"x"
        begun = time.process_time()
        with contextlib.suppress(ParseFailed):
            Parsers().find(head, DocumentSource("a.txt"))
        assert time.process_time() - begun < 1


@pytest.mark.parametrize("name", ["x.txt", "x.html", "x.docx", "x", "x.json"])
@pytest.mark.parametrize("content_type", ["", "text/html", "application/octet-stream"])
def test_what_the_bytes_show_comes_before_name_and_content_type(name: str, content_type: str) -> None:
    assert pairs(parse(pdf("I am a PDF"), name, content_type)) == [("", "I am a PDF")]
    assert pairs(parse(b"<!DOCTYPE HTML><p>I am a page", name, content_type)) == [("", "I am a page")]


@pytest.mark.parametrize("name", ["x.pdf", "x.docx"])
def test_a_text_with_the_name_of_a_binary_format_is_text_with_a_problem(name: str) -> None:
    parsed = parse("I am a text", name)
    assert pairs(parsed) == [("", "I am a text")]
    assert "the content is text" in parsed.problems[0]


def test_a_content_type_decides_where_the_name_says_nothing() -> None:
    assert pairs(parse("# A\n\nb", "download", "text/markdown; charset=utf-8")) == [("A", "b")]


class ShoutParser:
    """A user's own format: `SHOUT` and a text."""

    format = "shout"
    suffixes = (".shout", ".docx")
    content_types = ("text/x-shout",)
    in_child = True

    def recognises(self, head: bytes, source: DocumentSource) -> bool:
        return head.startswith(b"SHOUT")

    def parse(self, content: bytes, source: DocumentSource) -> ParsedDocument:
        if b"raise" in content:
            raise ZeroDivisionError("odd\x00\nline")
        return ParsedDocument("Loud", [Section("\ud800 a\0", content.decode("latin-1").upper() + "\0\ud800")])


@pytest.mark.parametrize(
    ("content", "name"), [(b"SHOUT hi", "x.txt"), (b"hi", "a.shout"), (b"PK\x03\x04 hi", "b.docx")]
)
def test_a_parser_of_the_users_comes_first_and_what_it_returns_can_be_stored(content: bytes, name: str) -> None:
    own = Parsers.load([f"{__name__}:ShoutParser"])
    parsed = own.parse(content, DocumentSource(name))
    assert parsed.sections == [
        Section("a", content.decode("latin-1").upper().replace("\x03", " ").replace("\x04", " ") + "  ")
    ]


def test_a_parser_that_raises_fails_the_document_in_one_line() -> None:
    own = Parsers.load([f"{__name__}:ShoutParser"])
    with pytest.raises(ParseFailed, match="the shout parser raised ZeroDivisionError: odd") as raised:
        own.parse(b"SHOUT raise", DocumentSource())
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["no.such.module:x", f"{__name__}:MD", "nonsense"])
def test_what_is_no_parser_is_not_loaded(name: str) -> None:
    with pytest.raises(LoadError, match="parser"):
        Parsers.load([name])


NAMES = ["", "x.txt", "x.md", "x.html", "x.json", "x.csv", "x.pdf", "x.jsonl", "x.tsv"]
STARTS = [
    b"",
    b"%PDF-1.4\n",
    b"<html><body>",
    b"{",
    b"---\ntitle: ",
    b"\xff\xfe",
    b"\xfe\xff",
    b"a,b\n",
    b"# ",
    b"```\n",
]


@settings(max_examples=80)
@given(
    start=st.sampled_from(STARTS),
    content=st.binary(max_size=300) | st.text(max_size=200).map(str.encode),
    name=st.sampled_from(NAMES),
)
@example(start=b"", content=b'"\\ud800\\u0000"', name="x.json")
@example(start=b"", content=b"1" * 10_000, name="x.json")
@example(start=b"", content=b'"' + b"x" * 200_000, name="x.csv")
def test_parsing_any_bytes_raises_only_parse_failed_and_what_it_returns_can_be_stored(
    start: bytes, content: bytes, name: str
) -> None:
    try:
        parsed = parse(start + content, name)
    except ParseFailed:
        return
    for text in (parsed.title, *parsed.problems, *(each.text + each.heading for each in parsed.sections)):
        assert "\0" not in text
        text.encode()
