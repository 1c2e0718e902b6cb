"""How many bytes the streams of each size set aside. No server."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiqueue.errors import TopologyError
from aiqueue.topology import Topology, reserved_bytes, streamfile
from aiqueue.topology.declared import Stated
from aiqueue.topology.values import SIZES

MIB = 2**20
SERVER = 10**9  # 1 GB, however it is counted
UNLIMITED = {"AI_PARKED", "AI_TICKS"}  # streams with schedules, in which a limit would drop messages


def limits(topology: Topology) -> dict[str, int]:
    return {name: spec.config.get("max_bytes", -1) for name, spec in topology.streams.items()}


def test_all_default_families_of_the_small_size_fit_a_server_of_1_gb_and_leave_room_for_delayed_jobs() -> None:
    assert reserved_bytes(Topology.load(size="small")) == (728 * MIB, 0)
    assert SERVER - 728 * MIB > 200 * MIB


def test_one_family_takes_much_less() -> None:
    one = Topology.load(size="small", families=Stated(["agent.tasks"], "argument families", ""))
    assert reserved_bytes(one).file == 432 * MIB


def test_the_medium_size_is_the_default_and_has_the_figures_of_former_versions() -> None:
    topology = Topology.load()
    assert topology.size == "medium"
    gib = ("AGENT_MESSAGE", "AGENT_TASKS", "CHECKPOINTS", "DEAD", "GATEWAY_REQUESTS", "GATEWAY_USAGE", "RAG_INGEST")
    expected = dict.fromkeys([f"AI_{each}" for each in (*gib, "RAG_QUERIES", "RESULTS")], 1024 * MIB)
    expected |= {"OBJ_AI_DOCUMENTS": 4096 * MIB, "KV_AI_BATCHES": 256 * MIB, "AI_METRICS": 256 * MIB}
    buckets = ("KV_AI_LIMITS", "KV_AI_PRESENCE", "KV_AI_SCHEDULES", "AI_GATEWAY_BATCHES", "AI_GATEWAY_RECENT")
    expected |= dict.fromkeys([*buckets, "AI_STRANDED", "AI_AUDIT"], 64 * MIB)
    expected |= {"KV_AI_API_KEYS": 16 * MIB, "AI_RAG_STORES": 16 * MIB} | dict.fromkeys(UNLIMITED, -1)
    assert limits(topology) == expected


def test_every_stream_has_its_place_in_each_size_and_a_size_changes_nothing_else() -> None:
    small, medium, large = (Topology.load(size=each) for each in SIZES)
    for name, spec in medium.streams.items():
        if name in UNLIMITED:
            continue
        found = [each.streams[name].config["max_bytes"] for each in (small, medium, large)]
        assert found == sorted(set(found)), name
        for other in (small, large):
            assert {**other.streams[name].config, "max_bytes": 0} == {**spec.config, "max_bytes": 0}
    assert small.families.keys() == medium.families.keys()


def test_a_size_is_independent_of_the_profile() -> None:
    cluster = Topology.load(size="small", profile="cluster")
    assert limits(cluster) == limits(Topology.load(size="small"))
    assert {each.config["num_replicas"] for each in cluster.streams.values()} == {3}


def test_an_own_file_may_state_one_value_for_all_sizes_or_one_for_each() -> None:
    text = '[family]\nname = "x.y"\ndefault_kind = "x"\n[stream]\nname = "X_Y"\n'

    def found(line: str) -> list[int]:
        parsed = [streamfile.parse_file("x.toml", text + line, size=each) for each in SIZES]
        return [each.stream["max_bytes"] for each in parsed]

    assert found("") == [64 * MIB, 1024 * MIB, 4096 * MIB]
    assert found('max_bytes = "7MiB"') == [7 * MIB] * 3
    assert found('max_bytes = { small = "1MiB", medium = 2_097_152, large = "3MiB" }') == [MIB, 2 * MIB, 3 * MIB]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ('{ small = "1MiB", large = "3MiB" }', "a table with a size for small, medium, large"),
        ('{ small = "1MiB", medium = "2MiB", large = "3MiB", huge = 1 }', "a table with a size for small"),
        ('{ small = "1MiB", medium = "2MiB", large = "much" }', "a size above 0"),
    ],
)
def test_a_table_of_sizes_is_checked_also_those_not_used(value: str, problem: str) -> None:
    text = f'role = "dead"\n[stream]\nname = "X"\nmax_bytes = {value}'
    with pytest.raises(TopologyError, match=f"^x.toml: stream.max_bytes: must be .*{problem}"):
        streamfile.parse_file("x.toml", text, size="small")


def test_memory_is_counted_by_itself(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(
        '[family]\nname = "x.y"\ndefault_kind = "x"\n[stream]\nname = "X_Y"\nstorage = "memory"\nmax_bytes = "5MiB"'
    )
    assert reserved_bytes(Topology.load(tmp_path, size="small")) == (728 * MIB, 5 * MIB)


def test_unknown_size() -> None:
    with pytest.raises(TopologyError, match="unknown size 'tiny'; known: small, medium, large"):
        Topology.load(size="tiny")
