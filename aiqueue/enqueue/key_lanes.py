"""Which jobs a producer stores in the lane of a limited key at once.

All others go to the ordinary lanes. There a worker moves those of a limited key: nothing depends on what a producer
knows. It saves the worker one delivery of each job.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .. import codec, headers, subjects
from ..connection import Connection
from ..errors import AccessDenied, AIQueueError, DecodeError, NotFound, Unavailable
from ..job import Message
from ..lanes import WorkerRecords, without_key_lanes
from ..subjects import Lane
from ..topology import Family, Topology

if TYPE_CHECKING:  # only producers of families with a limit_key import the room of limits
    from ..limits import Controls, Rules

log = logging.getLogger(__name__)

REFRESH_S = 5.0
VALID_S = 15.0  # what was found out longer ago does not count
DENIED_S = 300.0  # until the next look, where this user may not look
USED_S = 10.0  # how long a key counts among those of a tenant to whose lane a job has gone
TOKENS_MAX = 10_000
_SUBJECTS_PAGE = 100_000
NO_LANE = ("-", "-")  # tenant and priority of a hint that no worker acts on
NO_KEY_LANE = (*NO_LANE, "-")  # the same with a key: workers of former versions do not hear it
NO_RESPONDERS_S = 0.2  # the server reports at once that nobody listens


class KeyLanes:
    """What the producers of one client know of the lanes of limited keys.

    A job goes into such a lane if a rule or a pause holds for its key, the family's stream takes it there, and each
    worker of the family that is alive serves such lanes. That is looked up in the background while jobs of a family
    with a limit_key are enqueued, once in REFRESH_S. Until it is known, jobs go to the ordinary lanes.
    """

    def __init__(self, connection: Connection, topology: Topology, declared: Callable[[], Rules]) -> None:
        """`declared` returns the rules of limits.toml."""
        self._connection = connection
        self._topology = topology
        self._declared = declared
        self._records = WorkerRecords(connection, topology)
        self._controls: Controls | None = None
        self._wanted: dict[str, Family] = {}  # families whose jobs are enqueued
        self._takes: dict[str, bool] = {}  # by family: stream and workers take jobs in lanes of keys
        self._stored: dict[tuple[str, str], set[str]] = {}  # by family and tenant: keys whose lanes hold jobs
        self._used: dict[tuple[str, str], dict[str, float]] = {}  # the same: keys used here, until when
        self._tokens: dict[tuple[str, str, str], str] = {}  # by family, tenant and key
        self._valid_until = self._refresh_at = 0.0  # monotonic seconds
        self._refreshing: asyncio.Task[None] | None = None
        self._missed = False  # changes of rules, while the connection was lost
        self._off: Callable[[], None] = lambda: None

    def token(self, family: Family, tenant: str, key: str) -> str:
        """Return the key of the lane into which a tenant's job goes: the hash of its value `key`, or REST for one for
        which the tenant has no lane left. "": the ordinary lane. Asks nobody.
        """
        now = time.monotonic()
        if now >= self._refresh_at or family.name not in self._wanted:
            self._wanted[family.name] = family
            self._start_refresh()
        if not self._takes.get(family.name) or now >= self._valid_until:
            return ""
        asked = family.name, tenant, key
        found = self._tokens.get(asked)
        if found is None:
            if len(self._tokens) >= TOKENS_MAX:
                self._tokens.clear()
            found = self._tokens[asked] = self._find_token(*asked)
        return found

    async def find_token(self, family: Family, tenant: str, key: str) -> str:
        """As `token`, after a look if nothing is known yet."""
        self._wanted[family.name] = family
        if family.name not in self._takes or time.monotonic() >= self._valid_until:
            self._start_refresh()
            if self._refreshing is not None:
                await asyncio.wait([self._refreshing])
        return self.token(family, tenant, key)

    def distrust(self, family: Family) -> None:
        """The stream has refused a lane of a key: store no more there before the next look."""
        if self._takes.get(family.name):
            log.info(
                "%s takes no jobs into lanes of limited keys any more: was an older `aiqueue apply` run?", family.name
            )
        self._takes[family.name] = False

    async def close(self) -> None:
        """Stop looking. Safe twice and unused."""
        task, self._refreshing = self._refreshing, None
        self._refresh_at = float("inf")
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        self._off()
        controls, self._controls = self._controls, None
        if controls is not None:
            await controls.close()

    # -- finding out

    def _find_token(self, family: str, tenant: str, key: str) -> str:
        assert self._controls is not None  # `_takes` is known after it was opened
        if not self._controls.is_limited(family, key, tenant):
            return ""
        token = subjects.hashed(key)
        used = self._used.setdefault((family, tenant), {})
        taken = self._stored.get((family, tenant), set()) | used.keys()
        if token not in taken and len(taken) >= subjects.KEY_LANES_MAX:
            return subjects.REST
        used[token] = time.monotonic() + USED_S
        return token

    def _start_refresh(self) -> None:
        now = time.monotonic()
        if self._refreshing is None and self._refresh_at != float("inf"):
            self._refresh_at = now + REFRESH_S
            self._refreshing = asyncio.get_running_loop().create_task(self._refresh())

    async def _refresh(self) -> None:
        """Find out what `token` has to know."""
        families, started_at = list(self._wanted.values()), time.monotonic()
        try:
            await self._follow_rules()
            former = without_key_lanes(await self._records.read())
            for family in families:
                takes = family.name not in former and await self._read_stream(family)
                self._takes[family.name] = takes and await self._has_listener(family)
            self._valid_until = started_at + VALID_S
        except (AccessDenied, NotFound) as error:
            log.info("jobs of limited keys are stored in the ordinary lanes, and workers move them: %s", error)
            self._takes.clear()
            self._refresh_at = started_at + DENIED_S
        except AIQueueError as error:
            log.debug("looking for lanes of limited keys: %s", error)
        finally:
            self._tokens.clear()
            now = time.monotonic()
            for key, used in list(self._used.items()):
                self._used[key] = {token: until for token, until in used.items() if until > now}
            self._refreshing = None

    async def _follow_rules(self) -> None:
        """Open the rules, or read again what may have changed while the connection was lost."""
        if self._controls is None:
            from ..limits import Controls, Rules  # noqa: PLC0415

            rules = Rules(self._declared().declared.values())  # of its own, because it follows the overrides
            controls = Controls(self._connection, self._topology, rules, self._connection.clock.now)
            await self._connection.clock.ensure(controls.stream)
            try:
                await controls.open()
            except BaseException:
                await controls.close()
                raise
            controls.listeners.append(self._tokens.clear)
            self._off = self._connection.on_regained(self._on_regained)
            self._controls = controls
        elif self._missed:
            self._missed = False
            await self._controls.reload()

    def _on_regained(self) -> None:
        self._missed = True
        self._refresh_at = 0.0

    async def _has_listener(self, family: Family) -> bool:
        """Return whether a worker listens for such lanes, or none for any. Some former workers have no record."""
        if await has_listeners(self._connection, family, has_key=True) is not False:
            return True
        if not await has_listeners(self._connection, family, has_key=False):
            return True
        return await has_listeners(self._connection, family, has_key=True) is not False  # it may have begun meanwhile

    async def _read_stream(self, family: Family) -> bool:
        """Return whether the family's stream takes jobs in lanes of keys, and note which of these lanes hold jobs."""
        request: dict[str, Any] = {"subjects_filter": subjects.lane(family.name, "*", "*", "*"), "offset": 0}
        stored: dict[tuple[str, str], set[str]] = {}
        while True:
            info = await self._connection.api(f"STREAM.INFO.{family.stream}", request)
            page: dict[str, int] = info["state"].get("subjects") or {}
            for subject in page:
                lane = subjects.parse_lane(subject)
                if lane is not None and lane.key and lane.key != subjects.REST:
                    stored.setdefault(lane[:2], set()).add(lane.key)
            request["offset"] += len(page)
            if len(page) < _SUBJECTS_PAGE:
                break
        self._stored = {key: keys for key, keys in self._stored.items() if key[0] != family.name} | stored
        return family.takes_keys(info["config"].get("subjects") or ())


