"""Subjects and ids of the wire contract (docs/wire-contract.md), built from checked tokens only."""

from __future__ import annotations

import hashlib
import os
import re
import time
from typing import NamedTuple

from .errors import InvalidToken

TOKEN = re.compile(r"[A-Za-z0-9_-]{1,64}")
FAMILY = re.compile(r"[a-z0-9_-]{1,32}\.[a-z0-9_-]{1,32}")
PRIORITY = re.compile(r"[a-z0-9]{1,16}")  # no "-": a lane's consumer is named {tenant}-{priority}
NORMAL = "normal"
HINTS = "aiq.hint"
CANCEL = "aiq.cancel"  # workers are told which jobs were cancelled while they may run
BACK = "aiq.back"  # workers tell each other which jobs they hand back
DEAD = "ai.dead"
PARKED = "ai.parked"
OBJECTS = "OBJ_"  # how the stream of an object store is called (ADR-20)
BUCKET = "KV_"  # and that of a key-value bucket (ADR-8)


def token(what: str, value: object) -> str:
    """`value` if it can be one token of a subject. Raises InvalidToken, naming `what`."""
    if not isinstance(value, str) or not TOKEN.fullmatch(value):
        raise InvalidToken(what, value)
    return value


def work(family: str, tenant: str, priority: str = NORMAL) -> str:
    """Where the library publishes a job: the guide's bare subject for normal priority, else the lane's own."""
    bare = f"ai.{family}.{token('tenant', tenant)}"
    return bare if priority == NORMAL else f"{bare}.{priority}"


def lane(family: str, tenant: str, priority: str) -> str:
    """Where the stream keeps a lane. `tenant` may be ``*``: the lane that all tenants share."""
    return f"ai.{family}.{tenant}.{priority}"


class Lane(NamedTuple):
    """The jobs of one tenant and priority in a family."""

    family: str
    tenant: str
    priority: str

    def __str__(self) -> str:
        return f"{self.family} {self.tenant}/{self.priority}"


def parse_lane(subject: str) -> Lane | None:
    """The lane of a stored job's subject, None if it is not one."""
    parts = subject.split(".")
    if len(parts) != 5 or parts[0] != "ai":
        return None
    return Lane(f"{parts[1]}.{parts[2]}", parts[3], parts[4])


def hint(where: Lane) -> str:
    """The core subject on which a producer tells workers that a lane has jobs."""
    return f"{HINTS}.{where.family}.{where.tenant}.{where.priority}"


def journal(root: str, tenant: str, job_id: str) -> str:
    """The subject of a job's journal; `root` is the family's `journal` key."""
    return f"{root}.{tenant}.{job_id}"


def dead(family: str, tenant: str = "*", job_id: str = "*") -> str:
    """The subject of a job's dead letter, or the filter over a family's or tenant's."""
    return f"{DEAD}.{family}.{tenant}.{job_id}"


class Parked(NamedTuple):
    """A parked job by its subject. `move` tells its parkings apart; `due`: its time has come."""

    lane: Lane
    job_id: str
    move: str
    due: bool


def parked(lane: Lane | None = None, job_id: str = "*", move: str = "*", *, due: bool) -> str:
    """Where a job waits for its time, or, `due`, for a forwarder; without a lane the filter over all. A word of the
    lane may be ``*``.
    """
    where = "*.*.*.*" if lane is None else f"{lane.family}.{lane.tenant}.{lane.priority}"
    return f"{PARKED}.{'due' if due else 'at'}.{where}.{job_id}.{move}"


def parse_parked(subject: str) -> Parked | None:
    """What a parked job's subject says, None if it is not one."""
    parts = subject.split(".")
    if len(parts) != 9 or parts[:2] != ["ai", "parked"] or parts[2] not in ("at", "due"):
        return None
    return Parked(Lane(f"{parts[3]}.{parts[4]}", parts[5], parts[6]), parts[7], parts[8], parts[2] == "due")


def stranded(stream: str) -> str:
    """Where the server says which jobs of a stream it delivers no more."""
    return f"$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.{stream}.*"


def objects(stream: str, kind: str, *words: str) -> str:
    """A subject in the object store of a stream: kind C for chunks, M for what they are, R for who holds them."""
    return ".".join(("$O", stream.removeprefix(OBJECTS), kind, *words))


def bucket(stream: str, *words: str) -> str:
    """A subject in the bucket of a stream; without words the filter over all keys."""
    return ".".join(("$KV", stream.removeprefix(BUCKET), *(words or (">",))))


def inbox(family: str, tenant: str, agent: str) -> str:
    """Where the mail of an agent is kept."""
    return f"ai.{family}.{token('tenant', tenant)}.{token('agent', agent)}"


def msg_id(family: str, tenant: str, job_id: str, move: str = "") -> str:
    """Nats-Msg-Id. The server deduplicates over a whole stream, hence tenant and family; a move needs its own
    `move`, or the server would take it for the job that it moves.
    """
    return f"{tenant}/{family}/{job_id}" + (f"/{move}" if move else "")


_DIGITS = "0123456789abcdefghijklmnopqrstuv"  # base32hex, which keeps the order of the bytes (RFC 4648, section 7)
_FIVE_BITS = bytes(ord(_DIGITS[byte & 31]) for byte in range(256))
_NOISE = 256  # ids' worth of randomness that is asked for at once
_noise: list[tuple[int, str]] = []  # two bits and sixteen digits for each id to come
_clock = (-1, "")  # the last millisecond and its nine digits


def new_id() -> str:
    """A time-ordered id of 26 characters: 48 bits of milliseconds, 80 random ones (ULID's layout)."""
    global _clock  # noqa: PLW0603  (replaced as a whole, so that threads may share it)
    stamp = time.time_ns() // 1_000_000
    known, head = _clock
    if known != stamp:
        head = "".join(_DIGITS[stamp >> shift & 31] for shift in range(43, 0, -5))
        _clock = stamp, head
    while True:
        try:
            bits, tail = _noise.pop()
        except IndexError:  # another thread may take all of it meanwhile
            _noise.extend(_more_noise())
        else:
            return f"{head}{_DIGITS[(stamp & 7) << 2 | bits]}{tail}"


def _more_noise() -> list[tuple[int, str]]:
    raw = os.urandom(17 * _NOISE)
    digits = raw.translate(_FIVE_BITS).decode()
    # 128 bits are 25 digits and 3 bits: the last digit's lower two bits are zero
    return [(raw[at] & 3, digits[at + 1 : at + 16] + _DIGITS[raw[at + 16] & 28]) for at in range(0, 17 * _NOISE, 17)]


_ID = re.compile(r"[0-7][0-9a-v]{25}")


def made_at(made: str) -> float | None:
    """When `new_id` made an id, in seconds since the epoch; None for what it cannot have made."""
    return (int(made[:10], 32) >> 2) / 1000 if _ID.fullmatch(made) else None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_noise.clear)  # a child must not make its parent's ids


def foreign_id(value: str) -> str:
    """A job id for a plain publisher's key: the key itself if it is a token, else a hash of it."""
    if TOKEN.fullmatch(value):
        return value
    return "x" + hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:40]
