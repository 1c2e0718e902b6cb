"""The setting `families`: which families and streams are declared. No server."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiqueue.bus.routes import route_of_publish
from aiqueue.errors import BadInput, TopologyError, UnknownFamily
from aiqueue.limits import parse_rules
from aiqueue.topology import Topology
from aiqueue.topology.declared import Stated
from aiqueue.topology.selection import WITH_FAMILIES

DEFAULT = {"agent.tasks", "agent.message", "gateway.requests", "gateway.batches", "rag.ingest", "rag.queries"}
ALWAYS = {
    "AI_RESULTS", "AI_DEAD", "AI_PARKED", "AI_STRANDED", "AI_AUDIT", "AI_METRICS", "AI_CHECKPOINTS", "AI_TICKS",
    "OBJ_AI_DOCUMENTS", "KV_AI_PRESENCE", "KV_AI_LIMITS", "KV_AI_SCHEDULES",
}  # fmt: skip
OPTIONAL = {
    "agent.memory": ("agent.memory", "memory_id", {"memory_item": "agent.memory"}),
    "agent.tools": ("agent.tool", "tool_call_id", {}),
    "rag.embeddings": ("rag.embedding", "request_id", {"embedding_request": "rag.embedding"}),
    "llmops.operations": ("llmops.operation", "operation_id", {"llm_operation": "llmops.operation"}),
    "llmops.cost-alerts": ("llmops.cost-alert", "alert_id", {}),
    "mlops.training": ("mlops.training-job", "job_id", {"ml_training_job": "mlops.training-job"}),
    "mlops.predictions": ("mlops.prediction", "prediction_id", {"ml_prediction": "mlops.prediction"}),
}
FILE = "/srv/app/aiqueue.toml"


def chosen(*names: str, **options: object) -> Topology:
    return Topology.load(*options.pop("directories", ()), families=Stated(names, FILE, "families"), **options)  # type: ignore[misc, arg-type]


def refusal(*names: str) -> str:
    with pytest.raises(TopologyError) as caught:
        chosen(*names)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_families_that_are_named_are_declared_with_the_streams_that_they_use() -> None:
    own = {
        "agent.tasks": {"AI_AGENT_TASKS"},
        "agent.message": {"AI_AGENT_MESSAGE"},
        "gateway.requests": {"AI_GATEWAY_REQUESTS", "AI_GATEWAY_USAGE", "AI_GATEWAY_RECENT", "KV_AI_API_KEYS"},
        "rag.ingest": {"AI_RAG_INGEST", "AI_RAG_STORES"},
        "rag.queries": {"AI_RAG_QUERIES", "AI_RAG_STORES"},
    }
    for name, streams in own.items():
        topology = chosen(name)
        assert set(topology.families) == {name}
        assert set(topology.streams) == ALWAYS | streams
    both = chosen("gateway.requests", "gateway.batches")
    assert set(both.streams) == ALWAYS | own["gateway.requests"] | {"AI_GATEWAY_BATCHES", "KV_AI_BATCHES"}


def test_without_the_setting_all_default_families_are_declared_and_no_optional_one() -> None:
    assert set(Topology.load().families) == DEFAULT
    assert Topology.load().streams == chosen("default").streams


@pytest.mark.parametrize("name", OPTIONAL)
def test_an_optional_family_is_declared_by_name(name: str) -> None:
    kind, key, aliases = OPTIONAL[name]
    topology = chosen("default", name)
    assert set(topology.families) == {*DEFAULT, name}
    family = topology.family(name)
    assert (family.default_kind, family.key, family.aliases) == (kind, key, aliases)
    assert family.stream == "AI_" + name.upper().replace(".", "_").replace("-", "_")
    assert topology.streams[family.stream].config["subjects"][0] == f"ai.{name}.*"
    assert route_of_publish(topology, f"ai.{name}.acme").family == family
    with pytest.raises(UnknownFamily, match=f'{name} is optional: set families to \\["default", "{name}"\\]'):
        Topology.load().family(name)
    with pytest.raises(BadInput, match=f"{name} is optional: set families"):
        route_of_publish(Topology.load(), f"ai.{name}.acme")


def test_all_optional_families_go_together() -> None:
    topology = chosen("default", *OPTIONAL)
    assert set(topology.families) == DEFAULT | OPTIONAL.keys()
    taken = [each for spec in topology.streams.values() for each in spec.config["subjects"]]
    assert len(taken) == len(set(taken))


def test_a_family_of_an_own_file_takes_the_place_of_the_optional_one_and_has_to_be_named_too(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        '[family]\nname = "llmops.operations"\ndefault_kind = "op"\n[stream]\nname = "MINE"'
    )
    assert chosen("llmops.operations", directories=[tmp_path]).family("llmops.operations").stream == "MINE"
    assert chosen("default", directories=[tmp_path]).family("llmops.operations").stream == "MINE"
    without = chosen("agent.tasks", directories=[tmp_path])
    assert "MINE" not in without.streams
    with pytest.raises(UnknownFamily, match=rf"the setting families does not name llmops.operations \({FILE}\)"):
        without.family("llmops.operations")


def test_agent_results_answers_requests_for_results_of_agent_tasks() -> None:
    topology = chosen("agent.tasks", "agent.results")
    assert topology.family("agent.tasks").reply_within_s == 60
    assert set(topology.families) == {"agent.tasks"}
    assert route_of_publish(topology, "ai.agent.results.acme").role == "answers"
    assert Topology.load().family("agent.tasks").reply_within_s is None
    laid_over = Stated({"agent.tasks": {"family": {"reply_within": "5s"}}}, FILE, "overlay")
    assert chosen("agent.tasks", "agent.results", laid_over=laid_over).family("agent.tasks").reply_within_s == 5


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["agent.task"], "unknown family 'agent.task'; did you mean agent.tasks?"),
        (["mlops.training", "llmops.opertions"], "unknown family 'llmops.opertions'; did you mean llmops.operations?"),
        (["gateway.responses"], "'gateway.responses' is no family: the results of gateway.requests are there"),
        (["rag.status"], "'rag.status' is no family: the results of rag.ingest are there; name that family"),
        (["gateway.batches"], "gateway.batches needs gateway.requests, because it stores jobs of it"),
        (["agent.results", "rag.ingest"], "agent.results needs agent.tasks, because it answers requests"),
        (["zzz"], "unknown family 'zzz'; known: agent.memory, agent.message, agent.results, agent.tasks, "),
        ([], "names no family: leave the setting out to declare the default ones"),
    ],
)
def test_a_wrong_name_says_where_it_is_and_what_is_meant(names: list[str], problem: str) -> None:
    assert refusal(*names).startswith(f"{FILE}: families: {problem}")


def test_what_is_not_declared_names_the_setting() -> None:
    topology = chosen("agent.tasks")
    text = (
        "unknown family 'gateway.requests'; declared families: agent.tasks; "
        f"the setting families does not name gateway.requests ({FILE}): add it there"
    )
    for look_up in (lambda: topology.family("gateway.requests"), lambda: topology.usage_stream):
        with pytest.raises(UnknownFamily) as caught:
            look_up()
        assert str(caught.value) == text
    with pytest.raises(UnknownFamily, match=r"does not name agent\.message"):
        _ = topology.inbox_family
    with pytest.raises(BadInput, match=r"does not name agent\.message"):
        route_of_publish(topology, "ai.agent.message.acme")
    with pytest.raises(UnknownFamily, match=r"unknown family 'no\.such'; declared families: agent\.tasks$"):
        topology.family("no.such")


@pytest.mark.parametrize("role", WITH_FAMILIES)
def test_a_stream_that_only_some_families_use_is_asked_for_by_the_first_of_them(role: str) -> None:
    assert Topology.load().has(role)  # type: ignore[arg-type]
    topology = chosen("agent.tasks")
    assert not topology.has(role)  # type: ignore[arg-type]
    with pytest.raises(UnknownFamily, match=f"does not name {WITH_FAMILIES[role][0]} "):  # type: ignore[index]
        getattr(topology, f"{role}_stream")


def test_rules_of_limits_for_families_that_are_not_declared_are_left_to_other_programs() -> None:
    text = '[[limit]]\nfamily = "gateway.requests"\nrequests = 10\n'
    assert len(parse_rules(Topology.load(), ("limits.toml", text)).declared) == 1
    assert not parse_rules(chosen("agent.tasks"), ("limits.toml", text)).declared
    with pytest.raises(TopologyError, match=r"unknown family 'gateway\.request'"):
        parse_rules(chosen("agent.tasks"), ("limits.toml", text.replace('requests"', 'request"')))


def test_without_a_family_of_jobs_the_shared_streams_have_the_subject_that_the_server_would_give_them() -> None:
    topology = chosen("agent.message")
    assert topology.journal_stream.config["subjects"] == ["AI_RESULTS"]
    assert topology.stranded_stream.config["subjects"] == ["AI_STRANDED"]
    assert not topology.work_families
