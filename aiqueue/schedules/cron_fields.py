"""The fields of a cron line, parsed and checked. A wrong line is explained: the field, the part, what to write."""

from __future__ import annotations

import re
from typing import Any, NamedTuple, NoReturn

from ..errors import BadInput
from ..units import shown

LINE_CHARS_MAX = 256
MACROS = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_DAYS_MAX = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_ITEM = re.compile(r"(?:(\*)|([0-9A-Za-z]+)(?:-([0-9A-Za-z]+))?)(?:/([0-9]+))?", re.ASCII)
_LAST_OR_NEAREST = re.compile(r"[0-9]*(L|W|LW)|L-[0-9]+", re.IGNORECASE | re.ASCII)
_FORM = "a value, a range such as 1-5, a list such as 1,3, or a step such as */2 or 1-9/2"


class Field(NamedTuple):
    """What may stand in a field. `names`: texts for the numbers from `low` on."""

    name: str
    low: int
    high: int
    names: tuple[str, ...] = ()


_MINUTE_ON = (
    Field("minute", 0, 59),
    Field("hour", 0, 23),
    Field("day of month", 1, 31),
    Field("month", 1, 12, MONTHS),
    Field("day of week", 0, 7, WEEKDAYS),
)
_FIELDS = (Field("second", 0, 59), *_MINUTE_ON)


class CronFields(NamedTuple):
    """The values of each field, sorted. `weekdays`: 0 is Sunday. `either`: a day matches by its date or its weekday."""

    seconds: tuple[int, ...]
    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days: tuple[int, ...]
    months: tuple[int, ...]
    weekdays: tuple[int, ...]
    either: bool


def parse_line(line: Any) -> tuple[str, CronFields]:
    """Return a cron line with single spaces, and its fields. Raises BadInput."""
    if not isinstance(line, str):
        raise BadInput(f'a cron line is a text such as "0 6 * * mon-fri", not {shown(line)}')
    if len(line) > LINE_CHARS_MAX:
        raise BadInput(f"a cron line has at most {LINE_CHARS_MAX} characters, not {len(line):,}: use more schedules")
    line = " ".join(line.split())
    parts = MACROS.get(line.lower(), line).split()
    if line.startswith("@") and line.lower() not in MACROS:
        _refuse_macro(line)
    if parts and "TZ=" in parts[0].upper():
        raise BadInput(f"cron line {shown(line)}: give the time zone as tz, and the fields alone as the line")
    if len(parts) not in (5, 6):
        _refuse_count(line, parts)
    fields = _FIELDS if len(parts) == 6 else _MINUTE_ON
    values = [_parse_field(line, field, part) for field, part in zip(fields, parts, strict=True)]
    seconds, minutes, hours, days, months, weekdays = values if len(values) == 6 else [(0,), *values]
    weekdays = tuple(sorted({each % 7 for each in weekdays}))
    # As cron: a field that begins with a star restricts nothing by itself, so both must match then
    either = not parts[-3].startswith("*") and not parts[-1].startswith("*")
    if not either and not has_date(days, months):
        raise BadInput(
            f"cron line {shown(line)} never fires: no month in its month field {shown(parts[-2])} has a day {days[0]}; "
            "for the last day of a month use Calendar (--months)"
        )
    return line, CronFields(seconds, minutes, hours, days, months, weekdays, either)


def has_date(days: tuple[int, ...], months: tuple[int, ...]) -> bool:
    """Whether any year has one of these days in one of these months."""
    return days[0] <= max(_DAYS_MAX[each - 1] for each in months)


def _parse_field(line: str, field: Field, part: str) -> tuple[int, ...]:
    return tuple(sorted({value for item in part.split(",") for value in _parse_item(line, field, item)}))


