"""The short way through nats-py's parser takes what nats-py's own would have taken."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.errors import ProtocolError
from nats.protocol.parser import Parser

from aiqueue.connection import parsing
from aiqueue.connection.parsing import FastParser

Parsed = tuple[Any, ...]


class RecordingClient:
    """What a parser says of what it reads, in order."""

    def __init__(self) -> None:
        self.parsed: list[Parsed] = []

    def take(self, *message: Any) -> None:
        self.parsed.append(message)

    async def _process_msg(self, *message: Any) -> None:
        self.parsed.append(message)

    async def _process_ping(self) -> None:
        self.parsed.append(("PING",))

    async def _process_pong(self) -> None:
        self.parsed.append(("PONG",))

    async def _process_err(self, error: str) -> None:
        self.parsed.append((error,))

    async def _process_info(self, info: dict[str, Any]) -> None:
        self.parsed.append((info["server_id"],))


words = st.text("abc.$_-", min_size=1, max_size=12).map(str.encode)
bodies = st.one_of(st.binary(max_size=40), st.sampled_from([b"", b"\r\n", b"MSG a 1 3\r\nabc\r\n", b"PING\r\n"]))


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    subject, sid, body = draw(words), draw(st.integers(0, 99)), draw(bodies)
    reply = draw(st.one_of(st.just(b""), words.map(lambda each: each + b" ")))
    if draw(st.booleans()):
        return b"MSG %b %d %b%d\r\n%b\r\n" % (subject, sid, reply, len(body), body)
    block = (
        b"NATS/1.0\r\n" + b"".join(b"%b: %b\r\n" % (each, each) for each in draw(st.lists(words, max_size=3))) + b"\r\n"
    )
    return b"HMSG %b %d %b%d %d\r\n%b%b\r\n" % (subject, sid, reply, len(block), len(block) + len(body), block, body)


others = st.sampled_from([b"PING\r\n", b"PONG\r\n", b"+OK\r\n", b"-ERR 'Slow'\r\n", b'INFO {"server_id":"x"}\r\n'])
traffic = st.lists(st.one_of(messages(), others), max_size=12).map(b"".join)


def read(parser: Parser, data: bytes, cuts: list[int]) -> None:
    async def feed() -> None:
        for part in parts(data, cuts):
            await parser.parse(part)

    asyncio.run(feed())


def parts(data: bytes, cuts: list[int]) -> list[bytes]:
    offsets = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(offsets)]


def read_as_fed(parser: FastParser, data: bytes, cuts: list[int], buffered: int) -> None:
    """Have the parts fed as a socket's protocol does, and what `feed` returns read by a loop as nats-py's.

    The first `buffered` parts have come before the parser was told of the socket.
    """

    async def run() -> None:
        reader = asyncio.StreamReader()
        all_parts = parts(data, cuts)
        for part in all_parts[:buffered]:
            reader.feed_data(part)
        parser.start(len(reader._buffer))  # type: ignore[attr-defined]

        async def loop() -> None:
            while read := await reader.read(50):
                await parser.parse(read)

        reading = asyncio.create_task(loop())
        for number, part in enumerate(all_parts[buffered:]):
            reader.feed_data(parser.feed(part))
            for _ in range(number % 3):
                await asyncio.sleep(0)
        reader.feed_eof()
        await reading

    asyncio.run(run())


def ours(data: bytes, cuts: list[int]) -> list[Parsed]:
    client = RecordingClient()
    read(FastParser(client, client.take), data, cuts)
    return client.parsed


def theirs(data: bytes) -> list[Parsed]:
    client = RecordingClient()
    read(Parser(client), data, [])
    return client.parsed


@given(traffic, st.lists(st.integers(0, 2_000), max_size=8))
def test_however_the_reads_fall_the_same_is_told_as_by_nats_pys_own_parser(data: bytes, cuts: list[int]) -> None:
    assert ours(data, cuts) == theirs(data)


@given(traffic, st.lists(st.integers(0, 2_000), max_size=8), st.integers(0, 3))
def test_what_the_protocol_feeds_is_told_in_the_same_order(data: bytes, cuts: list[int], buffered: int) -> None:
    client = RecordingClient()
    read_as_fed(FastParser(client, client.take), data, cuts, buffered)
    assert client.parsed == theirs(data)


@given(messages(), messages())
def test_a_read_of_one_byte_at_a_time_tells_the_same(first: bytes, second: bytes) -> None:
    data = first + b"PING\r\n" + second
    assert ours(data, list(range(len(data)))) == theirs(data)


@pytest.mark.parametrize("size", [0, 1, 131_072, 131_073, 1_000_000])
def test_a_message_of_any_size_comes_whole_and_so_do_those_around_it(size: int) -> None:
    small = b"MSG a 1 3\r\nabc\r\n"
    data = small + b"HMSG b 2 r 12 %d\r\nNATS/1.0\r\n\r\n%b\r\n" % (12 + size, b"x" * size) + small + small[:-4]
    parsed = ours(data, list(range(0, len(data), 32_768)))
    assert parsed == theirs(data)
    assert [len(each[3]) for each in parsed] == [3, size, 3]


@pytest.mark.parametrize(
    "line",
    [b"MSG a 1 x", b"MSG a x 1", b"MSG a 1 -5", b"HMSG a 1 9 5", b"HMSG a 1 -3 5", b"MSG a", b"NONSENSE"],
)
def test_what_is_no_line_of_the_protocol_is_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        ours(line + b"\r\nabcdefgh\r\n" * 20, [])


def test_a_line_longer_than_the_servers_own_limit_is_read_all_the_same() -> None:
    line = b'INFO {"server_id":"x","connect_urls":["%b"]}\r\n' % (b"u" * 3 * parsing.LINE_MAX)
    data = line + b"MSG a 1 3\r\nabc\r\n" + line
    assert ours(data, list(range(0, len(data), 100))) == theirs(data) == [("x",), (1, b"a", b"", b"abc", None), ("x",)]


def test_a_reset_forgets_the_part_of_a_message_that_has_come() -> None:
    client = RecordingClient()
    parser = FastParser(client, client.take)
    read(parser, b"MSG a 1 10\r\nabc", [])
    parser.reset()
    read(parser, b"MSG b 1 3\r\nxyz\r\n", [])
    assert client.parsed == [(1, b"b", b"", b"xyz", None)]
