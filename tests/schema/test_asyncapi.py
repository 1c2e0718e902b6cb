"""What an AsyncAPI document says of families, kinds, headers and servers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import Settings, Topology, headers
from aiqueue.schema import HandledKind, describe_servers, make_asyncapi
from aiqueue.schema.kinds import select

from ..support import ROOT
from .documents import find, print_schema
from .test_stored import all_headers

EVERY = ("tests.schema.programs:worker", "tests.schema.programs:agents")


@pytest.fixture(scope="module")
def document() -> Any:
    return print_schema(*EVERY)


def make(*kinds: HandledKind, topology: Topology | None = None) -> Any:
    topology = topology or Topology.load()
    selected = select(topology, kinds, sources=["app:worker"], families=None, names=None)
    return make_asyncapi(topology, selected, title="t", api_version="1", version="0", servers={})


def test_a_family_has_its_subjects_with_their_parameters(document: Any) -> None:
    channels = document["channels"]
    assert {name: each["address"] for name, each in channels.items() if name.startswith(("gateway.", "agent.m"))} == {
        "agent.message": "ai.agent.message.{tenant}",
        "agent.message.inbox": "ai.agent.message.{tenant}.{agent}",
        "gateway.requests": "ai.gateway.requests.{tenant}",
        "gateway.requests.priority": "ai.gateway.requests.{tenant}.{priority}",
        "gateway.requests.limited": "ai.gateway.requests.{tenant}.{priority}.{key}",
        "gateway.requests.results": "ai.gateway.responses.{tenant}.{job_id}",
        "gateway.requests.requests": "ai.gateway.responses.{tenant}",
        "gateway.requests.replies": None,
    }
    priority = channels["gateway.requests.priority"]["parameters"]["priority"]
    assert priority["enum"] == ["high", "normal", "low", "batch"]
    assert priority["default"] == "normal"
    assert channels["agent.message.inbox"]["parameters"]["agent"]["enum"] == ["reader", "writer"]
    assert "agent.tasks.limited" not in channels
    assert "agent.tasks.requests" not in channels


def test_each_kind_is_sent_and_received(document: Any) -> None:
    operations = document["operations"]
    for name in ("send", "send-priority", "receive"):
        operation = operations[f"{name}.agent.tasks.every_thing"]
        assert operation["action"] == name.partition("-")[0]
        (message,) = (find(document, find(document, each["$ref"])["$ref"]) for each in operation["messages"])
        assert message["name"] == "every:thing"
        assert message["headers"]["properties"]["Aiq-Kind"] == {"const": "every:thing"}
    assert operations["receive-limited.gateway.requests"]["action"] == "receive"
    assert "with-priority" not in " ".join(operations)


def test_a_kind_is_required_unless_it_is_the_default_one(document: Any) -> None:
    messages = document["components"]["messages"]
    assert messages["message.agent.tasks.quiet"]["headers"]["required"] == ["Aiq-Kind"]
    assert "required" not in messages["message.agent.tasks.agent.task"]["headers"]


def test_a_handler_without_results_has_none_in_the_document(document: Any) -> None:
    replies = document["operations"]["send.agent.tasks.quiet"]["reply"]["messages"]
    assert [each["$ref"].rpartition("/")[2] for each in replies] == ["entry.failed", "entry.cancelled"]
    assert "result.agent.tasks.quiet" not in document["components"]["messages"]
    assert "result.agent.tasks.aliased" in document["components"]["messages"]


def test_a_handler_of_every_kind_takes_any_message(document: Any) -> None:
    message = document["components"]["messages"]["message.rag.queries.any"]
    assert find(document, message["payload"]["$ref"]) == {"type": "object"}
    assert "properties" not in message["headers"]


def test_the_secret_fields_of_a_kind_are_named_as_its_jobs_name_them(document: Any) -> None:
    named = document["components"]["messages"]["message.agent.tasks.secrets"]["headers"]["properties"]["Aiq-Secret"]
    assert named["examples"] == ["/key /login/password /logins/*/password"]
    assert "Aiq-Secret" not in document["components"]["messages"]["message.agent.tasks.quiet"]["headers"]["properties"]


def test_a_bounce_is_received_and_never_sent() -> None:
    bounce = HandledKind("agent.message", "agent.bounce", aiqueue.agent.Bounce, is_sent=False, agents=("writer",))
    assert list(make(bounce)["operations"]) == ["receive.agent.message.agent.bounce"]


def test_a_family_of_ones_own_is_described_too(streams: Path) -> None:
    class Small(aiqueue.Message, kind="small", family="small.jobs"):
        n: int

    made = make(HandledKind("small.jobs", "small", Small), topology=Topology.load(streams))
    assert made["channels"]["small.jobs"]["x-aiqueue"]["stream"] == "SMALL"
    assert made["channels"]["small.jobs"]["x-aiqueue"]["max_msgs_per_subject"] == 3
    assert "ticket" in made["components"]["schemas"]["headers.small.jobs"]["properties"]


def _table(section: str) -> set[str]:
    """The names in the first column of a section's first table in the wire contract."""
    page = "".join(each.read_text() for each in ROOT.glob("docs/reference/wire/*.md"))
    rows = page.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    table = rows[rows.index("|---") :].partition("\n\n")[0]
    return {name for row in table.splitlines()[1:] for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def test_the_headers_are_those_of_the_wire_contract(document: Any) -> None:
    schemas = print_schema()["components"]["schemas"]
    jobs = {name for key in ("agent.tasks", "gateway.requests", "rag.ingest", "rag.queries")
            for name in all_headers(document, schemas[f"headers.{key}"])}  # fmt: skip
    wanted = _table("Headers of a job") - {"header_fields", "model", "traceparent", "tracestate"}
    assert wanted <= jobs
    assert jobs - wanted == {"model"}
    assert set(schemas["headers.agent.message"]["properties"]) - {"Content-Type"} == _table("Mail")
    entries = set(schemas["headers.entry"]["properties"])
    servers = {headers.MSG_ID, headers.EXPECTED, headers.TTL}
    assert entries - {headers.DOCUMENT, headers.DOCUMENT_SIZE, headers.DOCUMENT_REF} <= _table("Journals")
    assert _table("Journals") - entries - servers == {"Aiq-Parked", "Aiq-Fingerprint"}  # no reader needs them


def test_each_event_of_a_journal_has_a_message(document: Any) -> None:
    page = (ROOT / "docs/reference/wire/journals.md").read_text()
    events = re.findall(r"^\| `(\w+)` \| ", page.partition("\n| event | body |")[2].partition("\n\n")[0], re.MULTILINE)
    messages = document["components"]["messages"]
    assert {each for each in events if each != "result"} == {
        message["name"]
        for name, message in messages.items()
        if name.startswith("entry.") and message["name"] != "result"
    }


@pytest.mark.parametrize(
    ("options", "servers", "security"),
    [
        ({"url": "nats://one:4222"}, {"server": ("one:4222", "nats")}, None),
        ({"url": "nats://me:s3cret@one"}, {"server": ("one:4222", "nats")}, "userPassword"),
        ({"url": "nats://t0ken@one"}, {"server": ("one:4222", "nats")}, "apiKey"),
        ({"url": "tls://one", "user": "me", "password": "s3cret"}, {"server": ("one:4222", "nats")}, "userPassword"),
        ({"url": "tls://one", "token": "t0ken"}, {"server": ("one:4222", "nats")}, "apiKey"),
        ({"url": "tls://one", "creds": "s3cret.creds"}, {"server": ("one:4222", "nats")}, "asymmetricEncryption"),
        ({"url": "tls://one", "nkey": "s3cret.nk"}, {"server": ("one:4222", "nats")}, "asymmetricEncryption"),
        (
            {"url": "nats://me:s3cret@one,ws://two:80/path"},
            {"server-1": ("one:4222", "nats"), "server-2": ("two:80", "ws")},
            "userPassword",
        ),
    ],
)
def test_servers_are_named_without_secrets(
    options: dict[str, Any], servers: Any, security: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("NATS_URL", "AIQUEUE_URL", "AIQUEUE_USER", "AIQUEUE_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    found = describe_servers(Settings(**options))
    assert {name: (each["host"], each["protocol"]) for name, each in found.items()} == servers
    assert all(
        [part["type"] for part in each.get("security", [])] == ([security] if security else [])
        for each in found.values()
    )
    assert not re.search("s3cret|t0ken|me:", str(found))


def test_the_embedded_server_has_no_address_to_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("NATS_URL", "AIQUEUE_URL"):
        monkeypatch.delenv(name, raising=False)
    assert describe_servers(Settings()) == {}
