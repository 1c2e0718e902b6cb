"""Plan and apply, on a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from aiqueue import subjects
from aiqueue.config import Settings
from aiqueue.connection import Connection
from aiqueue.errors import AIQueueError, ConfigMismatch, DataLossRefused, NotFound
from aiqueue.topology.declared import Topology, bundled_directory
from aiqueue.topology.execution import PlanExecution, aside_subject
from aiqueue.topology.provision import apply, plan

from ..support import Account


@pytest.fixture
async def conn(account: Account) -> AsyncIterator[Connection]:
    connection = Connection(Settings.load(url=account.url, user=account.user, password=account.password))
    await connection.open()
    yield connection
    await connection.close()


def declared(rest: str = "", *, family: str = "", consumer: str = "", dead: str = "", **mine: Any) -> Topology:
    """The bundled files and a family x.y, small and in memory. `dead` is added to the file of AI_DEAD."""
    files = [(path.name, path.read_text()) for path in sorted(bundled_directory().glob("*.toml"))]
    if dead:
        files = [(name, dead if name == "dead.toml" else text) for name, text in files]
    if "max_bytes" not in rest:
        rest += '\nmax_bytes = "1MiB"'
    text = (
        f'[family]\nname = "x.y"\ndefault_kind = "x"\n{family}\n'
        f'[stream]\nname = "X_Y"\nstorage = "memory"\n{rest}\n[consumer]\n{consumer}\n'
    )
    return Topology.build([*files, ("x_y.toml", text)], **mine)


async def publish(conn: Connection, subject: str, count: int = 1) -> None:
    """`count` messages; raises what the stream answers."""
    for n in range(count):
        await conn.store(subject, b"{}", {"Nats-Msg-Id": f"{subject}/{n}"}, timeout_s=3)


async def stored(conn: Connection, stream: str) -> dict[str, int]:
    info = await conn.api(f"STREAM.INFO.{stream}", {"subjects_filter": ">"})
    subjects: dict[str, int] = info["state"].get("subjects") or {}
    return subjects


async def config_of(conn: Connection, stream: str) -> dict[str, Any]:
    config: dict[str, Any] = (await conn.api(f"STREAM.INFO.{stream}"))["config"]
    return config


async def make_lane(conn: Connection, topology: Topology, tenant: str, priority: str, **other: Any) -> None:
    family = topology.family("x.y")
    config = family.lane_config(tenant, priority) | other
    subject = f"CONSUMER.CREATE.{family.stream}.{config['durable_name']}.{config['filter_subject']}"
    await conn.api(subject, {"stream_name": family.stream, "config": config})


async def lanes(conn: Connection) -> dict[str, dict[str, Any]]:
    page = await conn.api("CONSUMER.LIST.X_Y", {"offset": 0})
    return {each["name"]: each["config"] for each in page["consumers"] or ()}


class TestApply:
    async def test_creates_all_and_a_second_time_nothing(self, conn: Connection) -> None:
        topology = Topology.load()
        assert {line.split()[0] for line in (await plan(conn, topology)).lines()} == {"+"}
        made = await apply(conn, topology)
        assert made.lines() == [f"+ create stream {name}" for name in topology.streams]
        assert not (await plan(conn, topology)).drift
        assert not (await apply(conn, topology)).drift

    async def test_every_work_stream_takes_its_lanes_and_no_others(self, conn: Connection) -> None:
        topology = Topology.load()
        await apply(conn, topology)
        for family in topology.work_families:
            bare = f"ai.{family.name}.acme"
            await publish(conn, bare)
            for priority in family.priorities:
                await publish(conn, f"{bare}.{priority}")
            expected = dict.fromkeys([f"{bare}.{each}" for each in family.priorities], 1) | {f"{bare}.normal": 2}
            assert await stored(conn, family.stream) == expected
            with pytest.raises(AIQueueError):
                await conn.store(f"{bare}.urgent", b"{}", {"Nats-Msg-Id": "u"}, timeout_s=0.2)

    async def test_inbox_journal_and_dead_streams_take_theirs(self, conn: Connection) -> None:
        topology = Topology.load()
        await apply(conn, topology)
        for subject in ("ai.agent.message.acme", "ai.agent.message.acme.a1", "ai.dead.x.y.acme.1"):
            await publish(conn, subject)
        for family in topology.work_families:
            await publish(conn, f"{family.journal}.acme.1")
        assert len(await stored(conn, "AI_RESULTS")) == len(topology.work_families)

    async def test_four_at_once_are_harmless(self, account: Account, conn: Connection) -> None:
        topology = declared()
        settings = Settings.load(url=account.url, user=account.user, password=account.password)
        connections = [Connection(settings) for _ in range(4)]
        for each in connections:
            await each.open()
        try:
            await asyncio.gather(*(apply(each, topology) for each in connections))
            assert not (await plan(conn, topology)).drift
            changed = declared("max_bytes = '7MiB'", consumer="ack_wait = '9s'")
            await asyncio.gather(*(apply(each, changed) for each in connections))
            assert not (await plan(conn, changed)).drift
        finally:
            for each in connections:
                await each.close()

    async def test_two_applications_keep_each_others_journals(self, conn: Connection, tmp_path: Path) -> None:
        family = '[family]\nname = "llmops.operations"\ndefault_kind = "op"'
        (tmp_path / "llmops_operations.toml").write_text(f'{family}\n[stream]\nname = "LLMOPS_OPERATIONS"\n')
        ours, theirs = declared(), Topology.load(tmp_path)
        await apply(conn, theirs)
        await asyncio.gather(apply(conn, ours), apply(conn, theirs))
        subjects = (await config_of(conn, "AI_RESULTS"))["subjects"]
        assert {"ai.llmops.operations-results.*.*", "ai.x.y-results.*.*"} <= set(subjects)
        assert not (await plan(conn, ours)).drift
        assert not (await plan(conn, theirs)).drift

    async def test_streams_that_all_share_keep_another_versions_subjects(self, conn: Connection) -> None:
        ours = declared()
        await apply(conn, ours)
        shared = [spec for spec in ours.streams.values() if spec.role not in ("work", "inbox")]
        for spec in shared:
            live = await config_of(conn, spec.name)
            await conn.api(f"STREAM.UPDATE.{spec.name}", live | {"subjects": [f"later.{spec.name}", spec.name]})
        await apply(conn, ours)
        assert len(shared) > 8
        for spec in shared:
            subjects = (await config_of(conn, spec.name))["subjects"]
            assert {*spec.config["subjects"], f"later.{spec.name}"} <= set(subjects)
        assert not (await plan(conn, ours)).drift

    async def test_a_stream_that_a_killed_apply_left_aside_gets_its_subjects_again(self, conn: Connection) -> None:
        """Killed between the two writes by which it deletes what it created."""
        ours = declared()
        await apply(conn, ours)
        for stream in ("AI_RESULTS", "AI_STRANDED", "AI_DEAD", "X_Y"):
            live = await config_of(conn, stream)
            aside = {key: value for key, value in live.items() if key not in ("republish", "subject_transform")}
            await conn.api(f"STREAM.UPDATE.{stream}", aside | {"subjects": [aside_subject(stream)]})
        await apply(conn, ours)
        for stream in ("AI_RESULTS", "AI_STRANDED", "AI_DEAD", "X_Y"):
            assert set((await config_of(conn, stream))["subjects"]) == set(ours.streams[stream].config["subjects"])
        assert not (await plan(conn, ours)).drift

    async def test_what_no_file_states_stays(self, conn: Connection) -> None:
        await apply(conn, declared())
        live = await config_of(conn, "X_Y")
        await conn.api("STREAM.UPDATE.X_Y", live | {"description": "mine", "max_msg_size": 5000})
        assert not (await plan(conn, declared())).drift
        assert (await apply(conn, declared("max_bytes = '9MiB'"))).drift
        live = await config_of(conn, "X_Y")
        assert (live["description"], live["max_msg_size"], live["max_bytes"]) == ("mine", 5000, 9 * 2**20)

    async def test_a_limit_set_by_another_hand_is_drift(self, conn: Connection) -> None:
        await apply(conn, declared())
        await conn.api("STREAM.UPDATE.X_Y", await config_of(conn, "X_Y") | {"max_age": 3600 * 10**9})
        assert (await plan(conn, declared())).lines() == ["~ X_Y.max_age: 1h -> unlimited"]
        await apply(conn, declared())
        assert (await config_of(conn, "X_Y"))["max_age"] == 0


class TestLines:
    async def test_values_are_for_people(self, conn: Connection) -> None:
        await apply(conn, declared())
        changed = declared(
            "max_bytes = '3MiB'\nmax_msgs_per_subject = 5\nduplicate_window = '90s'\nallow_atomic = false",
            family="priorities = ['high', 'normal', 'bulk']",
        )
        assert sorted((await plan(conn, changed)).lines()) == [
            "~ X_Y.allow_atomic: true -> false",
            "~ X_Y.duplicate_window: 10m -> 1m30s",
            "~ X_Y.max_bytes: 1.0 MiB -> 3.0 MiB",
            "~ X_Y.max_msgs_per_subject: 100000 -> 5",
            "~ X_Y.subjects: - ai.x.y.*.low, + ai.x.y.*.bulk",
        ]

    async def test_plan_changes_nothing(self, conn: Connection) -> None:
        await plan(conn, declared())
        with pytest.raises(NotFound):
            await config_of(conn, "X_Y")


class TestDataLoss:
    async def test_fewer_jobs_to_a_lane_is_refused_then_deletes(self, conn: Connection) -> None:
        await apply(conn, declared("max_msgs_per_subject = 10"))
        await publish(conn, "ai.x.y.acme", 10)
        fewer = declared("max_msgs_per_subject = 4\nmax_bytes = '5MiB'")
        found = await plan(conn, fewer)
        assert len(found.losses) == 1
        assert found.losses[0].startswith("X_Y: lowering max_msgs_per_subject from 10 to 4 deletes the oldest messages")
        with pytest.raises(DataLossRefused) as caught:
            await apply(conn, fewer)
        assert caught.value.changes == found.losses
        assert await stored(conn, "X_Y") == {"ai.x.y.acme.normal": 10}
        assert (await config_of(conn, "X_Y"))["max_bytes"] == 2**20  # nothing at all was changed
        await apply(conn, fewer, allow_data_loss=True)
        assert await stored(conn, "X_Y") == {"ai.x.y.acme.normal": 4}

    async def test_nothing_is_created_before_a_refusal(self, conn: Connection) -> None:
        await apply(conn, declared("max_msgs_per_subject = 10"))
        await publish(conn, "ai.x.y.acme", 10)
        await conn.api("STREAM.DELETE.AI_DEAD")
        with pytest.raises(DataLossRefused):
            await apply(conn, declared("max_msgs_per_subject = 4"))
        with pytest.raises(NotFound):
            await config_of(conn, "AI_DEAD")

    async def test_a_limit_above_what_is_stored_loses_nothing(self, conn: Connection) -> None:
        await apply(conn, declared("max_msgs_per_subject = 10"))
        await publish(conn, "ai.x.y.acme", 3)
        await apply(conn, declared("max_msgs_per_subject = 4"))
        assert await stored(conn, "X_Y") == {"ai.x.y.acme.normal": 3}

    async def test_full_work_streams_keep_their_jobs_under_lower_totals(self, conn: Connection) -> None:
        await apply(conn, declared())
        await publish(conn, "ai.x.y.acme", 10)
        await apply(conn, declared("max_msgs = 4\nmax_bytes = 50"), allow_full=True)
        assert await stored(conn, "X_Y") == {"ai.x.y.acme.normal": 10}

    @pytest.mark.parametrize("line", ["max_msgs = 4", "max_bytes = 200", "max_msgs_per_subject = 4", "max_age = '1s'"])
    async def test_limits_of_the_dead_letters(self, conn: Connection, line: str) -> None:
        def dead(rest: str) -> Topology:
            return declared(dead=f"role = 'dead'\n[stream]\nname = 'AI_DEAD'\ndiscard = 'old'\n{rest}\n")

        await apply(conn, dead("max_age = '2s'" if "max_age" in line else ""))
        await publish(conn, "ai.dead.x.y.acme.1", 10)
        window = "\nduplicate_window = '1s'" if "max_age" in line else ""
        with pytest.raises(DataLossRefused, match=f"lowering {line.partition(' ')[0]} from"):
            await apply(conn, dead(line + window))
        await apply(conn, dead(line + window), allow_data_loss=True)
        async with asyncio.timeout(25):
            while (await stored(conn, "AI_DEAD")).get("ai.dead.x.y.acme.1", 0) > 4:
                await asyncio.sleep(0.05)

    async def test_switching_to_discard_old_above_the_limit(self, conn: Connection) -> None:
        def dead(discard: str, limit: int) -> Topology:
            rest = f"storage = 'memory'\ndiscard = '{discard}'\nmax_msgs = {limit}"
            return declared(dead=f"role = 'dead'\n[stream]\nname = 'AI_DEAD'\n{rest}\n")

        await apply(conn, dead("new", 100))
        await publish(conn, "ai.dead.x.y.acme.1", 10)
        await apply(conn, dead("new", 5), allow_full=True)
        assert await stored(conn, "AI_DEAD") == {"ai.dead.x.y.acme.1": 10}
        with pytest.raises(DataLossRefused, match="switching discard to old"):
            await apply(conn, dead("old", 5))
        await apply(conn, dead("old", 5), allow_data_loss=True)
        assert await stored(conn, "AI_DEAD") == {"ai.dead.x.y.acme.1": 5}


class TestMismatch:
    async def test_what_cannot_change_in_place_says_what_to_do(self, conn: Connection) -> None:
        await conn.api(
            "STREAM.CREATE.X_Y",
            {"name": "X_Y", "subjects": ["ai.x.y.>"], "retention": "limits", "storage": "file"},
        )
        found = await plan(conn, declared())
        assert "! X_Y.storage: file -> memory" in "\n".join(found.lines())
        with pytest.raises(
            ConfigMismatch, match=r"retention cannot change in place from limits to workqueue"
        ) as caught:
            await apply(conn, declared())
        assert "nats stream rm X_Y" in str(caught.value)
        with pytest.raises(NotFound):  # refused before anything was created
            await config_of(conn, "AI_DEAD")

    async def test_message_ttl_cannot_be_switched_off(self, conn: Connection) -> None:
        await apply(conn, declared("allow_msg_ttl = true"))
        with pytest.raises(ConfigMismatch, match="allow_msg_ttl cannot change in place from true to false"):
            await apply(conn, declared("allow_msg_ttl = false"))
        assert not (await plan(conn, declared())).drift  # undeclared is not false

    @pytest.mark.parametrize("subject", ["ai.x.y.acme.high", "ai.x.>", "ai.*.y.*.low"])
    async def test_another_stream_on_our_subjects_is_named(self, conn: Connection, subject: str) -> None:
        await conn.api("STREAM.CREATE.FOREIGN", {"name": "FOREIGN", "subjects": [subject]})
        found = await plan(conn, declared())
        assert any(line.startswith("! create stream X_Y") for line in found.lines())
        with pytest.raises(ConfigMismatch, match=r"X_Y: its subject ai\.x\.y\.\S+ overlaps with .* stream FOREIGN"):
            await apply(conn, declared())
        with pytest.raises(NotFound):
            await config_of(conn, "AI_DEAD")

    async def test_another_stream_in_the_way_of_an_added_subject(self, conn: Connection) -> None:
        await apply(conn, declared())
        await conn.api("STREAM.CREATE.FOREIGN", {"name": "FOREIGN", "subjects": ["ai.x.y.*.bulk"]})
        with pytest.raises(ConfigMismatch, match="overlaps with the existing stream FOREIGN"):
            await apply(conn, declared(family="priorities = ['high', 'normal', 'low', 'bulk']"))

    async def test_a_priority_with_jobs_cannot_go(self, conn: Connection) -> None:
        await apply(conn, declared())
        await publish(conn, "ai.x.y.acme.low", 2)
        await publish(conn, "ai.x.y.acme.high")
        without = declared(family="priorities = ['high', 'normal']")
        with pytest.raises(ConfigMismatch, match=r"2 messages are stored on ai\.x\.y\.\*\.low"):
            await apply(conn, without)
        await conn.api("STREAM.PURGE.X_Y", {"filter": "ai.x.y.acme.low"})
        await apply(conn, without)
        assert await stored(conn, "X_Y") == {"ai.x.y.acme.high": 1}

    async def test_a_cluster_profile_needs_a_cluster(self, conn: Connection) -> None:
        with pytest.raises(ConfigMismatch, match=r"3 replicas need a cluster.*profile single"):
            await apply(conn, Topology.load(profile="cluster"))

    async def test_a_stream_larger_than_the_disk(self, conn: Connection) -> None:
        with pytest.raises(ConfigMismatch, match=r"X_Y reserves 9000\.0 TiB of memory storage"):
            await apply(conn, declared("max_bytes = '9000TiB'"))

    async def test_undeclared_streams_are_left_alone(self, conn: Connection) -> None:
        await conn.api("STREAM.CREATE.OTHER", {"name": "OTHER", "subjects": ["other.>"]})
        before = await config_of(conn, "OTHER")
        assert "OTHER" not in "\n".join((await apply(conn, declared())).lines())
        assert await config_of(conn, "OTHER") == before


class TestLanes:
    async def test_other_limits_are_updated_in_place(self, conn: Connection) -> None:
        await apply(conn, declared())
        for tenant in ("acme", "globex", "initech", "umbrella"):
            await make_lane(conn, declared(), tenant, "high")
        changed = declared(consumer="ack_wait = '1m'\nmax_ack_pending = 7")
        made = await apply(conn, changed)
        shown = "lanes acme-high, globex-high, initech-high and 1 more"
        assert made.lines() == [
            f"~ X_Y {shown}.ack_wait: 30s -> 1m",
            f"~ X_Y {shown}.max_ack_pending: 1000 -> 7",
        ]
        config = (await lanes(conn))["umbrella-high"]
        assert (config["ack_wait"], config["max_ack_pending"]) == (60 * 10**9, 7)
        assert not (await plan(conn, changed)).drift

    async def test_all_pages_are_read(self, conn: Connection) -> None:
        await apply(conn, declared())
        await asyncio.gather(*(make_lane(conn, declared(), f"t{n}", "low") for n in range(300)))
        found = await plan(conn, declared(consumer="max_deliver = 50"))
        assert len(found.changes[0].lanes) == 300

    @pytest.mark.parametrize("family", ["lanes = 'shared'", "lane_storage = 'memory'", "priorities = ['normal']"])
    async def test_lanes_of_another_shape_go(self, conn: Connection, family: str) -> None:
        await apply(conn, declared())
        await make_lane(conn, declared(), "acme", "high")
        await publish(conn, "ai.x.y.acme")
        made = await apply(conn, declared(family=family))
        assert made.lines()[0].startswith("- X_Y lane acme-high: delete")
        assert "jobs in flight are redelivered" in made.lines()[0]
        assert await lanes(conn) == {}
        assert await stored(conn, "X_Y") == {"ai.x.y.acme.normal": 1}
        if "priorities" not in family:
            await make_lane(conn, declared(family=family), "acme", "high")
        assert not (await plan(conn, declared(family=family))).drift

    async def test_foreign_consumers_are_left_alone(self, conn: Connection) -> None:
        await apply(conn, declared())
        await make_lane(conn, declared(), "acme", "high", durable_name="audit", ack_wait=10**9)
        await make_lane(conn, declared(), "acme", "low", durable_name="globex-low", ack_wait=10**9)
        assert not (await plan(conn, declared(family="lane_storage = 'memory'"))).drift

    async def test_workers_that_remake_the_former_lanes_do_not_stop_apply(
        self, conn: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await apply(conn, declared())
        await make_lane(conn, declared(), "acme", "high")
        delete = PlanExecution._delete_lane

        async def delete_and_remake(execution: PlanExecution, stream: str, name: str) -> None:
            await delete(execution, stream, name)
            await make_lane(conn, declared(), "acme", "high")

        monkeypatch.setattr(PlanExecution, "_delete_lane", delete_and_remake)
        made = await apply(conn, declared(family="lane_storage = 'memory'"))
        assert [each.action for each in made.changes] == ["delete-lanes"]


class TestKeyLanes:
    """The lanes of the values of a family's limit_key."""

    LIMITED = 'limit_key = "model"'
    ADDED = tuple(f"ai.x.y.*.{each}.*" for each in ("high", "normal", "low"))
    KEY = subjects.hashed("gpt-4o")

    async def make_lane(self, conn: Connection, key: str, **other: Any) -> str:
        config = declared(family=self.LIMITED).family("x.y").lane_config("acme", "normal", key) | other
        name = str(config["durable_name"])
        request = {"stream_name": "X_Y", "config": config}
        await conn.api(f"CONSUMER.CREATE.X_Y.{name}.{config['filter_subject']}", request)
        return name

    async def test_a_family_that_gets_a_limit_key_gets_their_subjects(self, conn: Connection) -> None:
        await apply(conn, declared())
        limited = declared(family=self.LIMITED)
        assert (await plan(conn, limited)).lines() == [
            f"~ X_Y.subjects: {', '.join(f'+ {each}' for each in self.ADDED)}"
        ]
        await publish(conn, "ai.x.y.acme")
        await apply(conn, limited)
        assert not (await plan(conn, limited)).drift
        await publish(conn, f"ai.x.y.acme.normal.{self.KEY}", 2)
        assert await stored(conn, "X_Y") == {"ai.x.y.acme.normal": 1, f"ai.x.y.acme.normal.{self.KEY}": 2}

    async def test_their_consumers_are_ours_and_corrected_as_others(self, conn: Connection) -> None:
        await apply(conn, declared(family=self.LIMITED))
        names = [await self.make_lane(conn, each) for each in (self.KEY, subjects.REST)]
        assert (await plan(conn, declared(family=self.LIMITED))).lines() == []
        longer = declared(family=self.LIMITED, consumer="ack_wait = '9s'")
        assert (await plan(conn, longer)).lines() == [f"~ X_Y lanes {', '.join(names)}.ack_wait: 30s -> 9s"]
        await apply(conn, longer)
        assert {each["ack_wait"] for each in (await lanes(conn)).values()} == {9 * 10**9}

    async def test_without_the_limit_key_they_go_if_no_job_waits_in_them(self, conn: Connection) -> None:
        await apply(conn, declared(family=self.LIMITED))
        name = await self.make_lane(conn, self.KEY)
        removed, changed = (await plan(conn, declared())).lines()
        assert removed.startswith(f"- X_Y lane {name}: delete")
        assert changed == f"~ X_Y.subjects: {', '.join(f'- {each}' for each in self.ADDED)}"
        await apply(conn, declared())
        assert await lanes(conn) == {}
        with pytest.raises(NotFound, match="no stream matches"):
            await publish(conn, f"ai.x.y.acme.normal.{self.KEY}")

    async def test_while_jobs_wait_in_them_nothing_is_changed_and_the_plan_says_what_to_do(
        self, conn: Connection
    ) -> None:
        await apply(conn, declared(family=self.LIMITED))
        name = await self.make_lane(conn, self.KEY)
        await publish(conn, f"ai.x.y.acme.normal.{self.KEY}", 3)
        with pytest.raises(ConfigMismatch) as caught:
            await apply(conn, declared())
        assert str(caught.value) == (
            "X_Y: 3 messages are stored on ai.x.y.*.normal.*, which no worker would consume: keep limit_key, remove "
            "the family's rules of limits, and apply once workers have emptied it"
        )
        assert set(await lanes(conn)) == {name}
        assert set(self.ADDED) <= set((await config_of(conn, "X_Y"))["subjects"])
