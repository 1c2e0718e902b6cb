"""Subjects and ids of the wire contract (docs/wire-contract.md), built from checked tokens only."""

from __future__ import annotations

import base64
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
BACK = "aiq.back"  # workers tell each other which jobs they hand back
DEAD = "ai.dead"


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


def msg_id(family: str, tenant: str, job_id: str, hop: str = "") -> str:
    """Nats-Msg-Id. The server deduplicates over a whole stream, hence tenant and family; a move needs its own
    `hop`, or the server would take it for the job that it moves.
    """
    return f"{tenant}/{family}/{job_id}" + (f"/{hop}" if hop else "")


def new_id() -> str:
    """A time-ordered id of 26 characters: 48 bits of milliseconds, 80 random ones (ULID's layout)."""
    stamp = (time.time_ns() // 1_000_000).to_bytes(6, "big")
    # base32hex keeps the order of the bytes (RFC 4648, section 7)
    return base64.b32hexencode(stamp + os.urandom(10))[:26].decode().lower()


def foreign_id(value: str) -> str:
    """A job id for a plain publisher's key: the key itself if it is a token, else a hash of it."""
    if TOKEN.fullmatch(value):
        return value
    return "x" + hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:40]
