"""Server-sent events are the same, however they come."""

from __future__ import annotations

import time

import pytest

from aiqueue.gateway.event_parser import EventParser


def parse(*parts: bytes) -> list[bytes]:
    parser = EventParser()
    found = [event for part in parts for event in parser.feed(part)]
    return [*found, *parser.rest()]


@pytest.mark.parametrize(
    ("body", "events"),
    [
        (b"data: a\n\n", [b"a"]),
        (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data: a\ndata: b\n\ndata: c\n\n", [b"a\nb", b"c"]),
        (b"data: a\n\n\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data: a\n\n: ping\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
        (b"data:a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"id: 1\nevent: x\ndata: a\nid: 2\n\n", [b"a"]),
        (b"data: data: a\n\n", [b"data: a"]),
        (b"data: a\n\ndata: b", [b"a"]),
        (b"data: a\n\ndata: b\n", [b"a", b"b"]),
        (b"data: a\n\nnothing\n\n", [b"a"]),
    ],
)
def test_events_are_the_same_in_any_parts(body: bytes, events: list[bytes]) -> None:
    assert parse(body) == events
    assert parse(*(body[at : at + 1] for at in range(len(body)))) == events
    for at in range(len(body)):
        assert parse(body[:at], body[at:]) == events


def test_what_is_kept_of_an_event_that_is_not_whole_is_counted() -> None:
    parser = EventParser()
    assert parser.feed(b"data: abc\ndata: de") == []
    assert parser.kept == len(b"data: abc\ndata: de")
    assert parser.feed(b"\n\n") == [b"abc\nde"]
    assert parser.kept == 0


def test_lines_without_data_count_as_what_is_kept_of_their_event() -> None:
    parser = EventParser()
    assert parser.feed(b"data:\n" * 1_000) == []
    assert parser.kept == 6_000


def test_an_event_of_megabytes_in_thousands_of_parts_costs_no_copy_a_part() -> None:
    parser, part, started = EventParser(), b"x" * 1024, time.process_time()
    assert parser.feed(b"data: ") == []
    for _ in range(4_096):
        assert parser.feed(part) == []
        assert parser.kept
    assert parser.feed(b"\n\n") == [part * 4_096]
    assert time.process_time() - started < 1
