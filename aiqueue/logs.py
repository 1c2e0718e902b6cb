"""Log records of jobs: which job a record is of, and its line as text or JSON.

The library itself sets up no logging. ``aiqueue work`` does with `set_up`, and a service with its own logging takes
`JobFilter` and `JsonFormatter`.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Literal, Protocol

from . import headers, subjects

LogFormat = Literal["text", "json"]
FIELDS = ("job_id", "tenant", "kind", "attempt", "parent")
_OF_RECORDS = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", *FIELDS})
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_TEXT_WITH_PROCESS = "%(asctime)s %(levelname)s [%(process)d] %(name)s: %(message)s"


class LoggedJob(Protocol):
    """A job or mail whose handler runs."""

    @property
    def id(self) -> str: ...
    @property
    def tenant(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def attempt(self) -> int: ...
    @property
    def headers(self) -> Mapping[str, str]: ...


running_job: ContextVar[LoggedJob | None] = ContextVar("aiqueue running job", default=None)
"""The job or mail in whose handler, or in what that handler has started, the code runs. Workers and agents set it."""


class JobFilter(logging.Filter):
    """Gives each record the attributes `job_id`, `tenant`, `kind`, `attempt` and `parent` of the job that logs it.

    Add one to each handler, not to a logger: ``handler.addFilter(JobFilter())``. `job_id` is the id of a mail in the
    handler of an agent. `parent` is the id of the job that has enqueued this one. Outside of handlers all are None, so
    that a format may name them: ``"%(message)s job=%(job_id)s"``. Attributes that a record has already (`extra`) stay.
    It lets every record pass.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        job = running_job.get()
        values = (None,) * len(FIELDS) if job is None else (job.id, job.tenant, job.kind, job.attempt, _parent_of(job))
        for name, value in zip(FIELDS, values, strict=True):
            if getattr(record, name, None) is None:
                setattr(record, name, value)
        return True


class TextFormatter(logging.Formatter):
    """A line of text, and the job at its end: ``… INFO app: fetched job=cd1f tenant=acme kind=page attempt=1``.

    A record that names the job's id itself gets no more.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        """Return the line, with the job at its end if there is one."""
        line = super().formatMessage(record)
        job_id = getattr(record, "job_id", None)
        if job_id is None or str(job_id) in record.message:
            return line
        tenant, kind, attempt = (getattr(record, name, None) for name in ("tenant", "kind", "attempt"))
        return f"{line} job={job_id} tenant={tenant} kind={kind} attempt={attempt}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line. Keys, in this order:

    - `time` (RFC 3339, UTC, milliseconds), `level`, `logger`, `message`, `process` (its id);
    - of a job: `job_id`, `tenant`, `kind`, `attempt`, and `parent` if it has one (see `JobFilter`);
    - of an exception: `error` (its class), `traceback`; of `stack_info`: `stack`;
    - what the call passed as `extra`, except under the names above. What JSON has no form for is its text.
    """

    def format(self, record: logging.LogRecord) -> str:
        seconds, part = divmod(record.created, 1)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
        fields: dict[str, Any] = {
            "time": f"{stamp}.{int(part * 1000):03d}Z", "level": record.levelname, "logger": record.name,
            "message": _message_of(record), "process": record.process,
        }  # fmt: skip
        fields |= {name: value for name in FIELDS if (value := getattr(record, name, None)) is not None}
        if record.exc_info and record.exc_info[0] is not None:
            fields |= {"error": record.exc_info[0].__name__, "traceback": self.formatException(record.exc_info)}
        elif record.exc_text:
            fields["traceback"] = record.exc_text
        if record.stack_info:
            fields["stack"] = self.formatStack(record.stack_info)
        for name, value in vars(record).items():
            if name not in _OF_RECORDS and name not in fields:
                fields[name] = value
        try:
            return json.dumps(fields, default=_as_text, allow_nan=False)
        except (ValueError, TypeError, RecursionError):  # NaN, a key that is no text, a value that contains itself
            plain = {name: value if _is_plain(value) else _as_text(value) for name, value in fields.items()}
            return json.dumps({str(name): value for name, value in plain.items()})


def set_up(level: str, form: LogFormat = "text", *, with_process: bool = False) -> bool:
    """Log to stderr from `level` on, aiqueue's records and the application's. Return whether that was done.

    Where the application has set up logging itself, only the level of the logger ``aiqueue`` is set.
    """
    logging.getLogger("aiqueue").setLevel(level.upper())
    root = logging.getLogger()
    if root.handlers:
        return False
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(JobFilter())
    text = _TEXT_WITH_PROCESS if with_process else _TEXT
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter(text))
    root.addHandler(handler)
    root.setLevel(level.upper())
    return True


def describe_set_up() -> dict[str, Any]:
    """Return what a child process needs, as plain data, to log as this process does. {}: nothing is set up here."""
    root = logging.getLogger()
    if not root.handlers:
        return {}
    is_json = any(isinstance(each.formatter, JsonFormatter) for each in root.handlers)
    levels = {"": root.level, "aiqueue": logging.getLogger("aiqueue").level}
    return {"levels": levels, "format": "json" if is_json else "text"}


def set_up_as(described: Mapping[str, Any]) -> None:
    """Log to stderr as the process does that `describe_set_up` was called in. Own set-up of the application wins."""
    if described:
        set_up("info", described["format"], with_process=True)
        for name, level in described["levels"].items():
            logging.getLogger(name).setLevel(level)


def _parent_of(job: LoggedJob) -> str | None:
    parent = subjects.ParentRun.parse(job.headers.get(headers.PARENT, ""))
    return None if parent is None else parent.job_id


def _message_of(record: logging.LogRecord) -> str:
    """Return a record's message. One whose arguments do not fit is its format: its error would be no line of JSON."""
    try:
        return record.getMessage()
    except Exception as error:  # noqa: BLE001  (a value of the application's may raise anything)
        return f"{_as_text(record.msg)} (its arguments do not fit: {type(error).__name__}: {_as_text(error)})"


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | bool) or (isinstance(value, int) and abs(value) < 2**63)


def _as_text(value: Any) -> str:
    try:
        return str(value)
    except Exception as error:  # noqa: BLE001  (a value of the application's may raise anything)
        return f"<{type(value).__name__}: {type(error).__name__}>"
