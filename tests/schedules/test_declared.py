"""Schedules declared in code: what is stored when workers start, of which versions, and what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

import aiqueue
from aiqueue import Calendar, Cron, Every, Once
from aiqueue.errors import BadInput, InvalidToken, NotFound, UnknownFamily
from aiqueue.schedules import Declared, DeclaredSets, Declarer, declarations, declarer

from ..connection.test_permissions import two, users
from ..support import Account, create_streams, eventually
from .chain import Task, make_late, schedules_of, spec

pytestmark = pytest.mark.families("agent.tasks")

if TYPE_CHECKING:
    from aiqueue.schedules import Tick

PACE_S = 0.2  # between looks, in tests of several versions


class Empty(aiqueue.Message, kind="empty"):
    pass


class Needy(aiqueue.Message, kind="needy"):
    text: str


class Elsewhere(aiqueue.Message, kind="elsewhere", family="no.such"):
    pass


def make_worker(owner: str | None = "billing", **options: Any) -> aiqueue.Worker:
    worker = aiqueue.Worker(owner=owner, **options)

    @worker.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> int:
        return job.message.n

    return worker


def every(interval: str, *ids: str, owner: str = "billing", generation: int = 0) -> aiqueue.Worker:
    """A worker of a version that declares schedules with this interval."""
    worker = make_worker(owner, generation=generation)
    for each in ids or ("report",):
        worker.schedule(interval, Task(), tenant="acme", id=each)
    return worker


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers look often, and soon count as away."""
    monkeypatch.setattr(declarer, "EVERY_S", PACE_S)
    monkeypatch.setattr(declarer, "REFRESH_S", PACE_S * 2 / 3)
    monkeypatch.setattr(declarations, "ALIVE_S", 1.5)


async def interval_of(client: aiqueue.Client, schedule_id: str = "report") -> str:
    found = [each for each in await schedules_of(client).list(tenant="acme") if each.id == schedule_id]
    assert found
    return found[0].recurrence.describe()


# -- forms


async def test_a_started_worker_has_stored_what_its_code_declares(client: aiqueue.Client) -> None:
    worker = make_worker()
    worker.schedule(
        "0 6 * * mon-fri", Task(n=7), tenant="acme", id="report", tz="Europe/Berlin", jitter="30s", end=4e9,
        priority="high", deadline="1h", misfire="all", bound=5, grace="1m", headers={"trace": "7"},
    )  # fmt: skip
    async with worker.running(client):
        document = await schedules_of(client).get("acme", "report")
    assert document.recurrence == Cron("0 6 * * mon-fri", tz="Europe/Berlin", jitter="30s", end=4e9)
    assert (document.owner, document.generation, document.kind) == ("billing", 0, "task")
    assert aiqueue.codec.decode(document.body or b"") == {"n": 7}
    assert (document.priority, document.deadline_s, document.headers) == ("high", 3600.0, {"trace": "7"})
    assert (document.misfire, document.bound, document.grace_s, document.overlap) == ("all", 5, 60.0, "run")


async def test_above_a_handler_its_message_has_no_values_and_the_id_is_the_functions_name(
    client: aiqueue.Client,
) -> None:
    worker, ran = aiqueue.Worker(owner="billing"), asyncio.Event()
    tick = round(time.time() + 0.5, 3)

    @worker.schedule(Once(tick), tenant="acme")
    @worker.handle(Empty)
    async def clean_up(job: aiqueue.Job[Empty]) -> None:
        assert (job.schedule, job.scheduled_for, job.tenant) == ("clean_up", tick, "acme")
        ran.set()

    async with worker.running(client):
        await asyncio.wait_for(ran.wait(), 20)


async def test_a_function_of_the_tick_makes_the_message_whatever_its_other_annotations_name(
    client: aiqueue.Client,
) -> None:
    worker, ran = aiqueue.Worker(owner="billing"), asyncio.Queue[int]()
    tick = round(time.time() + 0.5, 3)

    @worker.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> None:
        ran.put_nowait(job.message.n)

    @worker.schedule(Once(tick), tenant="acme")
    async def daily(tick: Tick) -> Task:
        return Task(n=int(tick.at))

    @worker.schedule(Once(tick), tenant="other", id="daily", makes=Task)
    def unannotated(tick):  # type: ignore[no-untyped-def]
        return Task(n=int(tick.at) + 1)

    async with worker.running(client):
        found = {await asyncio.wait_for(ran.get(), 20) for _ in range(2)}
    assert found == {int(tick), int(tick) + 1}


