"""The headers of jobs, mails and journal entries as schemas: the tables of docs/reference/wire."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from .. import codec, headers, subjects
from ..job import KIND
from ..topology import Family

_TOKEN = f"^{subjects.TOKEN.pattern}$"
_NUMBER = r"^[0-9]+(\.[0-9]+)?$"
_BODIES = {"enum": [codec.JSON, codec.CBOR]}


class HeaderField(NamedTuple):
    """A header: what it means, and what its value looks like. `ours`: only aiqueue sets it."""

    name: str
    about: str
    value: Mapping[str, Any] = MappingProxyType({})
    ours: bool = False

    def schema(self) -> dict[str, Any]:
        """Return the schema of the value, which is a text as in every header of NATS."""
        return {"type": "string", "description": self.about, **self.value, **({"readOnly": True} if self.ours else {})}


_COMMON = (
    HeaderField(
        headers.CONTENT_TYPE,
        "Of the body: aiqueue's clients write CBOR. Without it, the body shows which it is.",
        _BODIES,
    ),
    HeaderField(
        headers.KIND,
        "The kind. With it, the body is the bare message; without it, an envelope, or the family's default kind.",
        {"pattern": f"^{KIND.pattern}$"},
    ),
    HeaderField(
        headers.UNIQUE,
        "The key of which the id is a hash (x and 40 hexadecimal digits of its SHA-256), percent-encoded, for people.",
    ),
    HeaderField(
        headers.SECRET,
        "Which fields of the body are secret, as paths separated by spaces, for tools to mask them: /key /users/*/key.",
    ),
    HeaderField(
        headers.DEADLINE,
        "Milliseconds since the epoch. What has not started by then fails.",
        {"pattern": _NUMBER},
    ),
)
_DOCUMENTS = (
    HeaderField(
        headers.DOCUMENT,
        "The body is the document with this SHA-256 in the object store AI_DOCUMENTS; the message itself has none.",
        {"pattern": "^[0-9a-f]{64}$"},
    ),
    HeaderField(headers.DOCUMENT_SIZE, "The size of that document in bytes.", {"pattern": "^[0-9]+$"}),
    HeaderField(headers.DOCUMENT_REF, "The name of the hold on that document."),
)
_JOB_OURS = (
    HeaderField(headers.RESUMES, "Of a replay: the run whose checkpoints the job goes on from.", ours=True),
    HeaderField(
        headers.FIRST_STORED, "Of a job that was stored anew: when, and with which sequence, first.", ours=True
    ),
    HeaderField(headers.SCHEDULED_BY, "The schedule that has made the job.", ours=True),
    HeaderField(headers.SCHEDULED_FOR, "Its tick, in seconds since the epoch.", {"pattern": _NUMBER}, ours=True),
    HeaderField(headers.PARENT, "Of a child: the run that has enqueued it.", ours=True),
    HeaderField(headers.ROOT, "Of a child: the first of its ancestors.", ours=True),
    HeaderField(headers.DEPTH, "Of a child: how many ancestors it has.", {"pattern": "^[0-9]+$"}, ours=True),
    HeaderField(headers.GATHER, "Of a job that has waited for its children: the number of its last wait.", ours=True),
    HeaderField(headers.HISTORY, "Of a replay: the failed attempts before, in JSON.", ours=True),
    HeaderField(headers.REPLAY, "Of a replay: how often the job was replayed.", {"pattern": "^[0-9]+$"}, ours=True),
)
_OF_FAMILY = {
    "gateway.requests": (
        HeaderField("Gateway-Api-Key", "The id of the API key to whose budget the calls are charged, too."),
        HeaderField("Gateway-Batch", "Of a line of a batch: the batch from whose reservation it is paid.", ours=True),
        HeaderField("Gateway-Fallback-Of", "Of a call of a fallback: the model that was asked for.", ours=True),
        HeaderField("Gateway-Request-Id", "Of a call of a fallback: the id of the request.", ours=True),
    ),
    "rag.ingest": (
        HeaderField("document_id", "The document, where the body names none. It is not the job's id."),
    ),
}  # fmt: skip


def job_headers(family: Family) -> dict[str, Any]:
    """Return the schema of the headers of a family's jobs. Any other header reaches the handler as it is."""
    fields = [
        _message_id(family, "{job id}"),
        HeaderField(
            headers.JOB_ID,
            "The job's id, the last token of its journal's subject. Choose one that no other job has.",
            {"pattern": _TOKEN},
        ),
        *_COMMON,
        *_DOCUMENTS,
        HeaderField(
            headers.PRIORITY,
            "The subject sets the priority. A job on the subject without one moves to a lower one that it names here.",
            {"enum": list(family.priorities)},
        ),
        *_JOB_OURS,
        *_OF_FAMILY.get(family.name, ()),
    ]
    if family.key:
        fields.append(
            HeaderField(family.key, f"The job's id, if there is no {headers.JOB_ID}. So is the body's field.")
        )
    if family.limit_key:
        about = f"Of a job of a limited key: the value of {family.limit_key}, percent-encoded."
        fields.append(HeaderField(headers.LIMIT_KEY, about, ours=True))
    fields += [
        HeaderField(each, f"The body's field {each}, for a body without it. Where both have it, both must be equal.")
        for each in family.header_fields
    ]
    return _object(fields)


