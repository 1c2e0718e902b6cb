"""The files of ``streams/``, and what the loader makes of right and wrong ones. No server."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiqueue import subjects, units
from aiqueue.errors import BadInput, InvalidToken, TopologyError, UnknownFamily
from aiqueue.topology import declared as topology_module
from aiqueue.topology import streamfile
from aiqueue.topology.declared import Family, Topology, bundled_directory

OPERATIONS = """
[family]
name = "llmops.operations"
default_kind = "llmops.operation"

[stream]
name = "LLMOPS_OPERATIONS"
"""


def family_file(name: str = "x.y", stream: str = "X_Y", family: str = "", rest: str = "") -> str:
    kind = f'default_kind = "{name}"\n' if "default_kind" not in family else ""
    return f'[family]\nname = "{name}"\n{kind}{family}\n[stream]\nname = "{stream}"\n{rest}\n'


def bundled() -> list[tuple[str, str]]:
    return [(path.name, path.read_text()) for path in sorted(bundled_directory().glob("*.toml"))]


def with_files(*texts: str, profile: str = "single") -> Topology:
    named = [(f"mine{n}.toml", text) for n, text in enumerate(texts)]
    return Topology.build([*bundled(), *named], profile=profile)


def refusal(text: str) -> TopologyError:
    with pytest.raises(TopologyError) as caught:
        with_files(text)
    assert caught.value.file == "mine0.toml"
    return caught.value


def toml(table: Mapping[str, Any]) -> str:
    """Just enough TOML: every value inline, so that tables may nest."""

    def value(each: Any) -> str:
        if isinstance(each, Mapping):
            return "{" + ", ".join(f"{json.dumps(key)} = {value(item)}" for key, item in each.items()) + "}"
        if isinstance(each, list | tuple):
            return "[" + ", ".join(map(value, each)) + "]"
        return json.dumps(each)

    return "".join(f"{json.dumps(key)} = {value(each)}\n" for key, each in table.items())


class TestBundled:
    def test_declares_the_guides_families(self) -> None:
        topology = Topology.load()
        assert {each.name: each.stream for each in topology.families.values()} == {
            "agent.tasks": "AI_AGENT_TASKS",
            "agent.message": "AI_AGENT_MESSAGE",
            "gateway.batches": "AI_GATEWAY_BATCHES",
            "gateway.requests": "AI_GATEWAY_REQUESTS",
            "rag.ingest": "AI_RAG_INGEST",
            "rag.queries": "AI_RAG_QUERIES",
        }
        assert "agent.message" not in {each.name for each in topology.work_families}
        assert topology.family("agent.message").role == "inbox"
        assert topology.family("gateway.requests").priorities == ("high", "normal", "low", "batch")

    def test_keys_and_journals_are_those_of_the_guide(self) -> None:
        assert {each.name: (each.key, each.journal) for each in Topology.load().work_families} == {
            "agent.tasks": ("task_id", "ai.agent.results"),
            "gateway.batches": ("batch_id", "ai.gateway.batch-results"),
            "gateway.requests": ("request_id", "ai.gateway.responses"),
            "rag.ingest": (None, "ai.rag.status"),
            "rag.queries": ("query_id", "ai.rag.results"),
        }

    def test_no_stream_takes_a_responders_subject(self) -> None:
        bare = ["ai.gateway.responses.*", "ai.rag.results.*"]
        taken = [each for spec in Topology.load().streams.values() for each in spec.config["subjects"]]
        assert not set(bare) & set(taken)
        assert all(len(each.split(".")) == 5 for each in Topology.load().journal_stream.config["subjects"])

    def test_work_streams_never_drop_a_job(self) -> None:
        for family in Topology.load().work_families:
            config = Topology.load().streams[family.stream].config
            assert config["retention"] == "workqueue"
            assert config["discard"] == "new"
            assert config["max_age"] == 0

    @pytest.mark.parametrize(("profile", "replicas"), [("single", 1), ("cluster", 3)])
    def test_profile_decides_the_replicas(self, profile: str, replicas: int) -> None:
        topology = Topology.load(profile=profile)
        assert {each.config["num_replicas"] for each in topology.streams.values()} == {replicas}
        assert {each.replicas for each in topology.families.values()} == {replicas}

    def test_no_limit_drops_parked_jobs(self) -> None:
        config = Topology.load().parked_stream.config
        assert config["subjects"] == ["ai.parked.at.*.*.*.*.*.*", "ai.parked.due.*.*.*.*.*.*"]
        limits = ("max_msgs", "max_msgs_per_subject", "max_bytes")
        assert ([config[each] for each in limits], config["max_age"]) == ([-1, -1, -1], 0)

    @pytest.mark.parametrize("limit", ["max_bytes = '1GiB'", "max_age = '1d'", "max_msgs = 10", "discard = 'new'"])
    def test_a_limit_that_would_drop_parked_jobs_is_refused(self, limit: str) -> None:
        error = refusal(f"role = 'parked'\n[stream]\nname = 'A'\n{limit}")
        assert error.key in (f"stream.{limit.split(maxsplit=1)[0]}", "stream.allow_msg_schedules")

    def test_counters_keep_their_former_value_unless_a_file_of_a_former_version_says_otherwise(self) -> None:
        assert Topology.load().metrics_stream.config["max_msgs_per_subject"] == 2
        file = "role = 'metrics'\n[stream]\nname = 'M'\nmax_msgs_per_subject = {}"
        others = [each for each in bundled() if each[0] != "metrics.toml"]
        former = Topology.build([*others, ("metrics.toml", file.format(1))])
        assert former.metrics_stream.config["max_msgs_per_subject"] == 1
        for wrong in (-1, 3):
            error = refusal(file.format(wrong))
            assert (error.key, error.problem) == ("stream.max_msgs_per_subject", "must be 2 for a metrics stream")

    def test_dead_and_journal_streams_can_be_read_without_consumers(self) -> None:
        topology = Topology.load()
        assert topology.dead_stream.config["subjects"] == ["ai.dead.*.*.*.*"]
        assert topology.dead_stream.config["allow_direct"]
        assert topology.journal_stream.config["allow_direct"]
        assert topology.journal_stream.config["republish"] == {"src": ">", "dest": "aiq.live.>"}


class TestLookup:
    def test_unknown_family_lists_those_declared(self) -> None:
        with pytest.raises(UnknownFamily, match=r"agent\.message, agent\.tasks, gateway\.batches, gateway\.requests"):
            Topology.load().family("gateway.request")

    def test_family_of_kind(self) -> None:
        topology = Topology.load()
        assert topology.family_of_kind("gateway.request") is topology.family("gateway.requests")
        assert topology.family_of_kind("summarise") is None


class TestUserDirectory:
    def test_adds_a_family_with_no_code(self, tmp_path: Path) -> None:
        (tmp_path / "llmops_operations.toml").write_text(OPERATIONS)
        topology = Topology.load(tmp_path)
        family = topology.family("llmops.operations")
        assert family.journal == "ai.llmops.operations-results"
        assert "ai.llmops.operations-results.*.*" in topology.journal_stream.config["subjects"]
        config = topology.streams["LLMOPS_OPERATIONS"].config
        assert config["retention"] == "workqueue"
        assert config["subject_transform"] == {
            "src": "ai.llmops.operations.*",
            "dest": "ai.llmops.operations.{{wildcard(1)}}.normal",
        }

    def test_a_changed_file_is_read_anew_and_each_topology_has_configs_of_its_own(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.toml"
        path.write_text(family_file())
        Topology.load(tmp_path).streams["X_Y"].config["max_msgs"] = 7  # type: ignore[index]
        assert Topology.load(tmp_path).streams["X_Y"].config["max_msgs"] == -1
        path.write_text(family_file(rest="max_msgs_per_subject = 5"))
        assert Topology.load(tmp_path).streams["X_Y"].config["max_msgs_per_subject"] == 5

    def test_cannot_declare_again_what_is_bundled(self, tmp_path: Path) -> None:
        (tmp_path / "mine.toml").write_text(family_file("gateway.requests", "MINE", 'default_kind = "mine"'))
        with pytest.raises(TopologyError) as caught:
            Topology.load(tmp_path)
        assert caught.value.file == str(tmp_path / "mine.toml")
        assert caught.value.key == "family.name"
        assert str(bundled_directory() / "gateway_requests.toml") in caught.value.problem

    def test_bundled_directory_named_again_is_read_once(self) -> None:
        assert Topology.load(bundled_directory()) == Topology.load()

    def test_hidden_files_are_passed_over(self, tmp_path: Path) -> None:
        (tmp_path / "llmops.toml").write_text(OPERATIONS)
        (tmp_path / ".#llmops.toml").write_text("not toml")
        assert "llmops.operations" in Topology.load(tmp_path).families

    def test_rules_of_limits_and_models_of_the_gateway_lie_beside_the_streams(self, tmp_path: Path) -> None:
        (tmp_path / "limits.toml").write_text("[[limit]]\n")
        (tmp_path / "gateway.toml").write_text("[[model]]\n")
        assert Topology.load(tmp_path).families == Topology.load().families

    def test_missing_or_empty_directory_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(TopologyError, match="no such directory"):
            Topology.load(tmp_path / "nowhere")
        with pytest.raises(TopologyError, match=r"contains no \*\.toml file"):
            Topology.load(tmp_path)

    def test_unreadable_file_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "folder.toml").mkdir()
        with pytest.raises(TopologyError, match=r"folder\.toml: cannot be read"):
            Topology.load(tmp_path)
        (tmp_path / "folder.toml").rmdir()
        (tmp_path / "latin.toml").write_bytes(b'# caf\xe9\n[family]\nname = "x.y"\n')
        with pytest.raises(TopologyError, match=r"latin\.toml: is not UTF-8"):
            Topology.load(tmp_path)


class TestPackaged:
    def test_installed_files_are_found_beside_the_modules(self, tmp_path: Path) -> None:
        package = Path(topology_module.__file__).parent.parent
        ignore = shutil.ignore_patterns("__pycache__", "streams")
        shutil.copytree(package, tmp_path / "aiqueue", ignore=ignore)
        shutil.copytree(bundled_directory(), tmp_path / "aiqueue" / "streams")
        code = "from aiqueue.topology.declared import *; print(bundled_directory(), len(Topology.load().streams))"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == [str(tmp_path / "aiqueue" / "streams"), str(len(Topology.load().streams))]

    def test_a_checkout_uses_its_own(self) -> None:
        assert {path.name for path in bundled_directory().glob("*.toml")} >= {"dead.toml", "results.toml"}


class TestRefusals:
    def test_invalid_toml_shows_the_line(self) -> None:
        error = refusal('[family]\nname = "x.y"\npriorities = [high]\n')
        assert "line 3" in error.problem
        assert "priorities = [high]" in error.problem

    @pytest.mark.parametrize(
        ("text", "key", "problem"),
        [
            (family_file(rest="max_msg_bytes = 5"), "stream.max_msg_bytes", "did you mean max_"),
            (family_file(rest="ack_wait = '3s'"), "stream.ack_wait", "unknown key"),
            (family_file(rest="[consumers]"), "consumers", "did you mean consumer?"),
            (family_file(rest="subjects = ['a']"), "stream.subjects", "is computed"),
            (family_file(rest="[profile.clster]"), "profile.clster", "did you mean cluster?"),
            (family_file(rest="[profile.cluster]\nnum_replicas = 3"), "profile.cluster.num_replicas", ""),
            (family_file(rest="profile.cluster.stream.name = 'B'"), "stream.profile", "unknown key"),
            (family_file(rest="[profile]\ncluster.stream.name = 'B'"), "profile.cluster.stream.name", ""),
            (family_file(rest="republish = {src = '>'}"), "stream.republish.dest", "is missing"),
            (family_file(rest="republish = {source = '>'}"), "stream.republish.source", "did you mean src?"),
            ("[stream]\nname = 'A'", "family", "is missing"),
            ("[family]\nname = 'x.y'\ndefault_kind = 'x'", "stream", "is missing"),
            ("[family]\nname = 'x.y'\ndefault_kind = 'x'\n[stream]", "stream.name", "is missing"),
            ("[family]\ndefault_kind = 'x'\n[stream]\nname = 'A'", "family.name", "is missing"),
            ("[family]\nname = 'x.y'\n[stream]\nname = 'A'", "family.default_kind", "is missing"),
            ("family = 3\n[stream]\nname = 'A'", "family", "must be a table"),
            ("role = 'jornal'\n[stream]\nname = 'A'", "role", "must be"),
            ("role = 'dead'\n[family]\nname = 'x.y'\n[stream]\nname = 'A'", "family", "has no family"),
            ("role = 'dead'\n[stream]\nname = 'A'\n[consumer]", "consumer", "has no family"),
            ("role = 'dead'\n[stream]\nname = 'A'\n[profile]\ncluster.consumer.ack_wait = '3s'",
             "profile.cluster.consumer", "unknown key"),
            ("role = 'dead'\n[stream]\nname = 'A'", "role", "the dead stream is already declared in dead.toml"),
            ("role = 'inbox'\n" + family_file(family="lanes = 'tenant'"), "family.lanes", "unknown key"),
        ],
    )  # fmt: skip
    def test_structure(self, text: str, key: str, problem: str) -> None:
        error = refusal(text)
        assert error.key == key
        assert problem in error.problem
        assert str(error) == f"mine0.toml: {key}: {error.problem}"

    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            ("name = 'a.b'", "1 to 64 characters"),
            ("storage = 'disk'", '"file" or "memory"'),
            ("max_msgs = 0", "-1 for no limit"),
            ("max_msgs = -2", "-1 for no limit"),
            ("max_msgs = true", "a whole number"),
            ("max_msgs = 1.5", "a whole number"),
            ("max_msgs_per_subject = 99999999999999999999", "a whole number"),
            ("max_consumers = -1", "a whole number from 1"),
            ("num_replicas = 6", "from 1 to 5"),
            ("max_bytes = 0", "a size above 0"),
            ("max_bytes = -5", "a size above 0"),
            ("max_bytes = '1 gigabyte'", "a size above 0"),
            ("max_bytes = 1.5", "a size above 0"),
            ("max_age = 86400", "a duration such as"),
            ("max_age = '1 day'", "a duration such as"),
            ("max_age = '-1s'", "a duration such as"),
            ("max_age = '1000000d'", "a duration such as"),
            (f"max_age = '{'9' * 400}s'", "a duration such as"),
            (f"max_bytes = '{'9' * 400}GiB'", "a size above 0"),
            ("duplicate_window = '0s'", "at least 100ms"),
            ("allow_direct = 1", "true or false"),
            ("retention = 'limits'", 'must be "workqueue" for a work stream'),
            ("discard = 'old'", 'must be "new" for a work stream'),
            ("discard_new_per_subject = false", "must be true for a work stream"),
            ("allow_msg_schedules = true", 'cannot be combined with discard = "new"'),
            ("max_msgs_per_subject = -1", "at least 1 with discard_new_per_subject"),
        ],
    )
    def test_values_of_a_stream(self, line: str, problem: str) -> None:
        key = line.partition(" =")[0]
        name = "" if key == "name" else "name = 'A'\n"
        error = refusal(f"[family]\nname = 'x.y'\ndefault_kind = 'x'\n[stream]\n{name}{line}\n")
        assert error.key == f"stream.{key}"
        assert problem in error.problem

    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            ("ack_wait = '900ms'", "at least 1s"),
            ("ack_wait = 30", "a duration such as"),
            ("max_ack_pending = 0", "a whole number from 1"),
            ("max_ack_pending = -1", "a whole number from 1"),
            ("max_deliver = 0", "-1 for no limit"),
            ("inactive_threshold = '0s'", "at least 1s"),
        ],
    )
    def test_values_of_a_consumer(self, line: str, problem: str) -> None:
        error = refusal(family_file(rest=f"[consumer]\n{line}"))
        assert error.key == f"consumer.{line.partition(' =')[0]}"
        assert problem in error.problem

    @pytest.mark.parametrize(
        ("line", "key", "problem"),
        [
            ("priorities = ['high', 'low']", "priorities", 'must contain "normal"'),
            ("priorities = ['normal', 'very-high']", "priorities", "characters of a-z 0-9"),
            ("priorities = ['normal', 'normal']", "priorities", "contains an item twice"),
            ("priorities = []", "priorities", "a list of 1 to"),
            ("priorities = 'normal'", "priorities", "a list of 1 to"),
            ("lanes = 'user'", "lanes", '"tenant" or "shared"'),
            ("lane_storage = 'ram'", "lane_storage", '"file" or "memory"'),
            ("journal = 'ai.x'", "journal", "three words"),
            ("journal = 'ai.x.y.z'", "journal", "three words"),
            ("journal = 'aiq.live.x'", "journal", "three words"),
            ("journal = 'ai.*.x'", "journal", "three words"),
            ("journal = 'ai.x.y'", "journal", "is the subject of family x.y"),
            ("journal = 'ai.agent.tasks'", "journal", "agent_tasks.toml"),
            ("journal = 'ai.agent.message'", "journal", "agent_message.toml"),
            ("journal = 'ai.rag.results'", "journal", "rag_queries.toml"),
            ("journal_ttl = '59s'", "journal_ttl", "at least 1m"),
            ("journal_ttl = '25h'", "journal_ttl", "must not exceed max_age of the journal stream, 86400 s"),
            ("chunk_ttl = '0.5s'", "chunk_ttl", "at least 1s"),
            ("header_fields = 'model'", "header_fields", "must be a list of 1 to 32 fields of the message"),
            ("claim = true\nfingerprint = true", "fingerprint", "must be a table such as"),
            ("claim = true\nfingerprint = { without = ['a'] }", "fingerprint", "must be a table such as"),
            ("claim = true\nfingerprint = { ignore = [] }", "fingerprint", "must be a list of 1 to 32 fields"),
            ("fingerprint = {}", "fingerprint", "requires claim = true"),
            ("header_fields = ['a.b']", "header_fields", "1 to 64 characters of A-Z a-z 0-9 _ -"),
            ("journal_ttl = '2m'\nchunk_ttl = '3m'", "chunk_ttl", "must not exceed journal_ttl"),
            ("journal_ttl = '1m'\n[consumer]\nack_wait = '40s'", "journal_ttl", "twice the ack_wait"),
            ("key = 'request id'", "key", "1 to 64 characters"),
            ("aliases = {a = 3}", "aliases", "a kind"),
            ("aliases = ['a']", "aliases", "a table"),
            ("schema_versions = [1]", "schema_versions", "a version"),
            ("default_kind = 'ä'", "default_kind", "a kind"),
            ("default_kind = 'rag.query'", "default_kind", "rag_queries.toml"),
        ],
    )
    def test_values_of_a_family(self, line: str, key: str, problem: str) -> None:
        error = refusal(family_file(family=line))
        assert error.key == f"family.{key}"
        assert problem in error.problem

    @pytest.mark.parametrize("name", ["x", "x.y.z", "X.y", "x.*", "x.y ", "", "dead.jobs", "parked.at"])
    def test_names_of_families(self, name: str) -> None:
        assert refusal(family_file(name, family="default_kind = 'x'")).key == "family.name"

    def test_duplicate_stream_names_both_files(self) -> None:
        error = refusal(family_file(stream="AI_DEAD"))
        assert error.key == "stream.name"
        assert "dead.toml" in error.problem

    def test_profiles_not_asked_for_are_checked_too(self) -> None:
        error = refusal(family_file(rest="[profile]\ncluster.stream.num_replicas = '3'"))
        assert error.key == "profile.cluster.stream.num_replicas"
        error = refusal(family_file(rest="[profile]\ncluster.stream.max_age = '1m'"))
        assert error.key == "stream.duplicate_window"
        error = refusal(family_file(rest="[profile]\ncluster.stream.discard = 'old'"))
        assert error.key == "profile.cluster.stream.discard"

    def test_unknown_profile(self) -> None:
        with pytest.raises(TopologyError, match="unknown profile 'prod'; known: single, cluster"):
            Topology.load(profile="prod")

    @pytest.mark.parametrize("missing", ["dead", "journal", "parked"])
    def test_dead_journal_and_parked_streams_must_be_there(self, missing: str) -> None:
        name = {"dead": "dead.toml", "journal": "results.toml", "parked": "parked.toml"}[missing]
        with pytest.raises(TopologyError, match=f"no file declares the {missing} stream"):
            Topology.build([each for each in bundled() if each[0] != name])


class TestLanes:
    def test_config_is_the_apis(self) -> None:
        topology = with_files(
            family_file(family="lane_storage = 'memory'", rest="[consumer]\nack_wait = '1m'\nmax_ack_pending = 7")
        )
        assert topology.family("x.y").lane_config("acme", "high") == {
            "durable_name": "acme-high",
            "filter_subject": "ai.x.y.acme.high",
            "ack_policy": "explicit",
            "mem_storage": True,
            "ack_wait": 60_000_000_000,
            "max_ack_pending": 7,
            "max_deliver": 10_000,
            "inactive_threshold": 300_000_000_000,
        }

    def test_a_family_may_name_the_field_that_limits_go_by(self) -> None:
        topology = Topology.build([*bundled(), ("x.toml", family_file(family='limit_key = "model"'))])
        assert topology.family("x.y").limit_key == "model"
        assert topology.family("agent.tasks").limit_key is None
        gateway = topology.family("gateway.requests")
        assert (gateway.limit_key, gateway.header_fields) == ("model", ("model",))
        assert (gateway.fingerprint, topology.family("rag.queries").fingerprint) == (("timestamp",), None)

    def test_a_limit_key_is_refused_where_all_tenants_share_a_lane(self) -> None:
        text = family_file(family='limit_key = "model"\nlanes = "shared"')
        with pytest.raises(TopologyError, match=r"x.toml: family.limit_key: cannot be combined with lanes") as caught:
            Topology.build([*bundled(), ("x.toml", text)])
        assert "\n" not in str(caught.value)

    def test_the_server_repeats_what_is_stored_of_limits(self) -> None:
        spec = Topology.load().limits_stream
        assert spec.config["republish"] == {"src": "$KV.AI_LIMITS.>", "dest": "aiq.limits.>"}
        text = 'role = "limits"\n[stream]\nname = "KV_X"\nmax_bytes = 1000\nrepublish = { src = "a", dest = "b" }'
        with pytest.raises(TopologyError, match=r"stream.republish: is computed for a stream with the role limits"):
            streamfile.parse_file("x.toml", text)

    def test_the_stream_of_usage_keeps_one_message_a_subject_and_refuses_when_it_is_full(self) -> None:
        spec = Topology.load().usage_stream
        subjects_of = [f"ai.gateway.{each}" for each in ("usage.*.*", "budget.*.*", "budget.*.*.*", "totals.*.*")]
        assert (spec.name, spec.config["subjects"]) == ("AI_GATEWAY_USAGE", subjects_of)
        for key in ('discard = "old"', "max_msgs_per_subject = 2", "allow_direct = false"):
            text = f'role = "usage"\n[stream]\nname = "X"\nmax_bytes = 1000\n{key}'
            with pytest.raises(TopologyError, match=r"for a usage stream"):
                streamfile.parse_file("x.toml", text)

    def test_the_stream_of_recent_requests_keeps_the_newest_one_and_refuses_none(self) -> None:
        spec = Topology.load().recent_stream
        assert (spec.name, spec.config["subjects"]) == ("AI_GATEWAY_RECENT", ["ai.gateway.recent.*.*"])
        for key in ('discard = "new"', "max_msgs_per_subject = 2", "allow_direct = false"):
            text = f'role = "recent"\n[stream]\nname = "X"\nmax_bytes = 1000\n{key}'
            with pytest.raises(TopologyError, match=r"for a recent stream"):
                streamfile.parse_file("x.toml", text)

    def test_the_stream_of_documents_stores_keeps_the_newest_binding_and_refuses_when_it_is_full(self) -> None:
        spec = Topology.load().rag_stream
        assert (spec.name, spec.config["subjects"]) == ("AI_RAG_STORES", ["ai.rag.stores.>"])
        with pytest.raises(TopologyError, match=r"for a rag stream"):
            streamfile.parse_file("x.toml", 'role = "rag"\n[stream]\nname = "X"\nmax_bytes = 1000\ndiscard = "old"')

    def test_shared_lanes_take_all_tenants(self) -> None:
        family = with_files(family_file(family="lanes = 'shared'")).family("x.y")
        config = family.lane_config("acme", "low")
        assert (config["durable_name"], config["filter_subject"]) == ("low", "ai.x.y.*.low")
        assert family.lane_of("low") == subjects.Lane("x.y", "*", "low")
        assert family.lane_of("acme-low") is None

    def test_unknown_priority_and_bad_tenant_are_refused(self) -> None:
        topology = Topology.load()
        with pytest.raises(BadInput, match="no priority 'urgent': it has high, normal, low"):
            topology.family("agent.tasks").lane_config("acme", "urgent")
        with pytest.raises(InvalidToken):
            topology.family("agent.tasks").lane_config("*", "high")
        with pytest.raises(BadInput, match="is an inbox and has no lanes"):
            topology.family("agent.message").lane_config("acme", "normal")

    @given(st.from_regex(subjects.TOKEN, fullmatch=True), st.sampled_from(["high", "normal", "low", "batch"]))
    def test_names_parse_back(self, tenant: str, priority: str) -> None:
        family = _GATEWAY
        name = family.lane_name(tenant, priority)
        assert family.lane_of(name) == subjects.Lane(family.name, tenant, priority)
        assert name not in family.priorities  # where a shared lane would be
        assert subjects.parse_lane(family.lane_config(tenant, priority)["filter_subject"]) == family.lane_of(name)

    @given(st.text(max_size=80))
    def test_foreign_consumers_are_no_lanes(self, name: str) -> None:
        lane = _GATEWAY.lane_of(name)
        assert lane is None or _GATEWAY.lane_name(lane.tenant, lane.priority) == name


_GATEWAY: Family = Topology.load().family("gateway.requests")

words = st.from_regex(r"[a-z]{1,12}", fullmatch=True)
durations = st.integers(1, 10_000).map(lambda n: f"{n}s")
sizes = st.one_of(st.just(-1), st.integers(1, 2**40), st.integers(1, 4096).map(lambda n: f"{n}MiB"))
counts = st.one_of(st.just(-1), st.integers(1, 10**9))
consumers = st.fixed_dictionaries(
    {},
    optional={
        "ack_wait": durations,
        "max_ack_pending": st.integers(1, 10**6),
        "max_deliver": counts,
        "inactive_threshold": durations,
    },
)
limits = st.fixed_dictionaries(
    {},
    optional={
        "storage": st.sampled_from(["file", "memory"]),
        "max_msgs": counts,
        "max_msgs_per_subject": st.integers(1, 10**9),
        "max_msg_size": sizes,
        "max_bytes": sizes,
        "max_consumers": st.integers(1, 10**6),
        "duplicate_window": durations,
        "num_replicas": st.integers(1, 5),
        "allow_atomic": st.booleans(),
        "republish": st.fixed_dictionaries({"src": st.just(">"), "dest": st.just("copy.>")}),
    },
)
files = st.fixed_dictionaries(
    {
        "family": st.fixed_dictionaries(
            {"name": words.map("x-{}.jobs".format), "default_kind": words.map("k.{}".format)},
            optional={
                "priorities": st.sets(words, max_size=5).map(lambda each: sorted({*each, "normal"})),
                "lanes": st.sampled_from(["tenant", "shared"]),
                "lane_storage": st.sampled_from(["file", "memory"]),
                "journal": words.map(lambda word: f"ai.journal.{word}"),
                "key": words,
                "journal_ttl": st.integers(20_000, 86_400).map("{}s".format),
                "chunk_ttl": st.integers(1, 60).map("{}s".format),
                "aliases": st.dictionaries(words, words, max_size=3),
                "schema_versions": st.lists(words, min_size=1, max_size=3, unique=True),
            },
        ),
        "stream": limits.map(lambda each: {"name": "X"} | each),
    },
    optional={
        "consumer": consumers,
        "profile": st.fixed_dictionaries(
            {},
            optional={
                name: st.fixed_dictionaries({}, optional={"stream": limits, "consumer": consumers})
                for name in streamfile.PROFILES
            },
        ),
    },
)  # fmt: skip


def tables(table: Mapping[str, Any], at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where the tables of a file are. The aliases are left out: their keys are the user's."""
    found = [at]
    for key, value in table.items():
        if isinstance(value, Mapping) and key != "aliases":
            found += tables(value, (*at, key))
    return found


