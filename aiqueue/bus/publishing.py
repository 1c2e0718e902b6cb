"""From `publish` and `request` to a stored job, a stored mail, a plain message or an answer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Coroutine, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from .. import codec, headers, subjects
from ..client import Client
from ..connection import PubAck, Received, block
from ..enqueue import JobTemplate, OnFull, Producer, key_headers, retry_while_full, stated_key
from ..errors import BadInput, DecodeError, ReplyTimeout, Unavailable
from ..logs import running_job
from ..mailbox import Inboxes, Sent
from ..requests import find_bare_id, send_until_answered, start_request
from ..topology import Family
from ..tracing import NOT_SENT, TRACEPARENT, names
from .routes import Route, check_request, is_stored, route_of_publish

TEMPLATES_MAX = 10_000
PLAIN_REQUEST_S = 30.0
_NAMES_DOCUMENT = frozenset({headers.DOCUMENT, headers.DOCUMENT_REF})  # of a job whose publisher has stored its body
_JSON_MAP = ord("{")
_CBOR_MAPS = frozenset({*range(0xA0, 0xBC), 0xBF})


class Published(NamedTuple):
    """A stored job or mail: its `id`, and where it is stored. `duplicate`: a message of this id was stored before."""

    id: str
    stream: str
    """Name of the stream that stores the message."""
    seq: int
    """Sequence of the message in that stream."""
    duplicate: bool


class Publisher:
    """Publishes and requests on an open client."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._connection = client.connection
        self._topology = client.topology
        self._producer = Producer(client.connection, client.topology, client.key_lanes, tracing=client.tracing)
        self._templates: dict[tuple[str, str, str], JobTemplate] = {}
        self._lanes: dict[str, JobTemplate] = {}  # by the subject of a publish without headers
        self._blocks: dict[tuple[str, str, str, bool], bytes] = {}  # their headers; see `_header_block`

    @cached_property
    def _inboxes(self) -> Inboxes:
        return self._client.inboxes  # raises UnknownFamily where there are none

    def publish(
        self, subject: str, body: bytes, reply: str, given: Mapping[str, str] | None, timeout_s: float, on_full: OnFull
    ) -> Coroutine[Any, Any, Published | None]:
        """Implements `NATSClient.publish`."""
        publish = self._publish if self._producer.tracing is None else self._publish_traced
        return publish(subject, body, reply, given, timeout_s, on_full)

    async def _publish_traced(
        self, subject: str, body: bytes, reply: str, given: Mapping[str, str] | None, timeout_s: float, on_full: OnFull
    ) -> Published | None:
        """As `_publish`. A job or mail continues the trace of whoever publishes it, and has no trace of its own."""
        route, tracing = route_of_publish(self._topology, subject), self._producer.tracing
        assert tracing is not None
        sending = None
        is_given = isinstance(given, Mapping) and headers.find(given, TRACEPARENT)
        if route.family is not None and route.role in ("work", "inbox") and not is_given:
            destination = names.destination(route.family.name)
            sending = tracing.start_send(destination, route.tenant, of=running_job.get(), may_begin=False)
        with sending or NOT_SENT as sent:
            carried: Mapping[str, str] | None = given
            if sent.headers and isinstance(given, Mapping | None):  # what is no mapping is refused where it is checked
                carried = {**(given or {}), **sent.headers}
            published = await self._publish(subject, body, reply, carried, timeout_s, on_full)
            sent.set(names.MESSAGE_ID, None if published is None else published.id)
            return published

    async def _publish(
        self, subject: str, body: bytes, reply: str, given: Mapping[str, str] | None, timeout_s: float, on_full: OnFull
    ) -> Published | None:
        end = time.monotonic() + timeout_s
        if not given and not reply and (lane := self._lanes.get(subject)) is not None:
            return await self._store_job_without_headers(lane, body, end, on_full)
        route = route_of_publish(self._topology, subject)
        message_headers = _checked_headers(given)
        if reply and is_stored(self._topology, subject):
            raise BadInput(
                f"a message on {subject} has no reply subject, because its sender gets the server's PubAck: leave out "
                "reply="
            )
        if route.role == "work":
            return await self._store_job(route, body, message_headers, end, on_full)
        if route.role == "inbox":
            return await self._store_mail(route, subject, body, message_headers, end, on_full)
        await self._connection.wait_up(timeout_s)
        await self._connection.publish(subject, body, headers=message_headers, reply=reply)
        return None

    async def request(
        self, subject: str, body: bytes, given: Mapping[str, str] | None, timeout_s: float | None
    ) -> Received:
        """Implements `NATSClient.request`."""
        route = route_of_publish(self._topology, subject)
        check_request(self._topology, route, subject)
        request_headers = _checked_headers(given)
        if route.role == "answers" and route.family is not None:
            family = route.family
            _check_ids(family, request_headers)
            _check_fields(family, request_headers, body)
            job_id = self._find_id(family, route.tenant, request_headers, body, bare_id=True)
            if job_id is None:
                job_id = request_headers[headers.JOB_ID] = subjects.new_id(self._connection.clock.offset_ms)
            with start_request(self._producer, family, route.tenant, request_headers, job_id):
                return await send_until_answered(
                    self._producer, family, route.tenant, request_headers, body, job_id=job_id,
                    same_id=f"the header {family.key or headers.JOB_ID}: {job_id}",
                    timeout_s=timeout_s if timeout_s is not None else family.reply_within_s or PLAIN_REQUEST_S,
                )  # fmt: skip
        within_s = PLAIN_REQUEST_S if timeout_s is None else timeout_s
        try:
            return await self._connection.request(subject, body, headers=request_headers, timeout_s=within_s)
        except Unavailable as error:
            if "no reply within" in str(error):
                raise ReplyTimeout(f"{error}: the service may be busy: raise the timeout, or try again") from None
            if "no responders" in str(error):
                raise Unavailable(f"{error}: start a service that subscribes to this subject") from None
            raise

    async def _store_job(
        self, route: Route, body: bytes, job_headers: dict[str, str], end: float, on_full: OnFull
    ) -> Published:
        """Store a job in its lane, once for its id."""
        family, tenant = route.family, route.tenant
        assert family is not None
        priority = route.last or job_headers.get(headers.PRIORITY) or subjects.NORMAL
        template = self._template(family, tenant, priority)
        if not job_headers:
            if len(self._lanes) >= TEMPLATES_MAX:
                self._lanes.clear()
            self._lanes[f"ai.{family.name}.{tenant}{f'.{route.last}' if route.last else ''}"] = template
            return await self._store_job_without_headers(template, body, end, on_full)
        if route.last:
            job_headers[headers.PRIORITY] = priority
        _check_ids(family, job_headers)
        _check_fields(family, job_headers, body)
        job_id, by_caller = self._find_id(family, tenant, job_headers, body), True
        if job_id is None:
            job_id, by_caller = subjects.new_id(self._connection.clock.offset_ms), False
            job_headers[headers.JOB_ID] = job_id
        job_headers.setdefault(headers.MSG_ID, subjects.msg_id(family.name, tenant, job_id))
        template = self._producer.body_template(
            template,
            body,
            content_type=job_headers.get(headers.CONTENT_TYPE, ""),
            kind=job_headers.get(headers.KIND, ""),
            stated=stated_key(family, job_headers),
        )
        job_headers |= key_headers(template.key)
        header_block = block(job_headers)
        print_ = ""
        if by_caller and family.fingerprint is not None:
            print_ = await self._producer.fingerprints.of_new(family, tenant, job_id, header_block, body)
        ack: PubAck
        if len(body) > self._producer.body_max and not _NAMES_DOCUMENT & job_headers.keys():
            ack = await self._producer.store_with_documents(
                None, template, header_block, body, on_full, end, by_caller=by_caller
            )
        else:
            ack = await self._producer.store(template, header_block, body, on_full, end)
        if print_ and ack.duplicate:
            await self._producer.fingerprints.check_stored(family, tenant, job_id, print_, ack.stream, ack.seq)
        return Published(job_id, ack.stream, ack.seq, ack.duplicate and by_caller)

    async def _store_job_without_headers(
        self, template: JobTemplate, body: bytes, end: float, on_full: OnFull
    ) -> Published:
        """As `_store_job`, for a publish without headers: the fast path.

        The headers state what workers would otherwise find in the body: its id, its format, and the kind of a body that
        is no envelope. A worker takes its fast path by them.
        """
        job_id, by_caller = _id_in_body(template.family, {}, body, bare_id=False), True
        if job_id is None:
            job_id, by_caller = subjects.new_id(self._connection.clock.offset_ms), False
        else:
            job_id = subjects.foreign_id(job_id)
        template = self._producer.body_template(template, body, content_type="", kind="")
        header_block = self._header_block(template, body, job_id)
        family, tenant, print_ = template.family, template.lane.tenant, ""
        if by_caller and family.fingerprint is not None:
            print_ = await self._producer.fingerprints.of_new(family, tenant, job_id, header_block, body)
        if len(body) > self._producer.body_max:
            ack = await self._producer.store_with_documents(
                None, template, header_block, body, on_full, end, by_caller=by_caller
            )
        else:
            ack = await self._producer.store(template, header_block, body, on_full, end)
        if print_ and ack.duplicate:
            await self._producer.fingerprints.check_stored(family, tenant, job_id, print_, ack.stream, ack.seq)
        return Published(job_id, ack.stream, ack.seq, ack.duplicate and by_caller)

    def _header_block(self, template: JobTemplate, body: bytes, job_id: str) -> bytes:
        """Return the encoded headers of a job that is published without headers."""
        content_type = _format_of(body)
        is_bare = bool(content_type) and b"message_type" not in body and b"\\u" not in body
        key = template.subject, template.key, content_type, is_bare
        known = self._blocks.get(key)
        if known is None:
            family, tenant, priority, _key = template.lane
            fields = {headers.MSG_ID: subjects.msg_id(family, tenant, "%b")}
            fields |= {headers.CONTENT_TYPE: content_type} if content_type else {}
            fields |= {headers.KIND: template.family.default_kind} if is_bare else {}
            if len(self._blocks) >= TEMPLATES_MAX:
                self._blocks.clear()
            fields |= {headers.JOB_ID: "%b", headers.PRIORITY: priority}
            fields |= {name: value.replace("%", "%%") for name, value in key_headers(template.key).items()}
            known = self._blocks[key] = block(fields)
        encoded_id = job_id.encode()
        return known % (encoded_id, encoded_id)

    async def _store_mail(
        self, route: Route, subject: str, body: bytes, mail_headers: dict[str, str], end: float, on_full: OnFull
    ) -> Published:
        """Store a mail in the inbox that it names. Without a target, all inboxes of the tenant's roster get it."""
        family, to = route.family, route.last or mail_headers.get(headers.TARGET, "")
        assert family is not None
        _check_ids(family, mail_headers)
        if mail_headers.get(headers.TARGET) == "":
            raise BadInput(
                f"the header {headers.TARGET} is empty: name an agent, or leave it out to reach the whole roster"
            )
        if headers.SOURCE in mail_headers:
            subjects.token(headers.SOURCE, mail_headers[headers.SOURCE])
        msg_id = mail_headers.pop(headers.MSG_ID, "")
        if msg_id:
            mail_headers.setdefault(headers.JOB_ID, subjects.foreign_id(msg_id))

        async def store_in_inbox(left_s: float) -> Sent:
            return await self._inboxes.send_encoded(body, mail_headers, tenant=route.tenant, to=to, timeout_s=left_s)

        async def store_for_roster(left_s: float) -> PubAck:
            return await self._connection.store(subject, body, mail_headers, timeout_s=left_s)

        left_s = max(0.0, end - time.monotonic())
        if to:
            sent = await retry_while_full(store_in_inbox, None, on_full, left_s)
            return Published(sent.mail_id, family.stream, sent.seq, sent.duplicate)
        given_id = headers.JOB_ID in mail_headers
        mail_id = mail_headers.setdefault(headers.JOB_ID, subjects.new_id())
        mail_headers[headers.MSG_ID] = subjects.msg_id(family.name, route.tenant, subjects.foreign_id(mail_id))
        ack = await retry_while_full(store_for_roster, None, on_full, left_s)
        return Published(mail_id, ack.stream, ack.seq, ack.duplicate and given_id)

    def _template(self, family: Family, tenant: str, priority: str) -> JobTemplate:
        """Return what all jobs of a lane have in common. Raises BadInput for an unknown priority."""
        key = family.name, tenant, priority
        template = self._templates.get(key)
        if template is None:
            if len(self._templates) >= TEMPLATES_MAX:
                self._templates.clear()
            template = self._templates[key] = self._producer.lane_template(family, tenant, priority)
        return template

    def _find_id(
        self, family: Family, tenant: str, job_headers: dict[str, str], body: bytes, *, bare_id: bool = False
    ) -> str | None:
        """Return the id of a job as workers find it, and from a Nats-Msg-Id too; None if nothing names one.

        `bare_id`: the whole body may be an id.
        """
        found = job_headers.get(headers.JOB_ID) or headers.find(job_headers, family.key or "")
        if not found:
            found = _id_in_body(family, job_headers, body, bare_id=bare_id)
        if not found and (msg_id := job_headers.get(headers.MSG_ID)):
            named = msg_id.removeprefix(subjects.msg_id(family.name, tenant, ""))
            if not named:
                raise BadInput(f"the header {headers.MSG_ID} names no id: use {msg_id}{{id}}, or leave it out")
            found = job_headers[headers.JOB_ID] = subjects.foreign_id(named)
        return subjects.foreign_id(found) if found else None


