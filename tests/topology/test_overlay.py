"""The setting `overlay`: keys of stream files that a deployment changes. No server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest

import aiqueue
from aiqueue.errors import TopologyError
from aiqueue.topology import Topology
from aiqueue.topology.declared import Stated
from aiqueue.topology.streamfile import Role

FILE = "/srv/app/aiqueue.toml"
MIB = 2**20
SYSTEM_ROLES = [each for each in get_args(Role) if each not in ("work", "inbox")]


def laid_over(tables: Mapping[str, Any], **options: Any) -> Topology:
    return Topology.load(laid_over=Stated(tables, FILE, "overlay"), **options)


def refusal(tables: Mapping[str, Any], **options: Any) -> str:
    with pytest.raises(TopologyError) as caught:
        laid_over(tables, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("role", SYSTEM_ROLES)
def test_a_stream_of_no_family_is_named_by_its_role(role: str) -> None:
    is_limited = role not in ("parked", "ticks")
    key, value = ("max_bytes", 7 * MIB) if is_limited else ("duplicate_window", 300 * 10**9)
    topology = laid_over({role: {"stream": {key: "7MiB" if is_limited else "5m"}}})
    changed = [each for each in topology.streams.values() if each.config != Topology.load().streams[each.name].config]
    assert [each.role for each in changed] == [role]
    assert changed[0].config == Topology.load().streams[changed[0].name].config | {key: value}


@pytest.mark.parametrize("name", Topology.load().families)
def test_a_stream_of_a_family_is_named_by_the_family(name: str) -> None:
    tables = {"family": {"default_kind": "mine"}, "stream": {"max_bytes": 5 * MIB}, "consumer": {"ack_wait": "40s"}}
    topology = laid_over({name: tables})
    family = topology.family(name)
    assert (family.default_kind, family.ack_wait_s) == ("mine", 40)
    assert topology.streams[family.stream].config["max_bytes"] == 5 * MIB
    assert topology.family(name).max_deliver == Topology.load().family(name).max_deliver


def test_tables_merge_key_by_key_and_all_other_values_replace() -> None:
    tables = {
        "gateway.requests": {
            "family": {"aliases": {"more": "gateway.other"}, "priorities": ["normal"], "fingerprint": {}},
            "stream": {"max_msgs_per_subject": 7},
        }
    }
    family = laid_over(tables).family("gateway.requests")
    assert family.aliases == {"llm_request": "gateway.request", "more": "gateway.other"}
    assert family.priorities == ("normal",)
    assert (family.fingerprint, family.max_msgs_per_subject, family.key) == ((), 7, "request_id")
    assert [each.split(".")[4:] for each in laid_over(tables).streams[family.stream].config["subjects"]] == [
        [], ["normal"], ["normal", "*"],
    ]  # fmt: skip


def test_tenants_merge_by_tenant_and_key() -> None:
    mine = {"acme": {"weight": 3}, "globex": {"max_ack_pending": 5}}
    family = laid_over({"agent.tasks": {"family": {"tenants": mine}}}).family("agent.tasks")
    assert family.weight("acme") == 3
    assert family.lane_limits("globex")["max_ack_pending"] == 5


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_it_goes_over_the_size_and_the_profile(size: str) -> None:
    tables = {"documents": {"stream": {"max_bytes": "9MiB", "num_replicas": 1}}}
    config = laid_over(tables, size=size, profile="cluster").documents_stream.config
    assert (config["max_bytes"], config["num_replicas"]) == (9 * MIB, 1)
    by_size = {"documents": {"stream": {"max_bytes": {"small": 1000, "medium": 2000, "large": 3000}}}}
    found = laid_over(by_size, size=size).documents_stream.config["max_bytes"]
    assert found == {"small": 1000, "medium": 2000, "large": 3000}[size]


T = 'overlay."agent.tasks"'
NO_ROLE = "is no family, and no role of a stream"


@pytest.mark.parametrize(
    ("tables", "key", "problem"),
    [
        ({"agent.tasks": {"stream": {"max_byte": 1}}}, f"{T}.stream.max_byte", "unknown key; did you mean max_b"),
        ({"agent.tasks": {"stream": {"max_bytes": "much"}}}, f"{T}.stream.max_bytes", "must be a size above 0"),
        ({"agent": {"tasks": {"stream": {}}}}, "overlay.agent", f"{NO_ROLE}; write {T}, with quotes"),
        ({"agent.tasks": {"streams": {}}}, f"{T}.streams", "unknown key; did you mean stream?"),
        ({"agent.tasks": {"consumer": {"ack_wait": 3}}}, f"{T}.consumer.ack_wait", "must be a duration such"),
        ({"agent.tasks": {"family": {"lanes": "own"}}}, f"{T}.family.lanes", 'must be "tenant" or "shared"'),
        ({"agent.tasks": {"family": {"name": "x.y"}}}, f"{T}.family.name", "cannot be changed"),
        ({"agent.tasks": {"stream": {"name": "X"}}}, f"{T}.stream.name", "cannot be changed"),
        ({"agent.tasks": {"role": "work"}}, f"{T}.role", "cannot be changed"),
        ({"agent.tasks": {"stream": {"discard": "old"}}}, f"{T}.stream.discard", 'must be "new" for a work stream'),
        ({"agent.tasks": 3}, T, "must be a table"),
        ({"agent.tasks": {"stream": 3}}, f"{T}.stream", "must be a table"),
        ({"agent.tasks": {"family": {"default_kind": "rag.query"}}}, f"{T}.family.default_kind", "does not go with "),
        ({"agent.tasks": {"family": {"fingerprint": {}}}}, f"{T}.family.fingerprint", "requires claim = true"),
        ({"agent.tasks": {"family": {"journal_ttl": "30h"}}}, f"{T}.family.journal_ttl", "must not exceed"),
        ({"journal": {"stream": {"republish": {}}}}, "overlay.journal.stream.republish", "cannot be changed"),
        ({"dead": {"family": {}}}, "overlay.dead.family", "unknown key; known here: stream"),
        ({"dead": {"stream": {"max_age": "1m"}}}, "overlay.dead.stream.duplicate_window", "must not be longer"),
        ({"parked": {"stream": {"max_bytes": 1}}}, "overlay.parked.stream.max_bytes", "must be -1 for a parked stream"),
        ({"agent.tasks": {"stream": {"deny_delete": True}}}, f"{T}.stream.deny_delete", "must be false for a work"),
        ({"dead": {"stream": {"deny_delete": True}}}, "overlay.dead.stream.deny_delete", "must be false for a dead"),
        (
            {"usage": {"stream": {"discard_new_per_subject": True}}},
            "overlay.usage.stream.discard_new_per_subject",
            "must be false for a usage stream",
        ),
        ({"ded": {}}, "overlay.ded", "is no family, and no role of a stream; did you mean dead?"),
        ({"agent.taks": {}}, 'overlay."agent.taks"', "is no family, and no role of a stream; did you mean agent.t"),
        ({"work": {}}, "overlay.work", "is no family, and no role of a stream; known: agent.memory, agent.message,"),
        ({"journal": {"stream": {"max_age": "10m"}}}, "overlay.journal.stream.max_age", "does not go with "),
    ],
)  # fmt: skip
def test_a_wrong_key_names_file_and_key(tables: dict[str, Any], key: str, problem: str) -> None:
    assert refusal(tables).startswith(f"{FILE}: {key}: {problem}")


def test_an_overlay_of_a_family_that_is_not_declared_is_checked_and_has_no_effect() -> None:
    one = Stated(["agent.tasks"], FILE, "families")
    tables = {"rag.queries": {"stream": {"max_bytes": 5}}, "usage": {"stream": {"max_bytes": 5}}, "agent.memory": {}}
    assert laid_over(tables, families=one).streams == Topology.load(families=one).streams
    wrong = {"agent.memory": {"stream": {"max_byte": 5}}}
    assert refusal(wrong, families=one).startswith(f'{FILE}: overlay."agent.memory".stream.max_byte: unknown key')


def test_an_overlay_of_an_optional_family_and_of_an_own_one(tmp_path: Any) -> None:
    (tmp_path / "x.toml").write_text('[family]\nname = "x.y"\ndefault_kind = "x"\n[stream]\nname = "X_Y"')
    tables = {"x.y": {"stream": {"max_bytes": 5}}, "agent.memory": {"stream": {"max_bytes": 6}}}
    named = Stated(["x.y", "agent.memory"], FILE, "families")
    topology = Topology.load(tmp_path, laid_over=Stated(tables, FILE, "overlay"), families=named)
    assert topology.streams["X_Y"].config["max_bytes"] == 5
    assert topology.streams["AI_AGENT_MEMORY"].config["max_bytes"] == 6


def test_a_wrong_key_in_a_file_an_argument_and_the_environment_is_named_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "aiqueue.toml"
    file.write_text('families = ["agent.task"]\n[overlay."agent.tasks"]\nstream.max_byte = 1\n')
    monkeypatch.chdir(tmp_path)

    def refused(**arguments: Any) -> str:
        with pytest.raises(TopologyError) as caught:
            aiqueue.connect(**arguments)
        return str(caught.value)

    wrong = '"agent.tasks".stream.max_byte: unknown key; did you mean max_bytes?'
    families: Any = {"families": ["agent.tasks"]}
    assert refused() == f"{file}: families: unknown family 'agent.task'; did you mean agent.tasks?"
    assert refused(**families) == f"{file}: overlay.{wrong}"
    argument = {"agent.tasks": {"stream": {"max_byte": 1}}}
    assert refused(**families, overlay=argument) == f"argument overlay: {wrong}"
    monkeypatch.setenv("AIQUEUE_OVERLAY", '"agent.tasks".stream.max_byte = 1')
    assert refused(**families) == f"environment variable AIQUEUE_OVERLAY: {wrong}"


def test_it_changes_no_other_topology() -> None:
    before = Topology.load().dead_stream.config["max_age"]
    laid_over({"dead": {"stream": {"max_age": "7d"}}})
    assert Topology.load().dead_stream.config["max_age"] == before
