"""What bytes are: text in an encoding, or a binary format. What the bytes show comes before the name."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import NamedTuple

from ..errors import ParseFailed

HEAD = 64 * 1024  # bytes that are looked at to tell a format
TITLE_CHARS_MAX = 200
_CONTROL_SHARE_MAX = 0.02  # of control characters in a text
_CONVERT = "convert it to text, HTML or PDF, or register a parser for it"
_UNPACK = "unpack it, and ingest what is in it"
_OCR = "run OCR, and ingest the text"
_READ = "text, Markdown, HTML, PDF, JSON and CSV are read"
_MAGIC = (  # the first bytes, what they show, and what to do
    (b"PK\x03\x04", "a ZIP archive, or a format based on ZIP such as .docx, .xlsx, .odt or .epub", _CONVERT),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document (.doc, .xls, .ppt)", _CONVERT),
    (b"\x1f\x8b", "compressed with gzip", _UNPACK),
    *((b"BZh%d1AY&SY" % level, "compressed with bzip2", _UNPACK) for level in range(1, 10)),
    (b"\xfd7zXZ\x00", "compressed with xz", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"\x89PNG", "an image (PNG)", _OCR),
    (b"\xff\xd8\xff", "an image (JPEG)", _OCR),
    (b"GIF87a", "an image (GIF)", _OCR),
    (b"GIF89a", "an image (GIF)", _OCR),
    (b"II*\x00", "an image (TIFF)", _OCR),
    (b"MM\x00*", "an image (TIFF)", _OCR),
    (b"\x7fELF", "a program", _READ),
    (b"SQLite format 3\x00", "an SQLite database", _READ),
    (b"{\\rtf", "an RTF document", _CONVERT),
)
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16's, which it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CHARSET = re.compile(r"""charset\s*=\s*["']?([A-Za-z0-9_.:-]{1,40})""", re.IGNORECASE)
# Python also has codecs that are no encodings of text, or take quadratic time: these names are safe.
_ENCODINGS = re.compile(
    r"(utf-?8|utf-?16(-?[lb]e)?|utf-?32(-?[lb]e)?|us-ascii|ascii|latin-?1|iso-?8859-?\d+|windows-\d+|cp\d+|macintosh"
    r"|koi8-[rut]|shift[_-]jis|euc-(jp|kr)|iso-2022-jp|gb2312|gbk|gb18030|big5(-hkscs)?|tis-620)"
)
_ALLOWED_CONTROLS = bytes(each for each in range(256) if (each >= 32 and each != 127) or each in b"\t\n\v\f\r\b\x1b")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True, slots=True)
class DocumentSource:
    """What is said of a document: its `name` or path, and its `content_type`, each "" if unknown."""

    name: str = ""
    content_type: str = ""

    @property
    def media_type(self) -> str:
        """The content type without its parameters, in lower case."""
        return self.content_type.partition(";")[0].strip().lower()

    @property
    def stem(self) -> str:
        """The name without directories and suffix: a title where the document has none."""
        return clean(PurePath(self.name).stem)[:TITLE_CHARS_MAX].strip()


class DecodedText(NamedTuple):
    """A text whose lines end in a line feed only, and what was wrong with its encoding."""

    text: str
    problems: list[str]


def refuse_binary(head: bytes) -> None:
    """Raises ParseFailed if a document that begins with these bytes is no text."""
    if any(head.startswith(mark) for mark, _ in _BOMS):
        return
    for magic, what, remedy in _MAGIC:
        if head.startswith(magic):
            raise ParseFailed(f"it is {what}: {remedy}")
    if b"\0" in head and not _utf16_without_bom(head):
        raise ParseFailed(f"it is binary (it contains NUL bytes): {_READ}")
    controls = len(head.translate(None, _ALLOWED_CONTROLS))
    if controls > len(head) * _CONTROL_SHARE_MAX + 2 and b"\0" not in head:
        raise ParseFailed(f"it is binary (it contains control characters): {_READ}")


def decode_text(content: bytes, source: DocumentSource, declared: str = "") -> DecodedText:
    """Decode a text: by its byte order mark, by the charset of its content type or the `declared` one, as UTF-8, else
    as Windows-1252. Raises ParseFailed if it is binary, or a drawing.
    """
    head = content[:HEAD]
    refuse_binary(head)
    if b"<svg" in head and (source.media_type == "image/svg+xml" or source.name.lower().endswith(".svg")):
        raise ParseFailed(f"it is an image (SVG): {_CONVERT}")
    text, problems = _decode(content, _charset(source.content_type) or declared.lower())
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return DecodedText(text, problems)


def clean(text: str) -> str:
    """Return the text with a space for each character that no index or database takes. Positions stay."""
    return _CONTROL.sub(" ", text) if _CONTROL.search(text) else text


def charset_in(text: str) -> str:
    """Return the encoding that a text names after "charset=", "" if none or not one of text."""
    return _charset(text)


def _charset(text: str) -> str:
    found = _CHARSET.search(text)
    name = found[1].lower() if found else ""
    return name if _ENCODINGS.fullmatch(name) else ""


def _decode(content: bytes, charset: str) -> tuple[str, list[str]]:
    for mark, encoding in _BOMS:
        if content.startswith(mark):
            text = content[len(mark) :].decode(encoding, "replace")
            return text, _lost(text.count("\ufffd"), encoding)
    if (wide := _utf16_without_bom(content[:HEAD])) is not None:
        return content.decode(wide, "replace"), []
    for encoding in filter(None, (charset, "utf-8")):
        try:
            return content.decode(encoding), []
        except (UnicodeDecodeError, LookupError):
            continue
    text = content.decode("utf-8", "replace")
    lost = text.count("\ufffd")
    wide_characters = len(content) - len(text) + lost  # at least one byte more than characters for each
    if wide_characters > 4 * lost:  # UTF-8 with damage, for instance cut off within a character
        return text, _lost(lost, "UTF-8")
    return content.decode("cp1252", "replace"), []


def _lost(count: int, encoding: str) -> list[str]:
    if not count:
        return []
    characters = "1 character is" if count == 1 else f"{count:,} characters are"
    return [f"{characters} not valid {encoding}, and replaced by \ufffd"]


def _utf16_without_bom(head: bytes) -> str | None:
    """Return the byte order of a text whose every other byte is mostly NUL, as Latin letters in UTF-16 are."""
    half = len(head) // 2
    if half < 4:
        return None
    even, odd = head[0 : 2 * half : 2].count(0), head[1 : 2 * half : 2].count(0)
    if even == 0 and odd > 0.7 * half:
        return "utf-16-le"
    if odd == 0 and even > 0.7 * half:
        return "utf-16-be"
    return None
