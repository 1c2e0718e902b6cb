"""What subjects mean, to a publisher and to a subscriber."""

from __future__ import annotations

import pytest

from aiqueue.bus.routes import Route, route_of_publish, route_of_subscription
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
        ("ai.agent.results.acme", ("plain", "", "", "")),  # this family answers no requests
        ("ai.other.thing.acme", ("plain", "", "", "")),
        ("orders", ("plain", "", "", "")),
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
        ("a" * 1_001, "joined by dots"),
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
        ("ai.other.>", ("plain", "", "", "")),
    ],
)
def test_a_subscription_with_a_queue_goes_by_the_wire_contract(subject: str, route: tuple[str, str, str, str]) -> None:
    assert subscribed(subject) == route


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
        ("ai.agent.tasks.acme.*.x", "q", "is none of agent.tasks"),
        ("ai.>.acme", "", "can only be its last token"),
        ("orders", "two words", "queue must be the name of a queue group"),
        ("orders", None, "queue must be the name"),
    ],
)
def test_a_malformed_subscription_is_refused(subject: str, queue: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        subscribed(subject, queue)
