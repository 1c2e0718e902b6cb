"""The audit: who has done what to the queue. The tools of operators write a line for each act; `find` reads them.

A line says what its writer claims: who may publish on ``ai.audit.>`` can write any. A line cannot be taken out.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sized
from dataclasses import dataclass, field, replace
from typing import Any

from .. import headers, subjects
from ..codec import JSON
from ..config import Settings
from ..connection import Connection, Stored
from ..errors import AIQueueError, BadInput, NotFound
from ..topology import Topology
from ..units import Duration, parse_duration

log = logging.getLogger(__name__)

STORE_S = 2.0  # an act waits so long for its line
USER_S = 1.0
TEXT_MAX = 500  # characters of a text in a line
ITEMS_MAX = 50  # of what an act was about
DEPTH_MAX = 4
INT_BITS_MAX = 64

_BEGUN, _ENDED = "begun", "ended"


@dataclass(frozen=True, slots=True)
class AuditLine:
    """One act of an operator. Times are seconds since the epoch, by the server's clock.

    - `act`: such as "cancel" or "dead.replay". `target`: what it was about: a job, a filter, the arguments.
    - `nats_user`: as the server names it. `os_user`, `host`: of the process.
    - `count`: how many jobs, dead letters or other things it has changed. `details`: more of what came of it.
    - `ended_at`: None: the act has not ended, or its process died. `error`: why it has failed; "" if it has not.
    """

    id: str
    """Id of the act."""
    act: str
    target: Mapping[str, Any]
    nats_user: str
    os_user: str
    host: str
    begun_at: float
    """When the act began."""
    ended_at: float | None = None
    count: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


class AuditedAct:
    """An act while it goes on. Set `count`, and what else is to be kept in `details`.

    `problem`: why the line could not be stored; "" if it was.
    """

    def __init__(self, act: str) -> None:
        self.id = subjects.new_id()
        self.act = act
        self.count: int | None = None
        self.details: dict[str, Any] = {}
        self.problem = ""


class Audit:
    """The audit of a client's server."""

    def __init__(self, connection: Connection, topology: Topology, settings: Settings) -> None:
        self._connection = connection
        self._topology = topology
        self._settings = settings

    @contextlib.asynccontextmanager
    async def act(self, act: str, target: Mapping[str, Any], *, by: str | None = None) -> AsyncIterator[AuditedAct]:
        """Store a line about what is done inside the block: before it that it begins, after it what came of it.

        `act`: a token, parts of it joined by dots. `by` (default: the user of this process) is who does it.

        An act is not refused because its line cannot be stored, as without the stream or without the permission: then
        `problem` of the yielded object says why, and the log does. Raises BadInput for an act that is no token.
        """
        subjects.token("act", act.replace(".", "-") if isinstance(act, str) else act)
        audited = AuditedAct(act)
        who = {"nats_user": await self._find_nats_user(), "os_user": by or _os_user(), "host": socket.gethostname()}
        stated = {"target": _bounded(target)}
        await self._store(audited, _BEGUN, {**who, **stated})
        error = "interrupted"
        try:
            yield audited
            error = ""
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"[:TEXT_MAX]
            raise
        finally:
            outcome = {"count": audited.count, "details": _bounded(audited.details), "error": error}
            await self._store(audited, _ENDED, {**who, **stated, **outcome})

    async def find(
        self, *, act: str | None = None, newer: Duration | None = None, user: str | None = None
    ) -> AsyncGenerator[AuditLine, None]:
        """Yield the lines, the oldest first. Lines older than the stream keeps (90 days) are gone.

        `act`: of this act, or of those below it: "dead" is for "dead.replay". It may be written as the command, as
        "jobs.run-now". `newer` (a duration): begun at most so
        long ago. `user`: whose NATS or OS user is this. Raises NotFound (run `aiqueue apply`), AccessDenied,
        Unavailable.
        """
        if act is not None:
            subjects.token("act", act.replace(".", "-"))
        wanted, since = "" if act is None else f"{_plain_act(act)}.", None
        if newer is not None:
            await self._connection.clock.ensure(self._topology.audit_stream.name)
            since = self._connection.clock.now() - parse_duration("newer", newer)
        found: dict[str, AuditLine] = {}
        stream, filter_subject = self._topology.audit_stream.name, f"{subjects.AUDIT}.*"
        async for stored in self._connection.read(stream, filter_subject, since=since):
            line = _parse(stored)
            if line is None or (wanted and not f"{_plain_act(line.act)}.".startswith(wanted)):
                continue
            if user not in (None, line.nats_user, line.os_user):
                continue
            first = found.setdefault(line.id, line)
            if first.ended_at is None and line.ended_at is not None:  # a later message replaces nothing that was said
                found[line.id] = replace(
                    first, ended_at=line.ended_at, count=line.count, details=line.details, error=line.error
                )
        for line in found.values():
            yield line

    async def _store(self, audited: AuditedAct, phase: str, said: Mapping[str, Any]) -> None:
        body = json.dumps({"id": audited.id, "act": audited.act, "phase": phase, **said}, default=str).encode()
        fields = {headers.CONTENT_TYPE: JSON, headers.MSG_ID: f"{audited.id}/{phase}"}
        subject = f"{subjects.AUDIT}.{audited.act.replace('.', '-')}"
        self._connection.optional += 1  # the log says below what it means, and need not say it twice
        try:
            await self._connection.store(subject, body, fields, timeout_s=STORE_S)
        except NotFound:
            audited.problem = f"stream {self._topology.audit_stream.name} does not exist: run `aiqueue apply`"
        except AIQueueError as error:
            audited.problem = str(error)
        finally:
            self._connection.optional -= 1
        if audited.problem:
            log.warning("%s is not in the audit: %s", audited.act, audited.problem)

    async def _find_nats_user(self) -> str:
        """Return how the server calls this connection's user; what the settings say where it does not tell."""
        self._connection.optional += 1
        try:
            reply = await self._connection.request("$SYS.REQ.USER.INFO", b"", timeout_s=USER_S)
            user = json.loads(reply.data).get("data", {}).get("user")
            if isinstance(user, str) and user:
                return user[:TEXT_MAX]
        except (AIQueueError, ValueError, AttributeError):
            pass
        finally:
            self._connection.optional -= 1
        return self._settings.user or ""


