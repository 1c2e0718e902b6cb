"""Heads of requests that are more than HTTP's plain ones."""

from __future__ import annotations

import asyncio
import json

from .fronts import RunningFront, Tokens, chat_body

OFFERS = "Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n{}: h2c\r\n"
BODY = json.dumps(chat_body("a b", max_tokens=2)).encode()


async def ask(front: RunningFront, tokens: Tokens, head: str, *, cut: bytes = b"") -> list[bytes]:
    """Send the same request twice over one connection, and return its answers."""
    host, port = front.root.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    text = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {tokens.mine}\r\n{head}"
    sent = f"{text}Content-Length: {len(BODY)}\r\n\r\n".encode()
    first, second = sent[: sent.find(cut) + len(cut)], sent[sent.find(cut) + len(cut) :]
    answers = []
    try:
        async with asyncio.timeout(5):
            for _ in range(2):
                for part in (first, second, BODY) if cut else (sent, BODY):
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0.02)  # pieces of their own
                found = await reader.readuntil(b"\r\n\r\n")
                size = int(found.lower().partition(b"content-length:")[2].split()[0])
                answers.append(found.split(b" ", 2)[1] + b" " + await reader.readexactly(size))
                if b"connection: close" in found.lower():
                    break
    finally:
        writer.close()
    return answers


async def test_a_client_that_offers_another_protocol_is_answered_as_any_other(
    served: RunningFront, tokens: Tokens
) -> None:
    for name in ("Upgrade", "upgrade", "UPGRADE"):
        answers = await ask(served, tokens, OFFERS.format(name))
        assert [each[:4] for each in answers] == [b"200 ", b"200 "]
        assert all(b'"content":"a b"' in each for each in answers)


async def test_an_offer_that_comes_in_pieces_is_refused_and_does_not_stand_for_a_body(
    served: RunningFront, tokens: Tokens
) -> None:
    (answer,) = await ask(served, tokens, OFFERS.format("Upgrade"), cut=b"\r\nUpgr")
    assert answer.startswith(b"400 ")
    assert json.loads(answer[4:])["error"]["message"] == "the header Upgrade is not supported: leave it out"


async def test_a_body_that_is_no_http_is_answered_with_400(served: RunningFront, tokens: Tokens) -> None:
    host, port = served.root.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {tokens.mine}\r\n"
    writer.write(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
    await writer.drain()
    await asyncio.sleep(0.02)
    writer.write(b"zz\r\n")
    async with asyncio.timeout(5):
        answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1") == 1
