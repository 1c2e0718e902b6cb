"""Subjects and ids (docs/reference/wire-contract.md): built from checked tokens, and parsed, only here."""

from __future__ import annotations

import hashlib
import os
import re
import time
from typing import Literal, NamedTuple

from .errors import InvalidToken

TOKEN = re.compile(r"[A-Za-z0-9_-]{1,64}")
FAMILY = re.compile(r"[a-z0-9_-]{1,32}\.[a-z0-9_-]{1,32}")
PRIORITY = re.compile(r"[a-z0-9]{1,16}")  # without "-", because a lane's consumer is named {tenant}-{priority}
NORMAL = "normal"
HINTS = "aiq.hint"
CANCEL = "aiq.cancel"  # notices to workers: a job that may be running was cancelled
BACK = "aiq.back"  # notices between workers: a job was returned to the queue
HOLDS = "aiq.holds"  # requests to workers: which of them holds a job
PAUSES = "aiq.pause"  # notices to workers: a pause began or ended
DEAD = "ai.dead"
REST = "rest"  # instead of a hashed key: the lane that all keys beyond a tenant's KEY_LANES_MAX share
KEY_LANES_MAX = 100
KEY_CHARS_MAX = 1_024  # of a value of a limited key
LIMITS = "aiq.limits"  # where the server repeats what is stored in the bucket of limits
API_KEYS = "aiq.keys"  # where the server says which API key was stored in their bucket
CHECKPOINTS = "ai.checkpoint"
RAG_STORES = "ai.rag.stores"  # see `rag_store`
USAGE = "ai.gateway"  # records of model calls, budgets and totals: see `usage_filters`
_NOT_IN_TOKEN = re.compile(r"[^A-Za-z0-9_-]")
RUN_KEY = re.compile(r"[0-9]{1,20}-[0-9]{1,12}")
PARKED, AUDIT = "ai.parked", "ai.audit"  # of the latter, an act follows, its dots written as "-"
TICKS = "ai.ticks"  # see `tick`
OBJECTS = "OBJ_"  # prefix of the stream names of object stores (ADR-20)
OnDuplicate = Literal["first", "raise", "rerun_failed", "rerun", "replace"]  # of a known id: see `Client.enqueue`
BUCKET = "KV_"  # prefix of the stream names of key-value buckets (ADR-8)


def token(what: str, value: object) -> str:
    """Return `value` if it is valid as one token of a subject. Raises InvalidToken, naming `what`."""
    if not isinstance(value, str) or not TOKEN.fullmatch(value):
        raise InvalidToken(what, value)
    return value


def work(family: str, tenant: str, priority: str = NORMAL, key: str = "") -> str:
    """Return the subject on which a job is published.

    For normal priority it is the bare subject without a priority, which plain clients use too: the stream maps it to
    the lane's subject. For other priorities, and for the lane of a limited key, it is the lane's subject.
    """
    bare = f"ai.{family}.{token('tenant', tenant)}"
    if key:
        return f"{bare}.{priority}.{key}"
    return bare if priority == NORMAL else f"{bare}.{priority}"


def lane(family: str, tenant: str, priority: str, key: str = "") -> str:
    """Return the subject of a lane's stored jobs. `tenant` ``*``: the lane that all share; `key` ``*``: all of keys."""
    return f"ai.{family}.{tenant}.{priority}.{key}" if key else f"ai.{family}.{tenant}.{priority}"


class Lane(NamedTuple):
    """The jobs of one tenant and priority in a family.

    `key`: only those of one value of the family's `limit_key`, in a lane of their own: the value, hashed (`hashed`), or
    REST, the lane of all values for which the tenant has no lane left. "": the jobs that no limit holds for.
    """

    family: str
    tenant: str
    priority: str
    key: str = ""

    def __str__(self) -> str:
        return f"{self.family} {self.tenant}/{self.priority}" + (f"={self.key[:8]}" if self.key else "")

    @property
    def without_key(self) -> Lane:
        return self if not self.key else Lane(self.family, self.tenant, self.priority)