@pytest.mark.parametrize(
    ("when", "options", "expected"),
    [
        ("@daily", {}, Cron("@daily")),
        ("0 0 * * *", {"tz": "Asia/Kathmandu"}, Cron("0 0 * * *", tz="Asia/Kathmandu")),
        ("90s", {"start": 5.0}, Every(90, start=5.0)),
        (90, {}, Every(90)),
        (timedelta(minutes=5), {"jitter": 3}, Every("5m", jitter="3s")),
        (Calendar(months=1), {}, Calendar(months=1)),
    ],
)
def test_when_is_a_line_an_interval_or_a_recurrence(when: Any, options: Any, expected: Any) -> None:
    worker = make_worker()
    worker.schedule(when, Task(), tenant="acme", id="x", **options)
    (declared,) = worker._schedules._specs.values()
    assert (declared.recurrence.describe(), declared.recurrence) == (expected.describe(), expected)


def test_a_schedule_of_a_message_may_stand_above_its_handler_which_stays_as_it_is() -> None:
    worker = aiqueue.Worker(owner="billing")

    async def needy(job: aiqueue.Job[Needy]) -> None: ...

    stacked = worker.schedule("90s", Needy(text="x"), tenant="acme", id="x")(worker.handle(Needy)(needy))
    assert stacked is needy
    assert list(worker._schedules._specs) == [("acme", "x")]


# -- refused


def test_a_schedule_of_a_message_above_a_function_that_is_no_handler_is_refused() -> None:
    with pytest.raises(BadInput, match=r"^a schedule of a message stands alone, or above the @worker\.handle of its"):

        @make_worker().schedule("90s", Task(), tenant="acme", id="x")
        def task_of_the_day(tick: Tick) -> Task:
            return Task()


def annotated_otherwise(tick: Tick) -> int:
    return 1


REFUSED: list[tuple[Callable[[aiqueue.Worker], Any], str]] = [
    (lambda w: w.schedule("61 * * * *", Task(), tenant="acme", id="x"), "minute"),
    (lambda w: w.schedule("30 6 30 2 *", Task(), tenant="acme", id="x"), "never"),
    (lambda w: w.schedule("daily", Task(), tenant="acme", id="x"), "a cron line such as"),
    (lambda w: w.schedule(None, Task(), tenant="acme", id="x"), "a cron line such as"),
    (lambda w: w.schedule("-5s", Task(), tenant="acme", id="x"), "a cron line such as"),
    (lambda w: w.schedule(0.1, Task(), tenant="acme", id="x"), "at least 1 second"),
    (lambda w: w.schedule("5s", Task(), tenant="acme", id="x", tz="UTC"), "an interval has no time zone"),
    (lambda w: w.schedule(Once(5), Task(), tenant="acme", id="x", tz="UTC", end=5), "give tz and end to the Once"),
    (lambda w: w.schedule("@daily", Task(), tenant="acme", id="x", tz="Mars/Base"), "Mars/Base"),
    (lambda w: w.schedule("@daily", Task(), tenant="acme", id="x", start=9, end=5), "must not be before start"),
    (lambda w: w.schedule("@daily", Task(), tenant="a.b", id="x"), "tenant 'a.b'"),
    (lambda w: w.schedule("@daily", Task(), tenant="acme", id="x y"), "schedule 'x y'"),
    (lambda w: w.schedule("@daily", Task(), tenant="acme"), 'a schedule of a Task needs an id, such as id="daily-'),
    (lambda w: w.schedule("@daily", Task, tenant="acme", id="x"), "pass an instance"),
    (lambda w: w.schedule("@daily", Task(), tenant="acme", id="x", cron="y"), "schedule has no option cron: it has id"),
    (lambda w: w.schedule("@daily", Task(), tenant="acme", id="x", makes=Task), "leave it out beside a message"),
    (lambda w: w.schedule("@daily", Task(), tenant="acme", id="x", grace="-1s"), "grace"),
    (lambda w: w.schedule("@daily", Task(), tenant="acme", id="x", headers="y"), "headers must be a mapping"),
    (lambda w: w.schedule("@daily", tenant="acme")(Task), "a handler or a function of the tick"),
    (lambda w: w.schedule("@daily", tenant="acme")(annotated_otherwise), "put @worker.schedule above @worker.handle"),
    (lambda w: w.schedule("@daily", tenant="acme", id="x", makes=Task)(lambda: None), "must take one argument"),
    (lambda w: w.schedule("@daily", tenant="acme")(w.handle(Needy)(lambda job: None)), "Needy has fields without def"),
    (lambda w: w.schedule("@daily", tenant="acme")(w.handle_any("rag.ingest")(lambda job: None)), "schedule a message"),
    (lambda w: [w.schedule("@daily", Task(), tenant="acme", id="x") for _ in range(2)], "a schedule x of acme already"),
]


