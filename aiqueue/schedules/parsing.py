"""From what callers pass to the values of schedules: when one fires, and the message of its jobs."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NamedTuple

from ..errors import BadInput
from ..job import Message, make_child_spec
from ..units import Duration, Time, shown
from .cron import Cron
from .every import Every
from .recurrence import Recurrence

When = Recurrence | Duration  # a Recurrence, a cron line, or an interval: "90s", seconds, a timedelta
_EXAMPLES = 'a cron line such as "0 6 * * mon-fri", an interval such as "90s", a Calendar or a Once'


def parse_recurrence(
    when: When,
    *,
    tz: str | None = None,
    jitter: Duration | None = None,
    start: Time | None = None,
    end: Time | None = None,
) -> Recurrence:
    """Return when a schedule fires: a text with spaces or a leading ``@`` is a cron line, any other one an interval.

    `tz` (None: UTC) is of a cron line. The other arguments are those of `Recurrence`. Raises BadInput.
    """
    bounds: dict[str, Any] = {"jitter": jitter, "start": start, "end": end}
    bounds = {name: value for name, value in bounds.items() if value is not None}
    if isinstance(when, Recurrence):
        given = [*(["tz"] if tz is not None else []), *bounds]
        if given:
            raise BadInput(f"give {' and '.join(given)} to the {type(when).__name__} itself")
        return when
    if isinstance(when, str) and (when.startswith("@") or len(when.split()) > 1):
        return Cron(when, tz="UTC" if tz is None else tz, **bounds)
    if isinstance(when, bool) or not isinstance(when, str | int | float | timedelta):
        raise BadInput(f"a schedule needs {_EXAMPLES}, not {shown(when)}")
    if tz is not None:
        raise BadInput("an interval has no time zone: leave tz out, or use a cron line or a Calendar")
    if isinstance(when, str) and not when[:1].isdigit():
        raise BadInput(f"a schedule needs {_EXAMPLES}, not {shown(when)}")
    return Every(when, **bounds)


class StoredMessage(NamedTuple):
    """The message of a schedule as the fields of a ScheduleSpec. `body` None: made by a function."""

    family: str
    kind: str
    body: bytes | None
    secrets: str


def encode_stored(message: Message, headers: Mapping[str, str] | None = None) -> StoredMessage:
    """Return a message as a schedule stores it. Raises BadInput (EncodeError): it is none, or it refers to documents,
    which are deleted before the schedule has ended.
    """
    spec = make_child_spec("tick", message, headers=headers)
    if spec.documents:
        raise BadInput("the message of a schedule cannot refer to documents: store one in a function of the tick")
    return StoredMessage(spec.family, spec.kind, spec.body, next(iter(spec.secrets.values()), ""))
