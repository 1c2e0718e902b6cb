"""Apply: its sum, all or nothing, what it refuses beforehand, and who applied."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue.config import Settings
from aiqueue.connection import Connection
from aiqueue.errors import AIQueueError, ConfigMismatch, Unavailable
from aiqueue.topology.changes import Plan
from aiqueue.topology.declared import Topology
from aiqueue.topology.execution import PlanExecution
from aiqueue.topology.provision import apply, plan

from ..cli.test_cli import run_main
from ..support import Account, NatsProcess
from .test_provision import config_of, declared, make_lane, publish, stored

GIB = 2**30


@asynccontextmanager
async def connected(account: Account, **settings: Any) -> AsyncIterator[Connection]:
    connection = Connection(Settings.load(url=account.url, user=account.user, password=account.password, **settings))
    await connection.open()
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture
async def conn(account: Account) -> AsyncIterator[Connection]:
    async with connected(account) as connection:
        yield connection


@pytest.fixture
async def limited(tmp_path: Path) -> AsyncIterator[Callable[[str], Any]]:
    """A factory of connections to an account with limits, such as "max_file: 1GB"."""
    servers: list[NatsProcess] = []

    def connect(limits: str) -> Any:
        users = f'users: [{{ user: "test", password: "{"p" * 16}" }}]'
        config = f"accounts {{ A: {{ jetstream: {{ {limits} }}, {users} }} }}"
        server = NatsProcess(tmp_path / "server", config=lambda: config)
        server.password = "p" * 16
        servers.append(server)
        server.start()
        return connected(server.account)

    yield connect
    for each in servers:
        each.kill()


async def names(conn: Connection) -> list[str]:
    return list((await conn.api("STREAM.NAMES")).get("streams") or [])


async def states(conn: Connection) -> dict[str, Any]:
    """The configuration of each stream, without the stamps."""
    found = {}
    for name in await names(conn):
        config = await config_of(conn, name)
        config["metadata"] = {k: v for k, v in config["metadata"].items() if not k.startswith("aiqueue.")}
        found[name] = config
    return found


class TestSum:
    async def test_is_told_before_anything_is_made(self, conn: Connection) -> None:
        told: list[Plan] = []
        seen: list[list[str]] = []

        def note(found: Plan) -> None:
            told.append(found)
            seen.append([each.stream for each in found.changes])

        topology = declared("max_bytes = '3GiB'")
        await apply(conn, topology, on_plan=note)
        sums = {each.storage: each for each in told[0].sums}
        in_files = sum(
            max(spec.config.get("max_bytes", 0), 0)
            for spec in topology.streams.values()
            if spec.config["storage"] == "file"
        )
        assert (sums["file"].declared, sums["file"].added) == (in_files, in_files)
        assert sums["memory"].declared == 3 * GIB
        assert sums["memory"].line() == (
            "memory: 3.0 GiB set aside, 3.0 GiB more than now; the account has no limit, and the server does not tell "
            "its own"
        )
        assert set(seen[0]) == set(topology.streams)
        (less,) = [each for each in (await plan(conn, declared("max_bytes = '1GiB'"))).sums if each.storage == "memory"]
        assert less.line().startswith("memory: 1.0 GiB set aside, 2.0 GiB less than now; ")

    async def test_has_the_limit_of_the_account_and_what_is_free(self, limited: Callable[[str], Any]) -> None:
        async with limited("max_file: 20GB, max_mem: 1GB") as conn:
            other = {"name": "OTHER", "subjects": ["other"], "storage": "memory", "max_bytes": GIB // 4}
            await conn.api("STREAM.CREATE.OTHER", other)
            found = {each.storage: each for each in (await plan(conn, declared("max_bytes = '64MiB'"))).sums}
            assert (found["file"].limit, found["file"].free) == (20 * GIB, 20 * GIB)
            assert (
                found["memory"].line()
                == "memory: 64.0 MiB set aside, 64.0 MiB more than now; free: 768.0 MiB of 1.0 GiB"
            )


class TestRoom:
    @pytest.mark.parametrize(
        ("limits", "said"),
        [
            (
                "max_file: 1GB",
                r"account: .* more file storage is needed, 1\.0 GiB is free: .* or raise max_file",
            ),
            ("max_file: 50GB, max_mem: 1MB", r"2\.0 MiB more memory is needed, 1\.0 MiB is free: .* or raise max_mem"),
            ("max_streams: 5", r"account: \d+ streams more are needed, and the account may have 5 and has 0: declare"),
            ("store_max_stream_bytes: 2MB", r"AI_RESULTS: max_bytes is .*, and the account allows a stream 2\.0 MiB"),
            ("max_bytes_required: true", r"AI_PARKED: the account requires max_bytes, and this stream can have none"),
        ],
    )
    async def test_that_is_lacking_is_said_before_the_first_stream_is_made(
        self, limited: Callable[[str], Any], limits: str, said: str
    ) -> None:
        async with limited(limits) as conn:
            topology = declared("max_bytes = '2MiB'")
            with pytest.raises(ConfigMismatch, match=said):
                await apply(conn, topology)
            assert await names(conn) == []
            found = await plan(conn, topology)
            assert found.shortages
            assert [line for line in found.lines() if line.startswith("! ")] == [e.line() for e in found.shortages]

    async def test_of_one_account_may_be_just_enough(self, limited: Callable[[str], Any]) -> None:
        topology = declared("max_bytes = '2MiB'")
        needed = sum(max(each.config.get("max_bytes", 0), 0) for each in topology.streams.values()) - 2**21
        async with limited(f"max_file: {needed + 1}, max_mem: 2MB") as conn:  # one byte for those without max_bytes
            await conn.api("STREAM.CREATE.OTHER", {"name": "OTHER", "subjects": ["other"], "max_bytes": 1})
            with pytest.raises(ConfigMismatch, match=r"account: .* more file storage is needed"):
                await apply(conn, topology)
            assert await names(conn) == ["OTHER"]
            await conn.api("STREAM.DELETE.OTHER")
            await apply(conn, topology)
            assert not (await plan(conn, topology)).drift
            with pytest.raises(ConfigMismatch, match=r"1\.0 MiB more memory is needed, 0 B is free"):
                await apply(conn, declared("max_bytes = '3MiB'"))

    async def test_for_copies_is_only_known_of_a_server_that_has_the_streams_itself(
        self, own_server: Callable[..., NatsProcess]
    ) -> None:
        """A leaf node may pass requests on to a cluster."""
        async with connected(own_server().account) as conn, connected(own_server("jetstream: disabled").account) as far:
            found = await plan(conn, Topology.load(profile="cluster"))
            assert [each.code for each in found.shortages] == ["no-cluster"]
            assert (conn.cluster, far.cluster) == ("", "(JetStream is elsewhere)")

    async def test_the_rights_for_it_are_not_needed(self, tmp_path: Path) -> None:
        user = f'user: test, password: {"p" * 16}, permissions: {{ publish: {{ deny: ["$JS.API.INFO"] }} }}'
        config = f"accounts {{ A: {{ jetstream: enabled, users: [{{ {user} }}] }} }}"
        server = NatsProcess(tmp_path / "server", config=lambda: config)
        server.password = "p" * 16
        server.start()
        try:
            async with connected(server.account) as conn:
                assert (await apply(conn, declared())).drift
        finally:
            server.kill()


class TestAllOrNothing:
    async def test_a_server_without_room_is_left_as_it_was(self, own_server: Callable[..., NatsProcess]) -> None:
        async with connected(own_server(storage="max_file_store: 4GB").account) as conn:
            await conn.api("STREAM.CREATE.OTHER", {"name": "OTHER", "subjects": ["other"], "max_bytes": 2**20})
            with pytest.raises(ConfigMismatch) as caught:
                await apply(conn, Topology.load())
            assert "too much for the server" in str(caught.value)
            assert re.search(r"; nothing is changed: the \d+ changes made before were undone$", str(caught.value))
            assert await names(conn) == ["OTHER"]
            info = await conn.api("INFO")
            assert info["reserved_storage"] == 2**20

    async def test_what_was_changed_before_is_set_back(self, conn: Connection) -> None:
        def dead(rest: str) -> str:
            return f"role = 'dead'\n[stream]\nname = 'AI_DEAD'\ndiscard = 'old'\n{rest}"

        await apply(conn, declared("max_bytes = '8MiB'", dead=dead("max_age = '2h'")))
        await make_lane(conn, declared(), "acme", "high")
        await publish(conn, "ai.dead.x.y.acme.1")
        before, lane = await states(conn), (await conn.api("CONSUMER.INFO.X_Y.acme-high"))["config"]
        changed, shorter = ("max_bytes = '4MiB'\nmax_age = '1h'", "ack_wait = '9s'"), "max_age = '1h'"
        refused = declared(changed[0], consumer=changed[1], dead=dead(f"{shorter}\nmax_bytes = '9000TiB'"))
        with pytest.raises(
            ConfigMismatch, match=r"AI_DEAD reserves .*; nothing is changed: the 2 changes made before were undone"
        ):
            await apply(conn, refused, allow_data_loss=True)
        assert await states(conn) == before
        assert (await conn.api("CONSUMER.INFO.X_Y.acme-high"))["config"] == lane
        good = declared(changed[0], consumer=changed[1], dead=dead(shorter))
        await apply(conn, good, allow_data_loss=True)
        assert not (await plan(conn, good)).drift

    async def test_a_new_stream_that_has_jobs_by_then_is_kept_and_named(
        self, own_server: Callable[..., NatsProcess], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with connected(own_server(storage="max_file_store: 4GB").account) as conn:
            undo = PlanExecution._undo

            async def publish_and_undo(execution: PlanExecution) -> str:
                await publish(conn, "ai.agent.tasks.acme", 2)
                return await undo(execution)

            monkeypatch.setattr(PlanExecution, "_undo", publish_and_undo)
            with pytest.raises(
                ConfigMismatch, match=r"AI_AGENT_TASKS \(it has stored 2 messages meanwhile\)"
            ) as caught:
                await apply(conn, Topology.load())
            assert str(caught.value).endswith("the new stream AI_AGENT_TASKS (it has stored 2 messages meanwhile)")
            assert await names(conn) == ["AI_AGENT_TASKS"]
            assert await stored(conn, "AI_AGENT_TASKS") == {"ai.agent.tasks.acme.normal": 2}
            await publish(conn, "ai.agent.tasks.globex")  # its subjects are its own again

    async def test_streams_of_another_apply_stay(
        self, own_server: Callable[..., NatsProcess], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with connected(own_server(storage="max_file_store: 4GB").account) as conn:
            create, topology = PlanExecution.create, declared()
            spec = topology.streams["X_Y"]

            async def both_create(execution: PlanExecution, created: Any) -> None:
                if created.name == "X_Y":
                    await conn.api("STREAM.CREATE.X_Y", dict(spec.config))
                await create(execution, created)

            monkeypatch.setattr(PlanExecution, "create", both_create)
            order = replace(topology, streams={"X_Y": spec, **topology.streams})
            with pytest.raises(ConfigMismatch, match="too much for the server"):
                await apply(conn, order)
            assert await names(conn) == ["X_Y"]

    async def test_an_apply_that_is_cancelled_undoes_what_it_did(
        self, conn: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        create, topology, reached = PlanExecution.create, Topology.load(), asyncio.Event()

        async def create_and_wait(execution: PlanExecution, spec: Any) -> None:
            await create(execution, spec)
            if spec.name == list(topology.streams)[3]:
                reached.set()
                await asyncio.Event().wait()

        monkeypatch.setattr(PlanExecution, "create", create_and_wait)
        task = asyncio.create_task(apply(conn, topology))
        await reached.wait()
        assert len(await names(conn)) == 4
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await names(conn) == []

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_a_command_that_is_told_to_stop_undoes_what_it_did_and_says_so(
        self,
        account: Account,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        number: signal.Signals,
        code: int,
    ) -> None:
        for name in ("url", "user", "password"):
            monkeypatch.setenv(f"AIQUEUE_{name.upper()}", getattr(account, name))
        create, made = PlanExecution.create, []

        async def create_and_stop(execution: PlanExecution, spec: Any) -> None:
            await create(execution, spec)
            made.append(spec.name)
            if len(made) == 3:
                signal.raise_signal(number)
                await asyncio.sleep(60)

        monkeypatch.setattr(PlanExecution, "create", create_and_stop)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a process of its own
        try:
            ended = run_main("apply")
        finally:
            signal.signal(signal.SIGINT, before)
        assert ended.returncode == code, ended
        assert "interrupted: nothing is changed: the 3 changes made before were undone" in caplog.text
        assert account.stream_names() == []

    async def test_a_server_that_is_lost_meanwhile_is_said_once_for_each_and_soon(
        self, own_server: Callable[..., NatsProcess], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server, topology = own_server(), Topology.load()
        async with connected(server.account) as conn:
            create = PlanExecution.create

            async def create_and_kill(execution: PlanExecution, spec: Any) -> None:
                if spec.name == list(topology.streams)[2]:
                    server.kill()
                await create(execution, spec)

            monkeypatch.setattr(PlanExecution, "create", create_and_kill)
            async with asyncio.timeout(25):
                with pytest.raises(Unavailable) as caught:
                    await apply(conn, topology)
            kept = list(topology.streams)[:2]
            assert all(f"the new stream {name} (" in str(caught.value) for name in kept)


class TestLimitsBelowWhatIsStored:
    @pytest.mark.parametrize(("line", "key"), [("max_bytes = 500", "max_bytes"), ("max_msgs = 4", "max_msgs")])
    async def test_are_refused_for_streams_that_refuse_when_full(self, conn: Connection, line: str, key: str) -> None:
        await apply(conn, declared())
        await publish(conn, "ai.x.y.acme", 10)
        before, lower = await states(conn), declared(line)
        found = await plan(conn, lower)
        (field,) = [each for each in found.changes[0].fields if each.key == key]
        assert field.why
        assert f"lowering {key} from " in field.why
        assert "the stream takes no message (StreamFull)" in field.why
        with pytest.raises(ConfigMismatch, match=f"X_Y: lowering {key} .* add --allow-full"):
            await apply(conn, lower)
        assert await states(conn) == before
        await apply(conn, lower, allow_full=True)
        with pytest.raises(AIQueueError, match="full"):
            await publish(conn, "ai.x.y.acme.high")

    async def test_are_no_matter_above_it_and_where_the_limit_is_raised(self, conn: Connection) -> None:
        await apply(conn, declared())
        await publish(conn, "ai.x.y.acme", 10)
        await apply(conn, declared("max_msgs = 10\nmax_bytes = '4KiB'"))
        await apply(conn, declared("max_msgs = 4\nmax_bytes = '4KiB'"), allow_full=True)
        raised = declared("max_msgs = 6\nmax_bytes = '4KiB'")
        assert (await plan(conn, raised)).stops == ()
        await apply(conn, raised)


class TestStamps:
    async def test_say_who_applied_which_declaration(self, account: Account, conn: Connection) -> None:
        async with connected(account, name="billing") as billing:
            await apply(billing, declared("max_bytes = '1MiB'"))
        await apply(conn, declared("max_bytes = '1MiB'"))  # changes nothing
        other = declared("max_bytes = '2MiB'")
        found = await plan(conn, other)
        assert found.lines() == ["~ X_Y.max_bytes: 1.0 MiB -> 2.0 MiB"]
        (line,) = found.authors("orders")
        stamp = {each.stream: each for each in found.applied}["X_Y"]
        assert (stamp.service, stamp.host, stamp.version) == ("billing", socket.gethostname(), aiqueue.__version__)
        assert line == (
            f"X_Y: applied from another declaration by billing on {stamp.host} (aiqueue {stamp.version}, {stamp.at}): "
            "where two services apply different ones, each undoes the other's"
        )
        assert all(each.same == (each.stream != "X_Y") for each in found.applied)
        (line,) = found.authors("billing")
        assert line == f"X_Y: last applied by {stamp.by}, from an earlier declaration"
        await apply(conn, other)
        (line,) = (await plan(conn, declared("max_bytes = '1MiB'"))).authors("orders")
        assert f"by {stamp.host} (aiqueue" in line  # the default name names no service

    async def test_of_lanes_are_those_of_their_stream(self, account: Account, conn: Connection) -> None:
        await apply(conn, declared())
        await make_lane(conn, declared(), "acme", "high")
        async with connected(account, name="billing") as billing:
            await apply(billing, declared(consumer="ack_wait = '9s'"))
        (line,) = (await plan(conn, declared())).authors("orders")
        assert line.startswith("X_Y: applied from another declaration by billing on ")

    async def test_tell_a_change_by_hand_from_another_declaration(self, conn: Connection) -> None:
        await apply(conn, declared())
        await conn.api("STREAM.UPDATE.X_Y", await config_of(conn, "X_Y") | {"max_age": 3600 * 10**9})
        (line,) = (await plan(conn, declared())).authors("orders")
        assert line.startswith("X_Y: applied as declared here by ")
        assert line.endswith("and changed since by another program")

    async def test_tell_a_new_family_of_ones_own_from_a_change_by_another_program(self, conn: Connection) -> None:
        await apply(conn, Topology.load())
        found = await plan(conn, declared())
        (line,) = found.authors("orders")
        assert line.endswith("; it lacks the subjects of families that are declared here, as new ones")
        assert line.startswith("AI_RESULTS, ")
        await conn.api("STREAM.UPDATE.AI_RESULTS", await config_of(conn, "AI_RESULTS") | {"max_age": 3600 * 10**9})
        lines = (await plan(conn, declared())).authors("orders")
        assert any(each.endswith("changed since by another program") for each in lines)

    async def test_are_no_drift_and_leave_the_metadata_of_others(self, conn: Connection) -> None:
        spec = declared().streams["X_Y"]
        await conn.api("STREAM.CREATE.X_Y", dict(spec.config) | {"metadata": {"team": "search"}})
        await apply(conn, declared())
        found = await plan(conn, declared())
        assert not found.drift
        assert "X_Y" not in {each.stream for each in found.applied}  # as declared: it was not touched
        await apply(conn, declared("max_bytes = '2MiB'"))
        metadata = (await config_of(conn, "X_Y"))["metadata"]
        assert metadata["team"] == "search"
        assert {key for key in metadata if key.startswith("aiqueue.")} == {
            "aiqueue.config", "aiqueue.host", "aiqueue.version", "aiqueue.at", "aiqueue.apply",
        }  # fmt: skip

    async def test_families_of_another_service_are_no_other_declaration(self, conn: Connection) -> None:
        await apply(conn, declared())
        found = await plan(conn, Topology.load())
        assert all(each.same for each in found.applied if each.stream != "X_Y")