@pytest.mark.parametrize(("declare", "expected"), REFUSED)
def test_a_wrong_declaration_is_refused_in_one_line(declare: Callable[[aiqueue.Worker], Any], expected: str) -> None:
    with pytest.raises(BadInput) as caught:
        declare(make_worker())
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_schedules_need_an_owner() -> None:
    with pytest.raises(BadInput, match=r'need an owner, the name of this service: Worker\(owner="billing"\)'):
        make_worker(None).schedule("@daily", Task(), tenant="acme", id="x")
    with pytest.raises(InvalidToken):
        aiqueue.Worker(owner="a.b")
    with pytest.raises(BadInput, match="a generation is of schedules, which need an owner"):
        aiqueue.Worker(generation=3)


@pytest.mark.parametrize(
    ("declare", "error", "expected"),
    [
        (lambda w: w.schedule("@daily", Elsewhere(), tenant="acme", id="x"), UnknownFamily, "no.such"),
        (lambda w: w.schedule("@daily", Task(), tenant="acme", id="x", priority="no"), BadInput, "priority 'no'"),
        (lambda w: w.schedule("@daily", Task(), tenant="acme", id="x", misfire="no"), BadInput, "misfire must be one"),
        (lambda w: w.schedule("@daily", Task(), tenant="acme", id="x", bound=0), BadInput, "bound must be"),
        (lambda w: w.schedule("@daily", Empty(), tenant="acme", id="x", overlap="skip"), BadInput, "result=False"),
    ],
)
async def test_what_the_topology_or_a_handler_rules_out_is_refused_when_the_worker_starts(
    client: aiqueue.Client, declare: Callable[[aiqueue.Worker], Any], error: type[Exception], expected: str
) -> None:
    worker = make_worker()
    worker.schedule("@daily", Task(), tenant="acme", id="right")
    declare(worker)

    @worker.handle(Empty, result=False)
    async def empty(job: aiqueue.Job[Empty]) -> None:
        pass

    with pytest.raises(error, match=expected):
        async with worker.running(client):
            pass
    assert await schedules_of(client).list() == [], "nothing may be half-done"


# -- a worker beside servers and schedules of others