async def has_listeners(connection: Connection, family: Family, *, has_key: bool) -> bool | None:
    """Whether a worker subscribes to the family's hints, or to those of the lanes of limited keys. None: not known,
    because this user may not publish there.

    The server answers a request to which nobody listens; workers answer none. The hint names no lane that exists.
    """
    hint = subjects.hint(Lane(family.name, *(NO_KEY_LANE if has_key else NO_LANE)))
    asked = asyncio.create_task(connection.request(hint, timeout_s=NO_RESPONDERS_S))
    asked.add_done_callback(lambda task: task.cancelled() or task.exception())  # retrieved, also if this is cancelled
    await asyncio.sleep(0)  # it is sent
    await connection.flush()  # and by now answered, if nobody listens
    await asyncio.wait([asked], timeout=NO_RESPONDERS_S / 10)
    if not asked.done():
        asked.cancel()
        return True
    try:
        await asked
    except AccessDenied:
        return None
    except Unavailable as error:
        return "no responders" not in str(error)
    return True


# -- the value of a job's key

_FIELDS_MAX = 10_000
_attributes: dict[tuple[type[Message], str], str] = {}  # of classes: the attribute that is this field of the body


def key_of_message(message: Message, field: str) -> str:
    """Return the value of a key's field as the body of a message will have it; "" without one, or of another type.

    Of a field that the class writes by a function of its own, the value is not known here: a worker finds it.
    """
    asked = type(message), field
    attribute = _attributes.get(asked)
    if attribute is None:
        if len(_attributes) >= _FIELDS_MAX:
            _attributes.clear()
        attribute = _attributes[asked] = _find_attribute(type(message), field)
    value = message.__dict__.get(attribute)
    if value is None:
        value = (message.__pydantic_extra__ or {}).get(field)
    return subjects.key_in_message(value.value if isinstance(value, enum.Enum) else value)


def _find_attribute(kind: type[Message], field: str) -> str:
    aliases = {info.serialization_alias or info.alias: name for name, info in kind.model_fields.items()}
    return aliases.get(field, field)


def key_of_body(family: Family, body: bytes, *, content_type: str = "", kind: str = "") -> str:
    """As `key_of_message`, for an encoded body. One that does not have the field's name is not decoded."""
    field = family.limit_key or ""
    if field.encode() not in body and b"\\u" not in body:
        return ""
    with contextlib.suppress(DecodeError):
        incoming = codec.decode_message(
            body, content_type=content_type, kind=kind, default_kind=family.default_kind, aliases=family.aliases
        )
        return subjects.key_in_message(incoming.data.get(field))
    return ""


def stated_key(family: Family, given: Mapping[str, str]) -> str:
    """Return the value of the family's limited key that a header states; "" if it may not, or does not."""
    if family.limit_key is None or family.limit_key not in family.header_fields:
        return ""
    return subjects.key_in_message(headers.find(given, family.limit_key))


def key_headers(key: str) -> dict[str, str]:
    """Return the header of a job in the lane of a key; none for the ordinary lane."""
    return {headers.LIMIT_KEY: headers.encode_key(key)} if key else {}
