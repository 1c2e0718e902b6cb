"""PDF files, written by hand: small, and of any kind that a test needs."""

from __future__ import annotations

import hashlib
import zlib

_PAD = bytes.fromhex("28BF4E5E4E758A4164004E56FFFA01082E2E00B6D0683E802F0CA9FE6453697A")


def pdf(*pages: str, title: str = "", outline: tuple[tuple[str, int], ...] = ()) -> bytes:
    """A PDF with a line of text on each page. `outline`: titles, and the page of each from 0."""
    first = 6
    objects = {3: b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>", 4: b"<< /Title (%s) >>" % title.encode()}
    kids = []
    for number, text in enumerate(pages):
        page, content = first + 2 * number, first + 2 * number + 1
        kids.append(f"{page} 0 R")
        objects[page] = (
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {content} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>"
        ).encode()
        objects[content] = stream(f"BT /F1 12 Tf 40 700 Td ({text}) Tj ET".encode() if text else b"")
    objects[2] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(pages)} >>".encode()
    marks = first + 2 * len(pages)
    for number, (name, page) in enumerate(outline):
        following = f"/Next {marks + number + 1} 0 R " if number + 1 < len(outline) else ""
        target = f"/Dest [{first + 2 * page} 0 R /Fit]"
        objects[marks + number] = f"<< /Title ({name}) /Parent 5 0 R {following}{target} >>".encode()
    if outline:
        last = marks + len(outline) - 1
        objects[5] = f"<< /Type /Outlines /First {marks} 0 R /Last {last} 0 R /Count {len(outline)} >>".encode()
    objects[1] = b"<< /Type /Catalog /Pages 2 0 R%s >>" % (b" /Outlines 5 0 R" if outline else b"")
    return assemble(objects, b"/Info 4 0 R")


def image_only_pdf() -> bytes:
    """A scan: one page that only shows an image."""
    image = (
        b"<< /Type /XObject /Subtype /Image /Width 1 /Height 1 /ColorSpace /DeviceGray /BitsPerComponent 8 /Length 1 >>"
    )
    return assemble({
        1: b"<< /Type /Catalog /Pages 2 0 R >>",
        2: b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        3: b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /XObject << /I 5 0 R >> >> >>",
        4: stream(b"q 600 0 0 700 0 0 cm /I Do Q"),
        5: image + b"\nstream\n\x80\nendstream",
    })  # fmt: skip


def encrypted_pdf(password: bytes = b"secret") -> bytes:
    """A PDF that needs a password: RC4 with 40 bits, as PDF 1.1 has it. Its content is not even encrypted."""
    identity, permissions = b"0123456789abcdef", -4
    padded = (password + _PAD)[:32]
    owner = _rc4(hashlib.md5(padded).digest()[:5], padded)
    key = hashlib.md5(padded + owner + permissions.to_bytes(4, "little", signed=True) + identity).digest()[:5]
    user = _rc4(key, _PAD)
    objects = {
        1: b"<< /Type /Catalog /Pages 2 0 R >>",
        2: b"<< /Type /Pages /Kids [] /Count 0 >>",
        3: b"<< /Filter /Standard /V 1 /R 2 /O <%s> /U <%s> /P %d >>"
        % (owner.hex().encode(), user.hex().encode(), permissions),
    }  # fmt: skip
    return assemble(objects, b"/Encrypt 3 0 R /ID [<%s> <%s>]" % ((identity.hex().encode(),) * 2))


def bomb_pdf(size: int) -> bytes:
    """A PDF whose one page is `size` bytes of drawing commands when decompressed twice, and a few KB on disk."""
    outer = zlib.compress(_compress_repeated(b"0 0 m 1 1 l S\n" * 5_000, size // 70_000), 9)
    head = b"<< /Filter [/FlateDecode /FlateDecode] /Length %d >>" % len(outer)
    return assemble({
        1: b"<< /Type /Catalog /Pages 2 0 R >>",
        2: b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        3: b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R >>",
        4: head + b"\nstream\n" + outer + b"\nendstream",
    })  # fmt: skip


def stream(content: bytes) -> bytes:
    return b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content)


def assemble(objects: dict[int, bytes], trailer: bytes = b"") -> bytes:
    """A file with these objects, of which 1 is the catalog."""
    out, places = bytearray(b"%PDF-1.4\n"), {}
    for number, body in sorted(objects.items()):
        places[number] = len(out)
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    size, start = max(objects) + 1, len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % size
    for number in range(1, size):
        out += b"%010d 00000 n \n" % places[number] if number in places else b"0000000000 65535 f \n"
    out += b"trailer\n<< /Size %d /Root 1 0 R %s >>\nstartxref\n%d\n%%%%EOF\n" % (size, trailer, start)
    return bytes(out)


def _compress_repeated(data: bytes, times: int) -> bytes:
    """`data` so many times, compressed: its compressed form so many times, which takes no time."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = packer.compress(data) + packer.flush(zlib.Z_FULL_FLUSH)  # each block can be read without those before
    return b"\x78\xda" + block * times + packer.flush()  # readers of PDF do not miss the checksum


def _rc4(key: bytes, data: bytes) -> bytes:
    state, at = list(range(256)), 0
    for each in range(256):
        at = (at + state[each] + key[each % len(key)]) % 256
        state[each], state[at] = state[at], state[each]
    out, left, right = bytearray(), 0, 0
    for byte in data:
        left = (left + 1) % 256
        right = (right + state[left]) % 256
        state[left], state[right] = state[right], state[left]
        out.append(byte ^ state[(state[left] + state[right]) % 256])
    return bytes(out)
