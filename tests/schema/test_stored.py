"""What is really stored fits the documents: subjects, headers and bodies of jobs, mails, results and errors."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import cbor2
import nats
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nats.js.errors import NotFoundError

import aiqueue
from aiqueue.errors import EncodeError, JobFailed

from ..support import Account
from . import programs
from .documents import body, find, print_schema, problems, problems_2020
from .test_payloads import DOCUMENT, MESSAGES, NAMES

pytestmark = pytest.mark.families("agent.tasks", "gateway.requests", "rag.queries", "agent.message")
TARGETS = ("tests.schema.programs:worker", "tests.schema.programs:agents")


@pytest.fixture(scope="module")
def document() -> Any:
    return print_schema(*TARGETS)


@pytest.fixture(scope="module")
def bundle() -> Any:
    return print_schema(*TARGETS, "--format", "json-schema")


async def read_all(account: Account, stream: str) -> list[Any]:
    """All messages of a stream, as any client of NATS sees them."""
    nc = await nats.connect(account.url, user=account.user, password=account.password)
    js, found = nc.jetstream(), []
    state = (await js.stream_info(stream)).state
    for seq in range(state.first_seq, state.last_seq + 1):
        with contextlib.suppress(NotFoundError):
            found.append(await js.get_msg(stream, seq))
    await nc.close()
    return found


def address_of(channel: Any) -> str:
    """A pattern of a channel's subjects."""
    parts = re.split(r"\{[a-z_]+\}", channel["address"])
    return "[A-Za-z0-9_-]{1,64}".join(map(re.escape, parts))


def find_message(document: Any, subject: str, name: str, kind: str) -> Any:
    """The message of this name in a channel with the subject. `kind`: where it is of."""
    channels = [each for each in document["channels"].values() if each["address"]]
    of_subject = [each for each in channels if re.fullmatch(address_of(each), subject)]
    assert of_subject, subject
    for channel in of_subject:
        for each in channel["messages"].values():
            message = find(document, each["$ref"])
            if message["name"] == name and kind in each["$ref"]:
                return message
    raise AssertionError(f"no {name} on {subject}")


def check(document: Any, message: Any, stored: Any) -> None:
    headers = dict(stored.headers)
    assert problems(document, message["headers"], headers) == []
    assert set(headers) <= set(all_headers(document, message["headers"])), "a header that the document does not have"
    assert problems(document, message["payload"], body(stored.data, headers["Content-Type"])) == []


def all_headers(document: Any, schema: Any) -> set[str]:
    parts = [*schema.get("allOf", ()), *([find(document, schema["$ref"])] if "$ref" in schema else [])]
    return {*schema.get("properties", {}), *(name for each in parts for name in all_headers(document, each))}


SPECIMENS: list[aiqueue.Message[Any]] = [
    programs.Everything(text="a", blob=b"\x00\xff"),
    programs.Secrets(),
    programs.Read(task_id="r-1"),
    programs.Quiet(n=1),
    programs.Quiet(n=-1),
    programs.Ask(model="small", prompt="hello"),
]


async def test_jobs_their_results_and_errors_fit(client: aiqueue.Client, account: Account, document: Any) -> None:
    handles = [
        await client.enqueue(
            each, tenant="acme", priority=priority, unique=f"https://example.com/{number}/{priority}", deadline="1h",
            headers={"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
        )
        for number, each in enumerate(SPECIMENS)
        for priority in ("normal", "high")
    ]  # fmt: skip
    jobs = [each for stream in ("AI_AGENT_TASKS", "AI_GATEWAY_REQUESTS") for each in await read_all(account, stream)]
    assert len(jobs) == len(handles)
    for each in jobs:
        each.headers.pop("traceparent")  # any header may be there
        check(document, find_message(document, each.subject, each.headers["Aiq-Kind"], ""), each)
    async with programs.worker.running(client):
        for handle in handles:
            with contextlib.suppress(JobFailed, aiqueue.errors.ResultDisabled):
                await handle.result(20)
    kinds = {(each.subject.split(".")[1], each.headers["Aiq-Job-Id"]): each.headers["Aiq-Kind"] for each in jobs}
    entries = await read_all(account, "AI_RESULTS")
    assert {each.headers["Aiq-Event"] for each in entries} == {"result", "failed", "started"}
    for each in entries:
        event, kind = each.headers["Aiq-Event"], kinds[each.subject.split(".")[1], each.subject.split(".")[-1]]
        of_kind = f"result.{_named(kind)}" if event == "result" else f"entry.{event}"
        check_entry(document, find_message(document, each.subject, event, of_kind), each)


def _named(kind: str) -> str:
    family = "gateway.requests" if kind == "gateway.request" else "agent.tasks"
    return f"{family}.{kind.replace(':', '_')}"


def check_entry(document: Any, message: Any, entry: Any) -> None:
    assert problems(document, message["headers"], dict(entry.headers)) == []
    assert problems(document, message["payload"], cbor2.loads(entry.data)) == []


async def test_mail_fits(client: aiqueue.Client, account: Account, document: Any) -> None:
    await client.inboxes.send(programs.Note(text="a"), tenant="acme", to="reader", sender="writer", expires="1h")
    (mail,) = await read_all(account, "AI_AGENT_MESSAGE")
    assert mail.subject == "ai.agent.message.acme.reader"
    check(document, find_message(document, mail.subject, "note", ""), mail)


async def test_whatever_the_values_are_stored_jobs_fit(
    client: aiqueue.Client, account: Account, document: Any, bundle: Any
) -> None:
    made: list[aiqueue.Message[Any]] = []

    @settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
    @given(st.tuples(*MESSAGES.values()))
    def draw(some: tuple[aiqueue.Message[Any], ...]) -> None:
        made.extend(some)

    draw()
    await client.documents.put(DOCUMENT, tenant="acme")
    for each in made:
        with contextlib.suppress(EncodeError):
            await client.enqueue(each, tenant="acme")
    jobs = await read_all(account, "AI_AGENT_TASKS")
    assert len(jobs) > len(made) / 2
    names = {each.aiq_kind: name for each, name in NAMES.items()}
    for each in jobs:
        kind = each.headers["Aiq-Kind"]
        check(document, find_message(document, each.subject, kind, ""), each)
        assert problems_2020(bundle, f"message.{names[kind]}", body(each.data, each.headers["Content-Type"])) == []
