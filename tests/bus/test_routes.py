"""What subjects mean, to a publisher and to a subscriber."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiqueue.bus.routes import Route, is_stored, route_of_publish, route_of_subscription
from aiqueue.errors import BadInput
from aiqueue.topology import Topology

TOPOLOGY = Topology.load()


def published(subject: str) -> tuple[str, str, str, str]:
    return plain(route_of_publish(TOPOLOGY, subject))


def subscribed(subject: str, queue: str = "q") -> tuple[str, str, str, str]:
    return plain(route_of_subscription(TOPOLOGY, subject, queue))


def plain(route: Route) -> tuple[str, str, str, str]:
    return route.role, route.family.name if route.family else "", route.tenant, route.last


@pytest.mark.parametrize(
    ("subject", "route"),
    [
        ("ai.agent.tasks.acme", ("work", "agent.tasks", "acme", "")),
        ("ai.gateway.requests.acme.batch", ("work", "gateway.requests", "acme", "batch")),
        ("ai.agent.message.acme", ("inbox", "agent.message", "acme", "")),
        ("ai.agent.message.acme.reader", ("inbox", "agent.message", "acme", "reader")),
        ("ai.gateway.responses.acme", ("answers", "gateway.requests", "acme", "")),
        ("ai.rag.results.acme", ("answers", "rag.queries", "acme", "")),
        ("ai.rag.results.acme.q-1", ("plain", "", "", "")),  # a journal
        ("ai.agent.results.acme.t-1", ("plain", "", "", "")),
        ("ai.dead.agent.tasks.acme.t-1", ("plain", "", "", "")),
        ("ai.parked.at.agent.tasks.acme.high.t-1.new", ("plain", "", "", "")),
        ("ai.checkpoint.agent.tasks.acme.t-1.7-1700000000-ended", ("plain", "", "", "")),
        ("ai.gateway.usage.acme.0123", ("plain", "", "", "")),
        ("orders", ("plain", "", "", "")),
        ("aix.agent.task.acme", ("plain", "", "", "")),
        ("agent.task.acme", ("plain", "", "", "")),
        ("my.ai.agent.task.acme", ("plain", "", "", "")),
    ],
)
def test_a_publish_goes_by_the_wire_contract(subject: str, route: tuple[str, str, str, str]) -> None:
    assert published(subject) == route


@pytest.mark.parametrize(
    ("subject", "says"),
    [
        ("ai.agent.tasks", r"use ai\.agent\.tasks\.\{tenant\} or ai\.agent\.tasks\.\{tenant\}\.\{priority\}"),
        ("ai.agent.tasks.acme.high.x", "use ai.agent.tasks"),
        ("ai.agent.tasks.acme.urgent", "no priority 'urgent': use one of high, normal, low"),
        ("ai.agent.tasks.a@b", "tenant 'a@b' must be"),
        ("ai.agent.message.acme.a@b", "agent 'a@b' must be"),
        ("ai.rag.results.a@b", "tenant 'a@b' must be"),
        ("ai.agent.tasks.*", "has a wildcard: publish to one subject"),
        ("ai.agent.tasks.>", "has a wildcard"),
        ("a b", "without spaces"),
        ("a..b", "joined by dots"),
        ("", "joined by dots"),
        ("a\r\nPUB b 0", "without spaces"),
        (None, "not 'None'"),
        ("a" * 1_001, r"at most 1,000 characters, not 1,001$"),
        ("orders.a*", r"a wildcard, `\*` or `>`, must be a token of its own, as in orders\.\*"),
    ],
)
def test_a_publish_to_a_malformed_subject_is_refused(subject: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        published(subject)


@pytest.mark.parametrize(
    ("subject", "route"),
    [
        ("ai.agent.tasks.acme", ("work", "agent.tasks", "acme", "")),
        ("ai.agent.tasks.*", ("work", "agent.tasks", "*", "")),
        ("ai.agent.tasks.>", ("work", "agent.tasks", "*", "")),
        ("ai.agent.tasks.acme.*", ("work", "agent.tasks", "acme", "")),
        ("ai.agent.tasks.acme.>", ("work", "agent.tasks", "acme", "")),
        ("ai.agent.tasks.*.>", ("work", "agent.tasks", "*", "")),
        ("ai.agent.message.acme", ("inbox", "agent.message", "acme", "")),
        ("ai.agent.message.acme.reader", ("inbox", "agent.message", "acme", "reader")),
        ("ai.gateway.responses.*", ("answers", "gateway.requests", "*", "")),
        ("ai.gateway.responses.acme.>", ("plain", "", "", "")),
        ("orders.*", ("plain", "", "", "")),
        ("*.other.>", ("plain", "", "", "")),
        ("ai.rag.status.acme.>", ("plain", "", "", "")),
        ("ai.dead.>", ("plain", "", "", "")),
    ],
)
def test_a_subscription_with_a_queue_goes_by_the_wire_contract(subject: str, route: tuple[str, str, str, str]) -> None:
    assert subscribed(subject) == route


UNKNOWN = [
    ("ai.agent.task.acme", r"did you mean ai\.agent\.tasks\.acme\?"),
    ("ai.gateway.request.acme", r"did you mean ai\.gateway\.requests\.acme\?"),
    ("ai.gateway.response.acme", r"did you mean ai\.gateway\.responses\.acme\?"),
    ("ai.agnet.tasks.acme.high", r"did you mean ai\.agent\.tasks\.acme\.high\?"),
    ("AI.agent.tasks.acme", r"did you mean ai\.agent\.tasks\.acme\?"),
    ("ai.Agent.Tasks.acme", r"did you mean ai\.agent\.tasks\.acme\?"),
    ("ai.agent.messages.acme.bob", r"did you mean ai\.agent\.message\.acme\.bob\?"),
    ("ai.agent.result.acme.t-1", r"did you mean ai\.agent\.results\.acme\.t-1\?"),
    ("ai.rag.results", r"use ai\.rag\.results\.\{tenant\} or ai\.rag\.results\.\{tenant\}\.\{query_id\}\."),
    ("ai.rag.results.acme.q-1.x", r"use ai\.rag\.results\.\{tenant\}"),
    ("ai.agent.results.acme", r"use ai\.agent\.results\.\{tenant\}\.\{task_id\}\."),  # it answers no requests
    ("ai.tasks.acme", r"use ai\.agent\.tasks\.\{tenant\} or"),
    ("ai.dead.agent.task.acme.t-1", r"docs/reference/wire-contract\.md has the forms of ai\.dead"),
    ("ai.agent.results.acme", r"To request answers: agent\.results is optional: set families to"),
    (
        "ai.llmops.operations.acme",
        r'llmops\.operations is optional: set families to \["default", "llmops\.operations"\]',
    ),
    (
        "ai.mycompany.operators.acme",
        "begin with ai.agent.message, ai.agent.tasks, ai.gateway.batches, ai.gateway.requests, ai.rag.ingest, ai.r",
    ),
    ("ai.mycompany.events", "own must not begin with `ai.`; families of your own are declared in stream files"),
    ("ai", "the families' subjects begin with"),
]


@pytest.mark.parametrize(("subject", "says"), UNKNOWN)
def test_a_subject_that_begins_with_ai_and_is_in_no_contract_is_refused_with_the_nearest_one(
    subject: str, says: str
) -> None:
    for route in (published, subscribed, lambda subject: subscribed(subject, "")):
        with pytest.raises(BadInput, match=says) as raised:
            route(subject)
        assert str(raised.value).startswith(f"subject {subject!r} is unknown: ")


@pytest.mark.parametrize(
    "subject", ["ai.agent.*", "ai.agent.task.*", "ai.*", "AI.>", "ai.agent.tasks.*.urgent", "ai.other.>"]
)
def test_a_pattern_that_no_message_can_match_is_refused(subject: str) -> None:
    with pytest.raises(BadInput, match="is unknown: "):
        subscribed(subject, "")


@pytest.mark.parametrize(
    ("subject", "stored"),
    [
        ("ai.agent.tasks.acme", True),
        ("ai.agent.tasks.a@b", True),
        ("ai.agent.tasks.acme.high", True),
        ("ai.agent.message.acme.bob", True),
        ("ai.rag.results.acme.q-1", True),
        ("ai.dead.agent.tasks.acme.t-1", True),
        ("ai.parked.due.agent.tasks.acme.high.t-1.new", True),
        ("$KV.AI_PRESENCE.worker.w", True),
        ("ai.rag.results.acme", False),
        ("ai.of.another.program", False),
        ("orders", False),
        ("$SRV.PING", False),
    ],
)
def test_the_reply_subject_of_a_stored_message_is_for_the_servers_ack(subject: str, stored: bool) -> None:
    assert is_stored(TOPOLOGY, subject) is stored


def test_a_family_that_is_declared_is_known(streams: Path) -> None:
    declared = Topology.load(streams)
    assert route_of_publish(declared, "ai.small.jobs.acme").role == "work"
    with pytest.raises(BadInput, match="is unknown"):
        published("ai.small.jobs.acme")
    with pytest.raises(BadInput, match=r"did you mean ai\.small\.jobs\.acme\?"):
        route_of_publish(declared, "ai.small.job.acme")


@pytest.mark.parametrize(
    "subject", ["ai.agent.tasks.acme", "ai.agent.message.*", ">", "ai.>", "ai.agent.tasks.acme.low"]
)
def test_a_subscription_without_a_queue_observes(subject: str) -> None:
    assert subscribed(subject, "")[0] == "plain"


@pytest.mark.parametrize("subject", [">", "ai.>", "ai.*.*.acme", "*.agent.tasks.*", "ai.agent.>", "ai.*.tasks.acme.*"])
def test_a_queue_takes_the_messages_of_one_family(subject: str) -> None:
    with pytest.raises(BadInput, match="a queue takes the messages of one family: subscribe to ai"):
        subscribed(subject)


@pytest.mark.parametrize(
    ("subject", "queue", "says"),
    [
        ("ai.agent.tasks.acme.high", "q", r"takes all priorities of its jobs: subscribe to ai\.agent\.tasks\.acme"),
        ("ai.agent.tasks.a@b", "q", "tenant 'a@b'"),
        ("ai.agent.tasks.acme.*.x", "q", "is no subject of agent.tasks"),
        ("ai.>.acme", "", "can only be its last token"),
        ("orders.*b", "", "must be a token of its own"),
        (
            "ai.rag.results.>",
            "",
            r"subscribe to ai\.rag\.results\.\* to answer requests, or to ai\.rag\.results\.\*\.\*",
        ),
        ("orders", "two words", "queue must be the name of a queue group"),
        ("orders", None, "queue must be the name"),
    ],
)
def test_a_malformed_subscription_is_refused(subject: str, queue: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        subscribed(subject, queue)