def in_the_apis_form(value: Any) -> Any:
    if isinstance(value, str) and value[0].isdigit():
        return units.size_bytes(value) if value.endswith("MiB") else round(units.seconds(value) * 1e9)
    return value


class TestAnyFile:
    @given(files, st.sampled_from(streamfile.PROFILES))
    def test_values_arrive_as_declared(self, raw: dict[str, Any], profile: str) -> None:
        assert tomllib.loads(toml(raw)) == raw
        topology = with_files(toml(raw), profile=profile)
        family = topology.family(raw["family"]["name"])
        config = topology.streams["X"].config
        over = raw.get("profile", {}).get(profile, {})
        for key, value in (raw["stream"] | over.get("stream", {})).items():
            assert config[key] == in_the_apis_form(value)
        consumer = raw.get("consumer", {}) | over.get("consumer", {})
        lane = family.lane_config("acme", "normal")
        assert lane["ack_wait"] == round(units.seconds(consumer.get("ack_wait", "30s")) * 1e9)
        assert lane["max_ack_pending"] == consumer.get("max_ack_pending", 1000)
        assert list(family.priorities) == raw["family"].get("priorities", ["high", "normal", "low"])
        assert family.aliases == raw["family"].get("aliases", {})
        assert len(config["subjects"]) == len(family.priorities) + 1
        assert f"{family.journal}.*.*" in topology.journal_stream.config["subjects"]

    @given(files, st.data())
    def test_an_unknown_key_is_refused_wherever_it_is(self, raw: dict[str, Any], data: st.DataObject) -> None:
        raw = copy.deepcopy(raw)
        at = data.draw(st.sampled_from(tables(raw)))
        key = data.draw(st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), max_size=12)) + "_zz"
        table = raw
        for step in at:
            table = table[step]
        table[key] = data.draw(st.sampled_from([1, "30s", True, [], {}]))
        error = refusal(toml(raw))
        shown = key if subjects.TOKEN.fullmatch(key) else json.dumps(key)
        assert error.key == ".".join((*at, shown))
        assert "unknown key" in error.problem