def _parse_item(line: str, field: Field, item: str) -> range:
    match = _ITEM.fullmatch(item)
    if not match or _LAST_OR_NEAREST.fullmatch(item):
        _refuse_item(line, field, item)
    star, first, last, stepped = match.groups()
    highest = 6 if field.names is WEEKDAYS else field.high
    if star:
        low, high = field.low, highest
    else:
        low = _parse_value(line, field, item, first)
        high = low if last is None else _parse_value(line, field, item, last)
        if field.names is WEEKDAYS and low == 7 and (stepped if last is None else high < 7):
            low, first = 0, "0"  # 7 is Sunday, as 0 is
        if last is not None and high == 0 and last.lower() == "sun" and low > 0:
            high = 7
        if high < low:
            upper, lower = f"{first}-{_name(field, highest, first)}", f"{_name(field, field.low, first)}-{last}"
            _refuse(line, field, item, f"runs backwards: write {upper},{lower}")
        if stepped and last is None:
            _refuse(
                line, field, item, f"has a step and no range: write {first}-{_name(field, highest, first)}/{stepped}"
            )
    step = int(stepped[:9]) if stepped else 1
    if not 1 <= step <= field.high - field.low:
        longer = ": for longer steps use Every (--every)" if step else ""
        _refuse(line, field, item, f"has a step that is not 1 to {field.high - field.low}{longer}")
    return range(low, high + 1, step)


def _parse_value(line: str, field: Field, item: str, value: str) -> int:
    if value.lower() in field.names:
        return field.names.index(value.lower()) + field.low
    if not value.isdigit():
        names = f"{field.names[0]} to {field.names[-1]}" if field.names else f"{field.low} to {field.high}"
        _refuse(line, field, item, f"is not {names}" if value == item else f"has {shown(value)}, which is not {names}")
    if len(value) > 4 or not field.low <= int(value) <= field.high:
        _refuse(line, field, item, f"is not {field.low} to {field.high}")
    return int(value)


def _name(field: Field, value: int, like: str) -> str:
    """Write a value as `like` is written, by name or by number."""
    return str(value) if like.isdigit() else field.names[value - field.low]


def _refuse_item(line: str, field: Field, item: str) -> NoReturn:
    if not item:
        _refuse(line, field, item, "is empty: a comma too many?")
    if "?" in item:
        _refuse(line, field, item, "has a ?: write *")
    if "#" in item:
        _refuse(line, field, item, "has a #, which is not supported: fire on each such weekday and check the date")
    if "W" in item.upper() and _LAST_OR_NEAREST.fullmatch(item):
        _refuse(line, field, item, "has a W, which is not supported: use mon-fri, and check the date")
    if _LAST_OR_NEAREST.fullmatch(item) and field.names is WEEKDAYS:
        _refuse(line, field, item, "has an L, which is not supported: fire on each such weekday and check the date")
    if _LAST_OR_NEAREST.fullmatch(item):
        advice = 'use Calendar(months=1, starting="2026-01-31") (--months 1 --starting 2026-01-31)'
        _refuse(line, field, item, f"has an L, which is not supported: {advice}")
    if "~" in item:
        _refuse(line, field, item, "has a ~, which is not supported: use jitter")
    _refuse(line, field, item, f"is not {_FORM}")


def _refuse_macro(line: str) -> NoReturn:
    if line.lower().startswith("@every"):
        raise BadInput(f'cron line {shown(line)}: for a fixed interval use Every, such as Every("90s") (--every 90s)')
    if line.lower() == "@reboot":
        raise BadInput("cron line '@reboot': a schedule knows no start of a host: enqueue the job at its start")
    raise BadInput(f"cron line {shown(line)}: the names are {', '.join(sorted(MACROS))}")


def _refuse_count(line: str, parts: list[str]) -> NoReturn:
    if not parts:
        raise BadInput('the cron line is empty: write five fields, such as "0 6 * * mon-fri"')
    more = ": there is no field for years, use start and end" if len(parts) == 7 else ""
    raise BadInput(
        f"cron line {shown(line)} has {len(parts)} field{'s' * (len(parts) > 1)}, not 5 (minute, hour, day of month, "
        f"month, day of week) or 6 (second before them){more}"
    )


def _refuse(line: str, field: Field, item: str, what: str) -> NoReturn:
    raise BadInput(f"cron line {shown(line)}: {field.name} {shown(item)} {what}")