def parse_lane(subject: str) -> Lane | None:
    """Return the lane of a stored job's subject; None for any other subject."""
    parts = subject.split(".")
    if not 5 <= len(parts) <= 6 or parts[0] != "ai":
        return None
    return Lane(f"{parts[1]}.{parts[2]}", *parts[3:])


def tenant_of(subject: str) -> str:
    """Return the tenant in the subject of a stored job or mail, ``ai.{component}.{operation}.{tenant}…``."""
    return subject.split(".")[3]


def hint(lane: Lane) -> str:
    """Return the core NATS subject on which producers publish hints to workers: this lane has jobs."""
    return f"{HINTS}.{'.'.join(lane if lane.key else lane[:3])}"


def hint_body(lane: Lane, key: str) -> bytes:
    """Return the body of a hint: what the hash in the lane of a limited key stands for; empty for other lanes."""
    return key.encode("utf-8", "surrogatepass") if lane.key not in ("", REST) else b""


def parse_hint(subject: str) -> Lane:
    """Return the lane that a hint is about."""
    parts = subject.split(".")
    return Lane(f"{parts[2]}.{parts[3]}", *parts[4:])


def journal(root: str, tenant: str, job_id: str) -> str:
    """Return the subject of a job's journal; `root` is the family's `journal` setting."""
    return f"{root}.{tenant}.{job_id}"


def parse_journal(subject: str) -> tuple[str, str]:
    """Return the tenant and the job id of a journal's subject."""
    *_, tenant, job_id = subject.split(".")
    return tenant, job_id


def checkpoints(family: str, tenant: str, job_id: str, run: str) -> str:
    """Return the subject of what a run of a job keeps for its later attempts. `run`: see `run_key`. Tokens may be
    ``*``.
    """
    return f"{CHECKPOINTS}.{family}.{tenant}.{job_id}.{run}"


def tenant_of_entry(subject: str) -> str:
    """Return the tenant of a journal's subject, or of a run's subject of `checkpoints`."""
    return subject.split(".")[4 if subject.startswith(f"{CHECKPOINTS}.") else -2]


def run_key(run: int, enqueued_at: float) -> str:
    """Return the token of a run: its sequence in the work stream, and when it was enqueued, in whole seconds. Sequences
    begin anew when a stream is created again.
    """
    return f"{run}-{int(enqueued_at)}"


def kept_run(run: int, enqueued_at: float, resumed: str) -> str:
    """Return the token of the run under which a job keeps its checkpoints. `resumed`: the header Aiq-Resumes, by which
    a replay goes on from those of the run before; a plain publisher may have set it to anything.
    """
    return resumed if RUN_KEY.fullmatch(resumed) else run_key(run, enqueued_at)


class ParentRun(NamedTuple):
    """The run of a job that has enqueued children. `run`: the token under which it keeps its checkpoints."""

    family: str
    job_id: str
    run: str

    def __str__(self) -> str:
        return f"{self.family}/{self.job_id}/{self.run}"

    @classmethod
    def parse(cls, text: str) -> ParentRun | None:
        """Read the value of the header Aiq-Parent; None for anything else, which a plain publisher may have set."""
        family, _, rest = text.partition("/")
        job_id, _, run = rest.partition("/")
        is_valid = FAMILY.fullmatch(family) and TOKEN.fullmatch(job_id) and RUN_KEY.fullmatch(run)
        return cls(family, job_id, run) if is_valid else None

    def checkpoints(self, tenant: str) -> str:
        """Return the subject of what the run keeps."""
        return checkpoints(self.family, tenant, self.job_id, self.run)

    @property
    def tokens(self) -> str:
        """The tokens that name the run within its tenant, in the subjects of its holds on documents."""
        return f"{self.family}.{self.job_id}.{self.run}"

    def child_ends(self, tenant: str) -> str:
        """Return the subject on which the run is told of the ends of its children."""
        return f"{self.checkpoints(tenant)}-ended"

    def child_id(self, tenant: str, name: str, generation: int) -> str:
        """Return the id of the run's child of this name: the same in each attempt of the run, and in no other run.

        It begins with what people recognise: the parent's id and the name, as far as they fit. `generation`: 0, or the
        number of the replay for which the child is made anew.
        """
        key = f"{tenant}/{self}/{generation}/{name}"
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:10]
        tail = "".join(_DIGITS[int.from_bytes(digest) >> shift & 31] for shift in range(75, -1, -5))
        return f"{self.job_id[:26]}_{_NOT_IN_TOKEN.sub('-', name)[:20]}_{tail}"