async def test_of_another_owners_id_the_worker_says_so_once_and_runs_on(
    client: aiqueue.Client, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    await schedules_of(client).add(spec("report", Every("2h"), owner="shop"))
    async with every("1h", "report", "mine").running(client):
        assert await (await client.enqueue(Task(n=4), tenant="acme")).result(timeout=20) == 4
        await asyncio.sleep(PACE_S * 3)
    assert await interval_of(client) == Every("2h").describe()
    assert await interval_of(client, "mine") == Every("1h").describe()
    said = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert said == ["schedule report of acme is declared by 'shop': choose another id, or remove it first"]


async def test_a_server_without_the_streams_gets_jobs_done_and_the_worker_says_what_to_do(
    client: aiqueue.Client, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    await client.connection.api("STREAM.DELETE.KV_AI_SCHEDULES")
    async with every("1h").running(client):
        assert await (await client.enqueue(Task(n=4), tenant="acme")).result(timeout=20) == 4
        said = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
        assert len(said) == 1
        assert said[0].endswith(
            "declares are not stored: there is no stream KV_AI_SCHEDULES: run `aiqueue apply` first"
        )
        await create_streams(client)

        async def stored() -> None:
            assert await interval_of(client) == Every("1h").describe()

        await eventually(stored)


async def test_a_worker_that_may_not_store_schedules_says_so_and_runs_on(
    own_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server = own_server(users(["$KV.AI_SCHEDULES.>"]))
    server.start()
    async with two(server) as (_, less), every("1h").running(less):
        assert await (await less.enqueue(Task(n=4), tenant="acme")).result(timeout=20) == 4
    said = [each.getMessage() for each in caplog.records if "declares are not stored" in each.getMessage()]
    assert len(said) == 1
    assert "$KV.AI_SCHEDULES.owner.billing" in said[0]


async def test_a_schedule_whose_last_time_has_passed_does_not_keep_others_from_being_stored(
    client: aiqueue.Client, caplog: pytest.LogCaptureFixture
) -> None:
    worker = every("1h")
    worker.schedule(Once(5.0), Task(), tenant="acme", id="gone")
    async with worker.running(client):
        assert [each.id for each in await schedules_of(client).list()] == ["report"]
    assert "schedule gone never fires" in caplog.text


async def test_a_look_at_schedules_that_are_as_declared_takes_few_requests_however_many_there_are(
    client: aiqueue.Client, plain: Any
) -> None:
    specs = [spec(f"report-{n}", owner="billing") for n in range(300)]
    declaring = Declarer(client.connection, client.topology, Declared("billing", 0, specs))
    assert await declaring.reconcile() == (300, 0, 0)
    schedules, seen = schedules_of(client), list[str]()
    changed = replace(await schedules.get("acme", "report-7"), overlap="skip")
    await schedules.store.put(changed)
    await schedules.remove("acme", "report-8")

    async def note(message: Any) -> None:
        seen.append(message.subject)

    for each in ("$JS.API.>", "$KV.AI_SCHEDULES.>", "ai.ticks.>"):
        await plain.subscribe(each, cb=note)
    await plain.flush()
    assert await declaring.reconcile() == (1, 1, 0)
    await plain.flush()
    assert len(seen) < 20, seen
    assert (await schedules.get("acme", "report-7")).overlap == "run"


async def test_what_was_removed_by_hand_comes_back(client: aiqueue.Client, quick: None) -> None:
    async with every("1h").running(client):
        await schedules_of(client).remove("acme", "report")

        async def stored() -> None:
            assert await interval_of(client) == Every("1h").describe()

        await eventually(stored)


def test_a_worker_without_schedules_and_one_that_declares_some_import_no_trigger() -> None:
    code = textwrap.dedent("""
        import sys, aiqueue
        class T(aiqueue.Message, kind="t"): pass
        worker = aiqueue.Worker(owner="x")
        worker.schedule("0 6 * * mon", T(), tenant="a", id="b", tz="Europe/Berlin")
        print([m for m in sys.modules if m.startswith("apscheduler")])
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "[]"


async def test_a_worker_without_an_owner_asks_and_stores_nothing(client: aiqueue.Client) -> None:
    declaring = Declarer(client.connection, client.topology, Declared())
    await declaring.start()
    assert declaring._task is None
    info = await client.connection.api("STREAM.INFO.KV_AI_SCHEDULES")
    assert info["state"]["last_seq"] == 0


# -- versions


@contextlib.asynccontextmanager
async def fleet(account: Account, count: int = 5) -> AsyncIterator[Fleet]:
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(aiqueue.connect(account.url, user=account.user, password=account.password))
            for _ in range(count)
        ]
        found = Fleet(clients)
        stack.push_async_callback(found.stop)
        yield found


class Fleet:
    """Places for workers, each on a connection of its own."""

    def __init__(self, clients: list[aiqueue.Client]) -> None:
        self._clients = clients
        self._running: dict[int, contextlib.AsyncExitStack] = {}

    async def put(self, place: int, make: Callable[[], aiqueue.Worker]) -> None:
        """Start a worker in a place, after the one there has ended."""
        await self.end(place)
        self._running[place] = contextlib.AsyncExitStack()
        await self._running[place].enter_async_context(make().running(self._clients[place]))

    async def end(self, place: int) -> None:
        if place in self._running:
            await self._running.pop(place).aclose()

    async def stop(self) -> None:
        for place in list(self._running):
            await self.end(place)


def old() -> aiqueue.Worker:
    return every("1h")


def new() -> aiqueue.Worker:
    return every("2h")


async def holds(client: aiqueue.Client, interval: str, within: float) -> None:
    """For so long, the schedule is of this interval, and has one chain."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        await shows(client, interval)
        await asyncio.sleep(0.02)


async def shows(client: aiqueue.Client, interval: str) -> None:
    document = await schedules_of(client).get("acme", "report")
    assert document.recurrence == Every(interval)
    assert await schedules_of(client).ticks.list_subjects() == {f"ai.ticks.at.-.acme.report.{document.next_ms}"}


async def test_in_a_rolling_deploy_and_a_rollback_of_five_workers_the_newest_that_run_decide(
    client: aiqueue.Client, account: Account, quick: None
) -> None:
    async with fleet(account) as workers:
        for place in range(5):
            await workers.put(place, old)
        await shows(client, "1h")
        for place in range(5):
            await workers.put(place, new)
            await holds(client, "2h", PACE_S / 2)
            if place == 2:
                await workers.put(4, old)  # a restart amid the deploy
                await holds(client, "2h", PACE_S * 3)
        for place in range(4):
            await workers.put(place, old)
            await holds(client, "2h", PACE_S / 2)
        await workers.put(4, old)
        await eventually(lambda: shows(client, "1h"))
        await holds(client, "1h", PACE_S * 2)
        await workers.put(0, new)  # the second try of the same version
        await holds(client, "2h", PACE_S * 2)
    assert (await schedules_of(client).get("acme", "report")).version == 4


async def test_a_greater_generation_decides_at_once(client: aiqueue.Client, account: Account, quick: None) -> None:
    async with fleet(account, 3) as workers:
        await workers.put(0, lambda: every("2h", generation=2))
        await workers.put(1, lambda: every("1h", generation=1))
        await holds(client, "2h", PACE_S * 2)
        await workers.put(2, lambda: every("1h", generation=3))
        await holds(client, "1h", PACE_S * 2)


@pytest.mark.parametrize(("given", "expected"), [(None, 43), (7, 7), (0, 0)])
async def test_the_generation_comes_from_the_environment_unless_the_worker_has_one(
    client: aiqueue.Client, account: Account, monkeypatch: pytest.MonkeyPatch, given: int | None, expected: int
) -> None:
    monkeypatch.setenv("AIQUEUE_GENERATION", "43")
    options = {} if given is None else {"generation": given}
    worker = make_worker(**options)
    worker.schedule("1h", Task(), tenant="acme", id="report")
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as one, worker.running(one):
        assert (await schedules_of(client).get("acme", "report")).generation == expected
        assert [each.generation for each in await DeclaredSets(schedules_of(client).store).list("billing")] == [
            expected
        ]


async def test_two_services_do_not_disturb_each_other(client: aiqueue.Client, account: Account, quick: None) -> None:
    async with fleet(account, 2) as workers:
        await workers.put(0, lambda: every("1h", "a"))
        await workers.put(1, lambda: every("2h", "b", owner="shop"))
        await asyncio.sleep(PACE_S * 2)
        found = {each.id: (each.owner, each.version) for each in await schedules_of(client).list()}
    assert found == {"a": ("billing", 1), "b": ("shop", 1)}


async def test_a_tick_that_a_worker_of_another_version_holds_waits_for_one_that_makes_its_message(
    client: aiqueue.Client, account: Account
) -> None:
    """A deploy changes the kind of the messages that a function makes: no tick is lost to the old function."""

    def version(makes: type[aiqueue.Message]) -> aiqueue.Worker:
        worker = make_worker()

        @worker.schedule(Every("1h"), tenant="acme", makes=makes, grace="2h")
        def report(tick: Any) -> Any:
            return makes()

        return worker

    async with fleet(account, 2) as workers:
        await workers.put(0, lambda: version(Empty))
        await workers.put(1, lambda: version(Task))
        await workers.end(1)  # the old worker alone is there to take the tick
        document = await schedules_of(client).get("acme", "report")
        assert document.kind == "task"
        await make_late(client, document, 0)
        await asyncio.sleep(0.5)
        assert (await schedules_of(client).get("acme", "report")).failed == 0
        await workers.put(1, lambda: version(Task))

        async def fired() -> None:
            assert (await schedules_of(client).get("acme", "report")).fired == 1

        await eventually(fired)


async def test_declarations_are_stored_as_the_wire_contract_says_and_later_fields_are_passed_over(
    client: aiqueue.Client,
) -> None:
    before = time.time()
    async with every("1h", "b", "a", generation=3).running(client):
        pass
    stored = await client.connection.last("KV_AI_SCHEDULES", "$KV.AI_SCHEDULES.owner.billing.*")
    assert stored is not None
    assert stored.headers["Nats-TTL"] == "2592000s"
    fields = aiqueue.codec.decode_map(stored.data)
    assert (fields["v"], fields["generation"], fields["schedules"]) == (1, 3, [["acme", "a"], ["acme", "b"]])
    assert before - 0.2 < fields["first"] <= fields["seen"] < time.time() + 0.2
    later = aiqueue.codec.dump({**fields, "v": 2, "more": 5})
    store = schedules_of(client).store
    await store.write(stored.subject, stored.seq, later, {}, 5.0)
    (found,) = await DeclaredSets(store).list("billing")
    assert (found.generation, found.names) == (3, {("acme", "a"), ("acme", "b")})
    await store.write(store.key("owner", "billing", "x"), 0, b"damaged", {}, 5.0)
    assert await DeclaredSets(store).list("billing") == [found]


# -- pruning


async def test_prune_removes_what_no_running_worker_of_the_owner_declares(
    client: aiqueue.Client, account: Account, quick: None
) -> None:
    schedules = schedules_of(client)
    await schedules.add(spec("by-hand"))
    async with fleet(account, 3) as workers:
        await workers.put(0, lambda: every("1h", "kept", "gone"))
        await workers.put(1, lambda: every("1h", "others", owner="shop"))
        await workers.put(2, lambda: every("1h", "kept"))
        assert await schedules.find_undeclared("billing") == [], "an old worker still declares it"
        await workers.end(0)

        async def found() -> None:
            assert [each.id for each in await schedules.find_undeclared("billing")] == ["gone"]

        await eventually(found)
        assert len(await schedules.list()) == 4, "a preview removes nothing"
        assert [each.id for each in await schedules.prune("billing")] == ["gone"]
        assert await schedules.prune("billing") == []
    assert [each.id for each in await schedules.list()] == ["by-hand", "kept", "others"]


async def test_without_workers_the_newest_declaration_is_what_prune_keeps(client: aiqueue.Client, quick: None) -> None:
    schedules = schedules_of(client)
    async with every("1h", "kept", "gone").running(client):
        pass
    async with every("1h", "kept").running(client):
        pass

    async def found() -> None:
        undeclared = next(iter(await schedules.find_undeclared("billing")), None)
        assert undeclared is not None
        assert (undeclared.tenant, undeclared.id) == ("acme", "gone")
        assert undeclared.declared_at is not None
        assert undeclared.ended_at is not None, "no worker of the owner runs"
        assert undeclared.declared_at < undeclared.ended_at

    await eventually(found)


async def test_a_schedule_of_a_worker_that_starts_amid_a_prune_stays(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedules = schedules_of(client)
    async with make_worker().running(client):
        pass
    async with contextlib.AsyncExitStack() as stack:
        read = schedules.list

        async def start_and_read(**options: Any) -> Any:
            await stack.enter_async_context(every("1h").running(client))
            return await read(**options)

        monkeypatch.setattr(schedules, "list", start_and_read)
        assert await schedules.prune("billing") == []


async def test_a_worker_with_an_owner_that_declares_none_has_all_pruned(client: aiqueue.Client, quick: None) -> None:
    schedules = schedules_of(client)
    async with every("1h").running(client):
        pass
    async with make_worker().running(client):

        async def pruned() -> None:
            assert [each.id for each in await schedules.prune("billing")] == ["report"]

        await eventually(pruned)


async def test_of_an_owner_without_known_workers_nothing_is_pruned(client: aiqueue.Client) -> None:
    schedules = schedules_of(client)
    with pytest.raises(NotFound, match=r"'billing' .*, and it has no schedules: .*\(owners with schedules: none\)"):
        await schedules.prune("billing")
    await schedules.add(spec("a", owner="billing"))
    with pytest.raises(NotFound, match=r"'billing' ran in the last 30 days.* --owner billing`"):
        await schedules.prune("billing")
    with pytest.raises(NotFound, match=r"'biling' .*owners with schedules: billing\)"):
        await schedules.prune("biling")
    assert len(await schedules.list()) == 1