def _id_in_body(family: Family, job_headers: Mapping[str, str], body: bytes, *, bare_id: bool) -> str | None:
    """Return the value of the family's key in a body. A body without the key's name is not decoded.

    None and an empty text, as defaults of a model's field, are no id. Raises BadInput for any other value that is none.
    """
    if bare_id and (found := find_bare_id(body, job_headers.get(headers.CONTENT_TYPE, ""))):
        return found
    value = _fields_of(family, job_headers, body, (family.key,)).get(family.key) if family.key else None
    if value is None or value == "":
        return None
    if subjects.id_in_message(value) is None:
        raise BadInput(f"{family.key} in the payload must be a text or a whole number, or left out, not {value!r:.80}")
    return str(value)


def _fields_of(family: Family, job_headers: Mapping[str, str], body: bytes, names: Collection[str]) -> dict[str, Any]:
    """Return the fields of the message in a body; none of one that cannot be decoded.

    A body without any of these `names` is not decoded.
    """
    if b"\\u" not in body and not any(name.encode() in body for name in names):
        return {}
    with contextlib.suppress(DecodeError):
        return codec.decode_message(
            body, content_type=job_headers.get(headers.CONTENT_TYPE, ""), kind=job_headers.get(headers.KIND, ""),
            default_kind=family.default_kind, aliases=family.aliases,
        ).data  # fmt: skip
    return {}