def dead(family: str, tenant: str = "*", job_id: str = "*") -> str:
    """Return the subject of a job's dead letter, or with ``*`` the filter over those of a family or tenant."""
    return f"{DEAD}.{family}.{tenant}.{job_id}"


def parse_dead(subject: str) -> tuple[str, str, str] | None:
    """Return the family, tenant and job id of a dead letter's subject; None for any other subject."""
    parts = subject.split(".")
    return (f"{parts[2]}.{parts[3]}", parts[4], parts[5]) if len(parts) == 6 else None


class ParkedSubject(NamedTuple):
    """The tokens of a parked job's subject. Parked twice under one `dedup_key`, a job id is stored once.

    `is_due`: the job's time has come, and it waits for a forwarder.
    """

    lane: Lane
    job_id: str
    dedup_key: str
    is_due: bool


def parked(lane: Lane | None = None, job_id: str = "*", dedup_key: str = "*", *, is_due: bool) -> str:
    """Return the subject of a job that waits for its time or, with `is_due`, for a forwarder.

    Tokens of the lane may be ``*``. Without a lane: the filter over all of these subjects.
    """
    where = "*.*.*.*" if lane is None else f"{lane.family}.{lane.tenant}.{lane.priority}"
    return f"{PARKED}.{'due' if is_due else 'at'}.{where}.{job_id}.{dedup_key}"


def parse_parked(subject: str) -> ParkedSubject | None:
    """Return the tokens of a parked job's subject; None for any other subject."""
    parts = subject.split(".")
    if len(parts) != 9 or parts[:2] != ["ai", "parked"] or parts[2] not in ("at", "due"):
        return None
    return ParkedSubject(Lane(f"{parts[3]}.{parts[4]}", parts[5], parts[6]), parts[7], parts[8], parts[2] == "due")


def tick(route: str, tenant: str, schedule: str, tick_ms: int | str | None = None) -> str:
    """Return the subject of a schedule's tick that waits for its time or, without `tick_ms`, for a worker.

    `route`: whose workers make its job, ``-`` for any. Tokens may be ``*``.
    """
    if tick_ms is None:
        return f"{TICKS}.due.{route}.{tenant}.{schedule}"
    return f"{TICKS}.at.{route}.{tenant}.{schedule}.{tick_ms}"


def stranded(stream: str) -> str:
    """Return the filter over the server's advisories about jobs of a stream that exceeded max deliveries."""
    return f"$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.{stream}.*"


def objects(stream: str, kind: str, *tokens: str) -> str:
    """Return a subject in an object store's stream. `kind`: C for chunks, M for metadata, R for holds on documents."""
    return ".".join(("$O", stream.removeprefix(OBJECTS), kind, *tokens))


def object_tokens(subject: str) -> list[str]:
    """Return the tokens behind the kind in an object store's subject: the inverse of `objects`."""
    return subject.split(".")[3:]


def bucket(stream: str, *tokens: str) -> str:
    """Return the subject of a key in a bucket's stream; without tokens the filter over all keys."""
    return ".".join(("$KV", stream.removeprefix(BUCKET), *(tokens or (">",))))


