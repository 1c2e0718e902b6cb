"""An AsyncAPI 3 document of families and kinds: what to publish where, and where its result is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from .. import codec, headers, subjects
from ..codec import secret_paths
from ..job import ANY_KIND
from ..journal import LIVE
from ..topology import Family, Topology
from ..units import short_duration
from .drafts import COMPONENTS, to_draft07
from .entry_schemas import ENDINGS, ENTRIES, LARGE_RESULT, REPLY_ERROR
from .header_schemas import entry_headers, job_headers, mail_headers, reply_headers, stated
from .kinds import HandledKind, Selection, component_names
from .payloads import PayloadSchemas, describe_payloads, title_of

ASYNCAPI: Final = "3.0.0"  # the version of the specification
_NS = 1_000_000_000
_TENANT = {"description": "Whose the message is: 1 to 64 characters of A-Z a-z 0-9 _ -", "examples": ["acme"]}
_AGENT = {"description": "The name of the agent whose inbox it is."}
_ABOUT = """\
The messages that aiqueue's workers and agents take, and the results that they return, over NATS JetStream.

To enqueue a job, publish its payload by JetStream on the address of a channel, with the headers of the message, and
wait for the PubAck: then the job is stored. Without one, publish again with the same Nats-Msg-Id. A payload is JSON, or
CBOR with the header Content-Type: application/cbor. In CBOR, bytes are byte strings; whole numbers above 64 bits are
texts. The names of headers that begin with Nats- are compared exactly, those of others without regard to case. Headers
that are marked readOnly are set by aiqueue alone. Fields that a message does not have are ignored.
"""


def make_asyncapi(
    topology: Topology, selected: Selection, *, title: str, api_version: str, version: str, servers: dict[str, Any]
) -> dict[str, Any]:
    """Return the document of these kinds, by family. `version`: of aiqueue; `servers`: see `describe_servers`.

    Raises BadInput for a class that has no schema.
    """
    document = AsyncApiBuilder(topology, selected)
    for name, kinds in selected.items():
        family = topology.family(name)
        (document.add_mail if family.role == "inbox" else document.add_jobs)(family, kinds)
    return {
        "asyncapi": ASYNCAPI,
        "info": {"title": title, "version": api_version, "description": _ABOUT},
        "defaultContentType": codec.JSON,
        **({"servers": servers} if servers else {}),
        "channels": document.channels,
        "operations": document.operations,
        "components": {"messages": document.messages, "schemas": document.schemas},
        "x-aiqueue": {"version": version},
    }


class AsyncApiBuilder:
    """The parts of an AsyncAPI document, as they are added."""

    def __init__(self, topology: Topology, selected: Selection) -> None:
        kinds = [each for group in selected.values() for each in group]
        self._topology = topology
        self._names = component_names(selected)
        self._payloads: PayloadSchemas = describe_payloads(kinds)
        self.channels: dict[str, Any] = {}
        self.operations: dict[str, Any] = {}
        self.messages: dict[str, Any] = {}
        self.schemas = {name: to_draft07(each) for name, each in self._payloads.definitions.items()}

    # -- jobs

    def add_jobs(self, family: Family, kinds: Sequence[HandledKind]) -> None:
        """Add the channels and operations of a family with lanes."""
        self.schemas[f"headers.{family.name}"] = job_headers(family)
        messages = {each: self._add_message(family, each) for each in kinds}
        results = self._add_results(family, kinds)
        self._add_lanes(family, list(messages.values()))
        replies = self._add_requests(family, list(messages.values()), results) if family.reply_within_s else {}
        for kind, message in messages.items():
            name, reply = self._names[kind.family, kind.name], results[kind]
            answer = {"channel": _channel(f"{family.name}.results"), "messages": _in(f"{family.name}.results", reply)}
            self._add_operation(
                f"send.{name}",
                "send",
                family.name,
                [message],
                f"Enqueue {kind.what} with normal priority.",
                reply=answer,
            )
            if len(family.priorities) > 1:
                self._add_operation(
                    f"send-priority.{name}", "send", f"{family.name}.priority", [message],
                    f"Enqueue {kind.what} with a priority.", reply=answer,
                )  # fmt: skip
            self._add_operation(
                f"receive.{name}",
                "receive",
                f"{family.name}.priority",
                [message],
                f"Work on {kind.what}.",
                reply=answer,
            )
            if replies:
                replied = {"channel": _channel(f"{family.name}.replies"), "messages": replies[kind]}
                self._add_operation(
                    f"request.{name}", "send", f"{family.name}.requests", [message],
                    f"Ask for the result of {kind.what}, which is enqueued unless its id is known.", reply=replied,
                )  # fmt: skip

    def _add_lanes(self, family: Family, messages: Sequence[str]) -> None:
        stream = self._topology.streams[family.stream].config
        window = short_duration(stream["duplicate_window"] / _NS) if "duplicate_window" in stream else "some time"
        facts = {
            "family": family.name, "stream": family.stream, "default_kind": family.default_kind, "key": family.key,
            "aliases": dict(family.aliases), "schema_versions": list(family.schema_versions),
            "max_msgs_per_subject": family.max_msgs_per_subject,
        }  # fmt: skip
        priority = {
            "description": "Higher ones are run first.", "enum": list(family.priorities), "default": subjects.NORMAL,
        }  # fmt: skip
        self._add_channel(
            family.name, _bare_subject(family), messages, {"tenant": _TENANT}, facts=facts,
            about=f"Jobs of {family.name} with normal priority. A Nats-Msg-Id is remembered for {window}. A full lane "
            "refuses the job with error 10077; without a JetStream publish it does so silently.",
        )  # fmt: skip
        self._add_channel(
            f"{family.name}.priority", subjects.lane(family.name, "{tenant}", "{priority}"), messages,
            {"tenant": _TENANT, "priority": priority}, facts=facts, about=f"Jobs of {family.name} with a priority.",
        )  # fmt: skip
        if family.limit_key is None:
            return
        key = {"description": f"The first 32 hexadecimal digits of the SHA-256 of the value, or {subjects.REST}."}
        self._add_channel(
            f"{family.name}.limited", subjects.lane(family.name, "{tenant}", "{priority}", "{key}"), messages,
            {"tenant": _TENANT, "priority": priority, "key": key}, facts=facts,
            about=f"Jobs of a value of {family.limit_key} that a limit holds for. Only aiqueue publishes here.",
        )  # fmt: skip
        self._add_operation(
            f"receive-limited.{family.name}", "receive", f"{family.name}.limited", messages,
            f"Work on jobs of a limited {family.limit_key}.",
        )  # fmt: skip

    def _add_results(self, family: Family, kinds: Sequence[HandledKind]) -> dict[HandledKind, list[str]]:
        """Add the journal of a family, and return the messages that end a job of each kind."""
        self.schemas["headers.entry"] = entry_headers()
        for event, entry in ENTRIES.items():
            self._put_entry(f"entry.{event}", event, entry["summary"], entry["payload"])
        self._put_entry(
            "entry.large-result", "result", "A result that is too large for an entry.", LARGE_RESULT,
            {"allOf": [stated(headers.EVENT, const="result"), stated(headers.DOCUMENT)]},
        )  # fmt: skip
        ends: dict[HandledKind, list[str]] = {}
        for kind in kinds:
            ends[kind] = [f"entry.{each}" for each in ENDINGS]
            if kind.keeps_result:
                key = kind.family, kind.name
                result = f"result.{self._names[key]}"
                payload = to_draft07(self._payloads.results.get(key, {"description": "Any value."}))
                self._put_entry(result, "result", f"The result of {kind.what}.", payload)
                ends[kind] = [result, "entry.large-result", *ends[kind]]
        journal, stream = subjects.journal(family.journal or "", "{tenant}", "{job_id}"), self._topology.journal_stream
        others = [f"entry.{each}" for each in ENTRIES if each not in ENDINGS]
        job_id = {
            "description": "The job's id. A job without one gets an id that its publisher does not learn.",
            "location": f"$message.header#/{headers.JOB_ID}",
        }
        self._add_channel(
            f"{family.name}.results", journal, [*dict.fromkeys(m for each in ends.values() for m in each), *others],
            {"tenant": _TENANT, "job_id": job_id},
            facts={"stream": stream.name, "live": f"{LIVE}.{journal}"},
            about=(
                f"The journal of a job: results and errors, kept in the stream {stream.name}. The server repeats each "
                f"entry at once on {LIVE}.{journal}. To wait for a job, subscribe there, publish the job, then read "
                "the last message of this subject by direct get: the job may have ended already."
            ),
        )  # fmt: skip
        return ends

    def _add_requests(
        self, family: Family, messages: Sequence[str], results: dict[HandledKind, list[str]]
    ) -> dict[HandledKind, list[dict[str, str]]]:
        """Add the request and reply of a family with responders, and return the replies to each kind."""
        channel, error = f"{family.name}.replies", "reply.error"
        self.schemas["headers.reply"] = reply_headers()
        self.messages[error] = {
            "name": "error", "summary": "Why there is no result.", "payload": REPLY_ERROR,
            "headers": {"allOf": [_schema("headers.reply"), stated("Nats-Service-Error-Code")], "type": "object"},
        }  # fmt: skip
        large = {"allOf": [_schema("headers.reply"), stated(headers.DOCUMENT)], "type": "object"}
        self.messages["reply.large-result"] = {**self.messages["entry.large-result"], "headers": large}
        del self.messages["reply.large-result"]["contentType"]
        replies: dict[HandledKind, list[str]] = {}
        for kind, ends in results.items():
            replies[kind] = [error]
            if kind.keeps_result:
                name = f"reply.{self._names[kind.family, kind.name]}"
                self.messages[name] = {**self.messages[ends[0]], "headers": _schema("headers.reply")}
                del self.messages[name]["contentType"]  # that of the request
                replies[kind] = [name, "reply.large-result", error]
        self._add_channel(
            f"{family.name}.requests", f"{family.journal}.{{tenant}}", messages, {"tenant": _TENANT},
            about=(
                f"Requests for results, which responders answer within {short_duration(family.reply_within_s or 0)}. "
                "No stream stores them. The payload may also be the id of a job alone, as text."
            ),
        )  # fmt: skip
        self._add_channel(
            channel, None, dict.fromkeys(each for found in replies.values() for each in found), {},
            about="The reply subject of a request.",
        )  # fmt: skip
        return {kind: _in(channel, found) for kind, found in replies.items()}

    # -- mail

    def add_mail(self, family: Family, kinds: Sequence[HandledKind]) -> None:
        """Add the channels and operations of an inbox family."""
        self.schemas[f"headers.{family.name}"] = mail_headers(family)
        messages = {each: self._add_message(family, each) for each in kinds}
        agents = sorted({agent for each in kinds for agent in each.agents})
        facts = {"family": family.name, "stream": family.stream, "default_kind": family.default_kind}
        self._add_channel(
            family.name, _bare_subject(family), messages.values(), {"tenant": _TENANT}, facts=facts,
            about=f"Mail for the inbox that the header {headers.TARGET} names.",
        )  # fmt: skip
        self._add_channel(
            f"{family.name}.inbox", subjects.inbox_filter(family.name, "{tenant}", "{agent}"), messages.values(),
            {"tenant": _TENANT, "agent": {**_AGENT, **({"enum": agents} if agents else {})}}, facts=facts,
            about="The inbox of an agent. The mail is there when the PubAck comes, whether the agent runs or not.",
        )  # fmt: skip
        for kind, message in messages.items():
            name = self._names[kind.family, kind.name]
            if kind.is_sent:
                self._add_operation(
                    f"send.{name}", "send", f"{family.name}.inbox", [message], f"Send {kind.what} to an agent."
                )
                self._add_operation(
                    f"send-by-header.{name}", "send", family.name, [message],
                    f"Send {kind.what} to the agent in {headers.TARGET}, or to all.",
                )  # fmt: skip
            by = f" by {', '.join(kind.agents)}" if kind.agents else ""
            self._add_operation(
                f"receive.{name}", "receive", f"{family.name}.inbox", [message], f"Handle {kind.what}{by}."
            )

    # -- parts

    def _add_message(self, family: Family, kind: HandledKind) -> str:
        """Add the message of a kind, and return its name."""
        name = f"message.{self._names[kind.family, kind.name]}"
        schema = self._payloads.messages.get((kind.family, kind.name), {"type": "object"})
        self.schemas[name] = to_draft07(schema)
        made_headers: dict[str, Any] = {"type": "object", "allOf": [_schema(f"headers.{family.name}")]}
        if kind.name != ANY_KIND:
            made_headers["properties"] = {headers.KIND: {"const": kind.name}}
            if kind.name != family.default_kind:
                made_headers["required"] = [headers.KIND]
        if kind.model is not None and (secrets := secret_paths.header_of_class(kind.model)):
            made_headers.setdefault("properties", {})[headers.SECRET] = {"type": "string", "examples": [secrets]}
        self.messages[name] = {
            "name": kind.name if kind.name != ANY_KIND else "any",
            "title": title_of(kind.model) if kind.model else "Any",
            "summary": f"{kind.what[0].upper()}{kind.what[1:]}.", "contentType": codec.JSON,
            "headers": made_headers, "payload": _schema(name),
            "correlationId": {"location": f"$message.header#/{headers.JOB_ID}"},
        }  # fmt: skip
        return name

    def _put_entry(
        self, name: str, event: str, summary: str, payload: Any, more_headers: dict[str, Any] | None = None
    ) -> None:
        self.schemas[name] = payload
        self.messages[name] = {
            "name": event, "summary": summary, "contentType": codec.CBOR, "payload": _schema(name),
            "headers": {
                "type": "object",
                "allOf": [_schema("headers.entry"), more_headers or stated(headers.EVENT, const=event)],
            },
        }  # fmt: skip

    def _add_channel(
        self,
        name: str,
        address: str | None,
        messages: Iterable[str],
        parameters: dict[str, Any],
        *,
        about: str,
        facts: dict[str, Any] | None = None,
    ) -> None:
        channel: dict[str, Any] = {"address": address, "description": about}
        channel["messages"] = {each: {"$ref": f"#/components/messages/{each}"} for each in messages}
        if parameters:
            channel["parameters"] = parameters
        self.channels[name] = {**channel, **({"x-aiqueue": facts} if facts else {})}

    def _add_operation(
        self, name: str, action: str, channel: str, messages: Iterable[str], about: str, *, reply: Any = None
    ) -> None:
        made = {"action": action, "channel": _channel(channel), "summary": about, "messages": _in(channel, messages)}
        self.operations[name] = {**made, **({"reply": reply} if reply else {})}


def _bare_subject(family: Family) -> str:
    return subjects.lane(family.name, "{tenant}", "").removesuffix(".")


def _channel(name: str) -> dict[str, str]:
    return {"$ref": f"#/channels/{name}"}


def _in(channel: str, messages: Iterable[str]) -> list[dict[str, str]]:
    """Return references to messages as those of a channel."""
    return [{"$ref": f"#/channels/{channel}/messages/{each}"} for each in messages]


def _schema(name: str) -> dict[str, str]:
    return {"$ref": f"{COMPONENTS}{name}"}
