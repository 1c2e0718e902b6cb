"""What travels between a parse pool and its child processes: frames of CBOR on a socket. Nothing is unpickled.

A frame is its length in 4 bytes, big-endian, and a list whose first item is the verb. To the child:

- ``["read", as, name, content type, size, cpu_s, chunks_max]``, `as` being "chunks" or "sections". `size` bytes follow,
  the document; -1: an open file is sent along instead.

From the child: "ready" once, or "unable" with the reason why it serves nobody. For each document any number of "rows",
lists of the fields of chunks or sections, then one of

- ``["done", title, problems, kept]`` or ``["failed", reason, kept]``, `kept` being the child's memory in bytes
- ``["unable", reason]``: a package is missing
"""

from __future__ import annotations

from typing import Any, Final

import cbor2

LENGTH: Final = 4
ROWS: Final = 500  # in a frame


def encode_frame(items: list[Any]) -> bytes:
    """Return the frame of a list of plain data."""
    body = cbor2.dumps(items)
    return len(body).to_bytes(LENGTH, "big") + body