def _check_fields(family: Family, given: Mapping[str, str], body: bytes) -> None:
    """Raise BadInput for a header that contradicts the body, in a family with `header_fields`."""
    stated = [name for name in family.header_fields if headers.find(given, name)]
    if stated and (problem := headers.take_fields(given, stated, _fields_of(family, given, body, stated))):
        raise BadInput(problem)


def _check_ids(family: Family, given: Mapping[str, str]) -> None:
    """Raise BadInput for a header that is to name an id, and is empty: all messages that carry it would be one."""
    for name in (headers.JOB_ID, headers.MSG_ID, family.key):
        if name and headers.find(given, name) == "":
            raise BadInput(f"the header {name} is empty: set an id, or leave the header out for a new one")


def _format_of(body: bytes) -> str:
    """Return the content type of a map in JSON or CBOR, by its first byte; "" for anything else."""
    first = body[0] if body else 0
    if first == _JSON_MAP:
        return codec.JSON
    return codec.CBOR if first in _CBOR_MAPS else ""


def _checked_headers(given: Mapping[str, str] | None) -> dict[str, str]:
    """Return a copy of a caller's headers as they arrive: our names in our case, values without spaces around them.

    Raises BadInput.
    """
    if given is not None and not isinstance(given, Mapping):
        raise BadInput(f'headers must be a mapping of names to texts, such as {{"request_id": "7"}}, not {given!r}')
    copied = {name: value.strip(" ") if isinstance(value, str) else value for name, value in (given or {}).items()}
    if not all(isinstance(name, str) for name in copied):
        raise BadInput(f"the names of headers must be texts, not {next(n for n in copied if not isinstance(n, str))!r}")
    for name, value in copied.items():
        if not isinstance(value, str):
            raise BadInput(f"the value of header {name!r} must be a text, not {value!r:.80}: write str(…)")
    headers.restore_case(copied)
    return copied