def mail_headers(family: Family) -> dict[str, Any]:
    """Return the schema of the headers of mail in an inbox family."""
    fields = (
        _message_id(family, "{mail id}/{agent}"),
        HeaderField(headers.JOB_ID, "The mail's id.", {"pattern": _TOKEN}),
        *_COMMON,
        HeaderField(
            headers.TARGET,
            "On the subject without an agent: whose inbox gets the mail. Without it, all of the tenant's roster.",
            {"pattern": _TOKEN},
        ),
        HeaderField(headers.SOURCE, "The sender, which gets replies and bounces.", {"pattern": _TOKEN}),
        HeaderField(
            headers.CONVERSATION, "Mails of one conversation are handled one at a time. Default: the mail's id."
        ),
        HeaderField(headers.CORRELATION, "Of a reply: the id of the mail that it answers."),
        HeaderField(headers.BROADCAST, "The mail was sent to a whole roster.", ours=True),
        HeaderField(headers.COPY, "A copy, for subscribers, of a mail that is in its inbox already.", ours=True),
    )
    return _object(fields)


def entry_headers() -> dict[str, Any]:
    """Return the schema of the headers of an entry of a journal."""
    fields = (
        HeaderField(headers.EVENT, "What the entry says. result, failed and cancelled end a run."),
        HeaderField(
            headers.RUN,
            "Which run of its id the entry is of: the sequence in the PubAck of the job. Of another run, ignore it.",
            {"pattern": "^[0-9]+$"},
        ),
        HeaderField(headers.ATTEMPT, "The attempt that has written the entry, from 1.", {"pattern": "^[0-9]+$"}),
        HeaderField(headers.EPOCH, "Grows with each attempt. Above that of the entry before: discard former output."),
        HeaderField(headers.CONTENT_TYPE, "Of the body.", {"const": codec.CBOR}),
        HeaderField(headers.SECRET, "Which fields of the body are secret."),
        HeaderField(
            headers.ENQUEUED, "When the job was stored first, in seconds since the epoch.", {"pattern": _NUMBER}
        ),
        HeaderField(
            headers.STARTED_AT, "When the handler was called, in seconds since the epoch.", {"pattern": _NUMBER}
        ),
        HeaderField(headers.READ_KIND, "The kind of the job. Of entries that end a run, if the kind is known."),
        HeaderField(headers.LOST, "How many chunks before this entry were dropped, because storage was full."),
        *_DOCUMENTS,
    )
    return _object(fields, required=[headers.EVENT, headers.RUN])


def reply_headers() -> dict[str, Any]:
    """Return the schema of the headers of a responder's reply."""
    fields = (
        HeaderField(headers.JOB_ID, "The id of the job that has answered."),
        HeaderField(headers.CONTENT_TYPE, "As of the request: a request in JSON has a reply in JSON.", _BODIES),
        HeaderField(headers.SECRET, "Which fields of the body are secret."),
        HeaderField("Nats-Service-Error", "Of an error: a line for people."),
        HeaderField("Nats-Service-Error-Code", "Of an error: its code, like HTTP's.", {"pattern": "^[0-9]+$"}),
        *_DOCUMENTS[:2],
    )
    return _object(fields)


def stated(name: str, **value: Any) -> dict[str, Any]:
    """Return the schema of headers in which this one is required, with such a value."""
    return {"type": "object", "required": [name], "properties": {name: {"type": "string", **value}}}


def _message_id(family: Family, ending: str) -> HeaderField:
    return HeaderField(
        headers.MSG_ID,
        f"{{tenant}}/{family.name}/{ending}. The server stores a message of an id once, so that a publish may be "
        "repeated. Without it, each publish is another message.",
    )


def _object(fields: Iterable[HeaderField], required: Iterable[str] = ()) -> dict[str, Any]:
    made = {
        "type": "object",
        "description": "All values are texts of printable ASCII.",
        "properties": {each.name: each.schema() for each in fields},
    }
    return {**made, "required": [*required]} if required else made