def check_by(by: Any) -> None:
    """Raise BadInput if `by` does not name an operator."""
    if by is not None and (not isinstance(by, str) or not by.strip()):
        raise BadInput(f"by must name who acts, such as 'anna', not {by!r:.80}")


def _os_user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a user id without a name, as in a container
        return "?"


def _plain_act(act: str) -> str:
    return act.replace("-", "_")


def _bounded(value: Any, depth: int = DEPTH_MAX) -> Any:
    """Return data of a line: texts are cut, and what is too many or too deep is left out. A mark says so.

    What it returns, it leaves as it is: lines are bounded as they are written and as they are read.
    """
    if isinstance(value, str):
        text = value if len(value) <= TEXT_MAX else f"{value[: TEXT_MAX - 1]}…"
        return text.encode("utf-8", "replace").decode()  # a lone surrogate cannot be printed
    if isinstance(value, int) and value.bit_length() > INT_BITS_MAX:
        return f"… a number of {value.bit_length():,} bits"
    if not isinstance(value, Mapping | list | tuple):
        return value
    if not depth:
        return "…"
    if isinstance(value, Mapping):
        some = list(value.items())[: _items_kept(value)]
        found = {_bounded(str(key)): _bounded(each, depth - 1) for key, each in some}
        return found if len(some) == len(value) else {**found, "…": f"and {len(value) - len(some):,} more"}
    kept = _items_kept(value)
    more = [] if kept == len(value) else [f"… and {len(value) - kept:,} more"]
    return [*(_bounded(each, depth - 1) for each in value[:kept]), *more]


def _items_kept(value: Sized) -> int:
    """Return how many items are kept: all, or all but one of ITEMS_MAX, whose place the mark takes."""
    return len(value) if len(value) <= ITEMS_MAX else ITEMS_MAX - 1


def _parse(stored: Stored) -> AuditLine | None:
    """Return the line in a message; None for what somebody else has written. Each value may be a stranger's, too."""
    try:
        said = json.loads(stored.data)
        ended = said["phase"] == _ENDED
        texts = {name: str(_bounded(said[name])) for name in ("id", "act", "nats_user", "os_user", "host")}
        target, count = _bounded(dict(said["target"])), said["count"] if ended else None
        return AuditLine(
            **texts, target=target, begun_at=stored.time, ended_at=stored.time if ended else None,
            count=count if type(count) is int and count.bit_length() <= INT_BITS_MAX else None,
            details=_bounded(dict(said["details"])) if ended else {},
            error=str(_bounded(said["error"])) if ended else "",
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