def limit(stream: str, what: str, family: str, key: str, scope: str) -> str:
    """Return the subject of a document of limits: `what` is use, rule or pause.

    `key` may be any text, and is hashed. `scope`: see `limit_scope`.
    """
    return bucket(stream, what, family, hashed(key), scope)


def limit_scope(tenant: str | None) -> str:
    """Return the token of whom a limit is for: all tenants together (None), each by itself (``*``), or one tenant."""
    return "all" if tenant is None else "each" if tenant == "*" else f"t-{tenant}"


def tenant_of_scope(scope: str) -> str | None:
    """Return whom a use or a rule of this scope is for: the inverse of `limit_scope`."""
    return None if scope == "all" else "*" if scope == "each" else scope.removeprefix("t-")


def limit_live(stream: str, subject: str) -> str:
    """Return the subject on which the server repeats what is stored in the bucket of limits on `subject`."""
    return LIMITS + subject.removeprefix(bucket(stream, "").removesuffix("."))


def hashed(text: str) -> str:
    """Return a token of 32 characters for any text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def usage(tenant: str, call_id: str) -> str:
    """Return the subject of the record of a model call. `call_id` may be any text, and is hashed.

    Raises InvalidToken for the tenant.
    """
    return f"{USAGE}.usage.{token('tenant', tenant)}.{hashed(call_id)}"


def usage_month(what: Literal["budget", "totals"], tenant: str, month: str, key: str = "") -> str:
    """Return the subject of a tenant's budget or totals of a month, ``2026-11``, or of one API key's budget. Raises
    InvalidToken.
    """
    of_tenant = f"{USAGE}.{what}.{token('tenant', tenant)}.{token('month', month)}"
    return f"{of_tenant}.{token('API key', key)}" if key else of_tenant


def usage_filter(what: Literal["usage", "budget", "totals"], tenant: str = "*", month: str = "*", key: str = "") -> str:
    """Return the filter over the records of a tenant, or its budgets or totals of a month; ``*``: of all. `key`: over
    the budgets of API keys.
    """
    return f"{USAGE}.{what}.{tenant}.{month}" + (f".{key}" if key else "")


def usage_filters() -> list[str]:
    """Return the subjects of the stream of usage."""
    return [usage_filter("usage"), usage_filter("budget"), usage_filter("budget", key="*"), usage_filter("totals")]


def recent(tenant: str, request: str) -> str:
    """Return the subject of what is known of a client's recent request; with ``*`` the filter over them."""
    return f"{USAGE}.recent.{tenant}.{request}"


def parse_usage(subject: str) -> tuple[str, str, str]:
    """Return the tenant of a subject of the stream of usage, the hashed call id or the month, and the API key or ""."""
    _, _, _, tenant, second, *key = subject.split(".")
    return tenant, second, "".join(key)


def rag_store(tenant: str | None) -> str:
    """Return the subject that says where the documents of a tenant are kept; None: of all tenants."""
    return f"{RAG_STORES}.all" if tenant is None else f"{RAG_STORES}.tenant.{token('tenant', tenant)}"


def inbox(family: str, tenant: str, agent: str) -> str:
    """Return the subject of an agent's stored mail."""
    return f"ai.{family}.{token('tenant', tenant)}.{token('agent', agent)}"


def inbox_filter(family: str, tenant: str = "*", agent: str = "*") -> str:
    """Return the filter over the stored mail of agents. The tokens are not checked: they may be a plain publisher's."""
    return f"ai.{family}.{tenant}.{agent}"


def parse_mail(subject: str) -> tuple[str, str | None]:
    """Return the tenant and the agent in the subject of a mail. The agent is None on the bare subject."""
    parts = subject.split(".")
    return parts[3], parts[4] if len(parts) > 4 else None


def parse_agent_key(subject: str) -> tuple[str, str] | None:
    """Return the tenant and agent of a presence key ``{what}.{tenant}.{agent}``; None for any other bucket subject."""
    parts = subject.split(".")
    return (parts[3], parts[4]) if len(parts) == 5 else None


