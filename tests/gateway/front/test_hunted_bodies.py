"""Bodies of requests that are refused: whoever sends one reads why, and one without an end is not read for ever."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from aiqueue.gateway.front import bodies

from .fronts import RunningFront, Tokens, bearer

MIB = 1024 * 1024


async def talk(front: RunningFront, head: str, *parts: bytes, closes: bool = True) -> tuple[bytes, int]:
    """Send a request, whose body is these parts, and return the answer, up to the end of the connection, and how many
    bytes of the body could be sent.
    """
    host, port = front.root.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    sent = 0
    try:
        writer.write(f"{head}\r\nHost: a\r\n{'Connection: close' if closes else 'A: b'}\r\n\r\n".encode())
        async with asyncio.timeout(10):
            try:
                for part in parts:
                    writer.write(part)
                    await writer.drain()
                    sent += len(part)
                return await reader.read(), sent
            except ConnectionError:
                return b"", sent
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("head", "is_known", "status"),
    [
        ("POST /v1/chat/completions HTTP/1.1", False, 401),
        ("POST /v1/none HTTP/1.1", True, 404),
        ("PUT /v1/chat/completions HTTP/1.1", True, 405),
        ("POST /v1/chat/completions HTTP/1.1\r\nContent-Encoding: gzip", True, 415),
        ("POST /v1/files HTTP/1.1\r\nContent-Type: text/plain", True, 415),
        ("POST /v1/chat/completions HTTP/1.1", True, 413),
    ],
)
async def test_who_sends_a_body_that_is_refused_reads_why_before_the_connection_closes(
    front: RunningFront, tokens: Tokens, head: str, is_known: bool, status: int
) -> None:
    size = (25 if status == 413 else 5) * MIB
    head += f"\r\nContent-Length: {size}" + (f"\r\nAuthorization: Bearer {tokens.mine}" if is_known else "")
    answer, sent = await talk(front, head, *[b"a" * MIB] * (size // MIB))
    assert (answer.partition(b"\r\n")[0].split()[1], sent) == (str(status).encode(), size)
    assert b'{"error":{"message":' in answer


async def test_a_body_without_an_end_is_cut_off_by_whoever_has_no_key(
    front: RunningFront, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "DROPPED_MAX", 2 * MIB)
    monkeypatch.setattr(bodies, "STALLED_S", 0.2)
    head = "POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked"
    chunk = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
    _, sent = await talk(front, head, *[chunk] * 1_000, closes=False)
    assert sent < 20 * MIB
    answer, _ = await talk(front, head, chunk, closes=False)  # and stalls
    assert answer.startswith(b"HTTP/1.1 401 ")


async def test_a_form_in_a_charset_that_decodes_nothing_is_400(
    front: RunningFront, http: aiohttp.ClientSession, tokens: Tokens
) -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n'
    for charset in ("undefined", "utf-16", "hex", "none"):
        headers = bearer(tokens.mine, content_type=f"multipart/form-data; charset={charset}; boundary=b")
        async with http.post(f"{front.url}/files", data=form, headers=headers) as response:
            assert (response.status, set(await response.json())) == (400, {"error"}), charset
