"""Durations and sizes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiqueue.errors import BadInput
from aiqueue.units import (
    MAX_S,
    flag,
    parse_deadline,
    parse_duration,
    parse_time,
    real_number,
    seconds,
    short_duration,
    short_size,
    size_bytes,
    text,
    texts,
    whole_number,
)


@pytest.mark.parametrize(
    ("given", "expected"),
    [("250ms", 0.25), ("30s", 30), ("2m", 120), ("1h", 3600), ("7d", 604800), ("1h30m", 5400), ("1.5s", 1.5),
     ("1h 30m", 5400), (0, 0), (2, 2), (0.5, 0.5), (" 5 s ", 5)],
)  # fmt: skip
def test_durations_are_read_as_people_write_them(given: str | float, expected: float) -> None:
    assert seconds(given) == pytest.approx(expected)


@pytest.mark.parametrize(
    "given",
    ["", "5", "s", "-5s", "5 parsecs", "5s!", "1e9d", "1h,5m", "inf", "nan", -1, float("nan"), float("inf"), True, None,
     [], b"5s", 10**400, [10**5_000], "9" * 400 + "s", "1000000d"],
)  # fmt: skip
def test_anything_else_is_no_duration(given: object) -> None:
    with pytest.raises(ValueError, match="is not a duration such as"):
        seconds(given)  # type: ignore[arg-type]


@given(st.timedeltas(min_value=timedelta(), max_value=timedelta(days=36_500)))
def test_a_timedelta_is_a_duration(given: timedelta) -> None:
    assert parse_duration("delay", given) == given.total_seconds()


def test_a_datetime_is_no_duration_and_a_negative_timedelta_neither() -> None:
    with pytest.raises(BadInput, match=r"timeout: 2030-01-01T00:00:00\+00:00 is a time and not a duration"):
        parse_duration("timeout", datetime(2030, 1, 1, tzinfo=UTC))  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="delay"):
        parse_duration("delay", timedelta(seconds=-1))


@pytest.mark.parametrize("zone", [UTC, timezone(timedelta(hours=5, minutes=30))])
def test_a_time_is_a_datetime_with_a_zone_or_seconds_since_the_epoch(zone: timezone) -> None:
    at = datetime(2030, 1, 2, 3, 4, 5, 678_900, tzinfo=zone)
    assert parse_time("at", at) == at.timestamp()
    assert parse_time("at", at.timestamp()) == at.timestamp()
    assert parse_deadline("deadline", at, 0.0) == at.timestamp()
    assert parse_deadline("deadline", timedelta(minutes=2), 1_000.0) == 1_120.0
    assert parse_deadline("deadline", "2m", 1_000.0) == 1_120.0


def test_a_time_without_a_zone_is_refused_and_says_what_to_pass() -> None:
    naive = datetime(2030, 1, 2)  # noqa: DTZ001  (what is refused)
    for parse in (parse_time, lambda name, value: parse_deadline(name, value, 0.0)):
        with pytest.raises(BadInput, match=r"expires: 2030-01-02T00:00:00 has no time zone: use datetime\.now\(UTC\)"):
            parse("expires", naive)
    for wrong in (True, "tomorrow", None, float("nan"), timedelta(1)):
        with pytest.raises(BadInput, match="at must be a datetime with a time zone"):
            parse_time("at", wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [10**400, -(10**400), 10**5_000, [10**5_000]], ids=["400", "-400", "5000", "list"])
def test_a_number_of_any_size_is_refused_in_one_short_line_that_names_the_argument(wrong: Any) -> None:
    for parse in (
        parse_time, parse_duration, flag, text, texts, lambda name, value: real_number(name, value, 0, 1),
        lambda name, value: whole_number(name, value, 0, 1), lambda name, value: parse_deadline(name, value, 0.0),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=r"^(each of )?limit") as refused:
            parse("limit", wrong)
        assert len(str(refused.value)) < 200


@given(st.text(max_size=20) | st.floats() | st.integers())
def test_a_duration_is_a_finite_number_or_an_error(given: str | float) -> None:
    try:
        found = seconds(given)
    except ValueError:
        return
    assert 0 <= found <= MAX_S


@pytest.mark.parametrize(
    ("given", "expected"),
    [("512KiB", 524288), ("1GiB", 2**30), ("10MB", 10**7), ("1.5KiB", 1536), (7, 7), ("0B", 0), (-1, -1)],
)
def test_sizes_are_read_as_people_write_them(given: str | int, expected: int) -> None:
    assert size_bytes(given) == expected


@pytest.mark.parametrize("given", ["", "5", "KiB", "-1KiB", "5kib", "1e3B", "1 GiB extra", True, None, 1.5, [], b"1B"])
def test_anything_else_is_no_size(given: object) -> None:
    with pytest.raises(ValueError, match="is not a size such as"):
        size_bytes(given)  # type: ignore[arg-type]


@given(st.integers(0, 2**63))
def test_a_size_in_bytes_is_exact(count: int) -> None:
    assert size_bytes(f"{count}B") == count


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0ms"), (0.25, "250ms"), (0.9999, "1s"), (4.2, "4.2s"), (10, "10s"), (59.99, "1m"), (60, "1m"), (190, "3m10s"),
     (7500, "2h5m"), (3600, "1h"), (86400 * 6 + 3600 * 4, "6d4h")],
)  # fmt: skip
def test_a_duration_is_shown_short(value: float, shown: str) -> None:
    assert short_duration(value) == shown


@given(st.floats(0, 10**9))
def test_a_shown_duration_can_be_read_again_and_is_near(value: float) -> None:
    again = seconds(short_duration(value))
    assert again == pytest.approx(value, rel=0.05, abs=0.0006)


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0 B"), (512, "512 B"), (3500, "3.4 KiB"), (2**30, "1.0 GiB"), (2**41, "2.0 TiB")]
)
def test_a_size_is_shown_short(value: int, shown: str) -> None:
    assert short_size(value) == shown