def msg_id(family: str, tenant: str, job_id: str, step: str = "") -> str:
    """Return the Nats-Msg-Id of a job.

    It contains tenant and family, because the server deduplicates over a whole stream. When a job is stored once more
    (parked, replayed, dead-lettered …), `step` names that step; otherwise the server would drop it as a duplicate.
    """
    return f"{tenant}/{family}/{job_id}" + (f"/{step}" if step else "")


_DIGITS = "0123456789abcdefghijklmnopqrstuv"  # base32hex, which sorts like the bytes (RFC 4648, section 7)
_FIVE_BITS = bytes(ord(_DIGITS[byte & 31]) for byte in range(256))
_NOISE = 256  # for how many ids random bytes are read at once
_noise: list[tuple[int, str]] = []  # two bits and sixteen digits for each future id
_clock = (-1, "")  # the last used millisecond and its nine digits


def new_id(offset_ms: int = 0) -> str:
    """Return a new time-ordered id of 26 characters: 48 bits of milliseconds, 80 random bits (ULID's layout).

    `offset_ms` is added to the local clock.
    """
    global _clock  # noqa: PLW0603  (replaced as a whole, so threads may share it)
    stamp = time.time_ns() // 1_000_000 + offset_ms
    known, head = _clock
    if known != stamp:
        head = "".join(_DIGITS[stamp >> shift & 31] for shift in range(43, 0, -5))
        _clock = stamp, head
    while True:
        try:
            bits, tail = _noise.pop()
        except IndexError:  # loop, because another thread may use them all up meanwhile
            _noise.extend(_more_noise())
        else:
            return f"{head}{_DIGITS[(stamp & 7) << 2 | bits]}{tail}"


def _more_noise() -> list[tuple[int, str]]:
    """Return the random parts of the next _NOISE ids."""
    raw = os.urandom(17 * _NOISE)
    digits = raw.translate(_FIVE_BITS).decode()
    # 128 bits are 25 digits and 3 bits, so the last digit's lower two bits are zero
    return [(raw[at] & 3, digits[at + 1 : at + 16] + _DIGITS[raw[at + 16] & 28]) for at in range(0, 17 * _NOISE, 17)]


_ID = re.compile(r"[0-7][0-9a-v]{25}")


def made_at(job_id: str) -> float | None:
    """Return when `new_id` made an id, in seconds since the epoch; None if `new_id` cannot have made it."""
    return (int(job_id[:10], 32) >> 2) / 1000 if _ID.fullmatch(job_id) else None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_noise.clear)  # a forked child must not make the same ids as its parent


def job_id(value: object) -> str:
    """Return the id of the job that a caller names, by its id or by the key that the id is made of.

    Raises InvalidToken for what is no text, and for an empty one.
    """
    if not isinstance(value, str) or not value:
        raise InvalidToken("job id", value)
    return foreign_id(value)


def id_in_message(value: object) -> str | None:
    """Return the job id that a header or a field of a body names: a text or a whole number. None: it names none.

    An empty text, or one of spaces only, is no id: all jobs that carry it would be one.
    """
    if isinstance(value, str):
        return foreign_id(value) if value.strip() else None
    return foreign_id(str(value)) if isinstance(value, int) and not isinstance(value, bool) else None


def key_in_message(value: object) -> str:
    """Return the value of a limited key that a field of a body has: a text or a whole number. "": it has none.

    A text above KEY_CHARS_MAX characters is cut, and then the hash of all of it follows.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        return ""
    return value if len(value) <= KEY_CHARS_MAX else f"{value[: KEY_CHARS_MAX - 33]}#{hashed(value)}"


def foreign_id(value: str) -> str:
    """Return the job id for any key: the key itself if it is a valid token, else ``x`` and 40 digits of its SHA-256."""
    if TOKEN.fullmatch(value):
        return value
    return "x" + hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:40]
