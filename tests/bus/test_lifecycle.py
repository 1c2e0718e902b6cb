"""What ends a subscription, and what does not: callbacks that raise anything, `unsubscribe`, `disconnect`, `run`."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

import aiqueue
from aiqueue.bus import BusSubscription, Msg
from aiqueue.errors import AccessDenied, BadInput, Unavailable

from ..connection.test_permissions import two, users
from ..support import Account, NatsProcess, eventually

FAST = aiqueue.Backoff(attempts=5, first="10ms", cap="10ms")
KINDS = ["jobs", "mail", "requests", "plain", "plain queue"]


def subject_of(kind: str, tenant: str) -> str:
    named = {"jobs": "ai.agent.tasks", "mail": "ai.agent.message", "requests": "ai.rag.results"}
    return f"{named.get(kind, 'plain')}.{tenant}"


async def subscribe(bus: aiqueue.NATSClient, kind: str, tenant: str, callback: Callable[[Msg], Any]) -> BusSubscription:
    queue = {"jobs": "q", "mail": "agent.reader", "plain queue": "q"}.get(kind, "")
    options: Any = {"retry": FAST} if kind in ("jobs", "mail") else {}
    return await bus.subscribe(subject_of(kind, tenant), queue=queue, callback=callback, **options)


async def send(bus: aiqueue.NATSClient, kind: str, tenant: str, number: int) -> None:
    """Send a message of this number; a request without waiting for its answer."""
    body = json.dumps({"n": number, "query_id": f"q-{number}"})
    headers = {"target_agent_id": "reader"} if kind == "mail" else None
    reply = "nobody" if kind == "requests" else ""
    await bus.publish(subject_of(kind, tenant), body, reply, headers)


@contextlib.asynccontextmanager
async def connected(account: Account | NatsProcess, **options: Any) -> AsyncIterator[aiqueue.NATSClient]:
    credentials: Any = {"user": account.user, "password": account.password}
    async with aiqueue.NATSClient(account.url, **(credentials | options)) as bus:
        yield bus


# -- callbacks that raise anything


async def cancel_own_task() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


def raises(error: BaseException) -> Callable[[], Awaitable[None]]:
    async def fail() -> None:
        raise error

    return fail


FAILURES: dict[str, Callable[[], Awaitable[None]]] = {
    "SystemExit": raises(SystemExit(3)),
    "KeyboardInterrupt": raises(KeyboardInterrupt()),
    "CancelledError": raises(asyncio.CancelledError()),
    "a group": raises(BaseExceptionGroup("both", [SystemExit(3), ValueError("no")])),
    "BaseException": raises(BaseException("odd")),
    "its own task is cancelled": cancel_own_task,
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("kind", KINDS)
async def test_a_subscription_goes_on_whatever_its_callback_raises(
    bus: aiqueue.NATSClient, tenant: str, kind: str, failure: str, caplog: pytest.LogCaptureFixture
) -> None:
    failed = 0
    heard: asyncio.Queue[int] = asyncio.Queue()

    async def hear(msg: Msg) -> str:
        nonlocal failed
        number = json.loads(msg.data)["n"]
        if number == 1 and not failed:
            failed += 1
            await FAILURES[failure]()
        heard.put_nowait(number)
        return "heard"

    subscription = await subscribe(bus, kind, tenant, hear)
    await send(bus, kind, tenant, 1)
    await eventually(lambda: failed)
    await send(bus, kind, tenant, 2)
    comes_again = kind in ("jobs", "mail")
    numbers = [await asyncio.wait_for(heard.get(), 20) for _ in range(2 if comes_again else 1)]
    assert sorted(numbers) == ([1, 2] if comes_again else [2])
    assert not subscription.closed
    await subscription.unsubscribe()
    if kind.startswith("plain"):
        said = [each.getMessage() for each in caplog.records if f"the callback of plain.{tenant}" in each.getMessage()]
        assert len(said) == 1, caplog.text


@pytest.mark.parametrize("kind", KINDS)
async def test_a_plain_function_that_exits_ends_nothing(bus: aiqueue.NATSClient, tenant: str, kind: str) -> None:
    heard: list[int] = []

    def hear(msg: Msg) -> str:
        number = json.loads(msg.data)["n"]
        heard.append(number)
        if heard == [1]:
            raise SystemExit(3)
        return "heard"

    await subscribe(bus, kind, tenant, hear)
    await send(bus, kind, tenant, 1)
    await eventually(lambda: heard)
    await send(bus, kind, tenant, 2)
    await eventually(lambda: 2 in heard)


async def test_a_requester_learns_that_the_callback_exited(bus: aiqueue.NATSClient, tenant: str) -> None:
    async def answer(msg: Msg) -> None:
        raise SystemExit(3)

    await bus.subscribe(f"ai.rag.results.{tenant}", callback=answer)
    with pytest.raises(aiqueue.AIQueueError, match="the callback raised SystemExit: 3"):
        await bus.request(f"ai.rag.results.{tenant}", b'{"text": "x"}', timeout=20)


async def test_a_callback_that_outlives_its_cancellation_gets_no_further_message(shared: Account, tenant: str) -> None:
    heard: list[bytes] = []
    started, end = asyncio.Event(), asyncio.Event()

    async def hear(msg: Msg) -> None:
        heard.append(msg.data)
        started.set()
        with contextlib.suppress(asyncio.CancelledError):
            await end.wait()

    async with connected(shared, drain_timeout="50ms") as bus:
        await bus.subscribe(f"plain.{tenant}", callback=hear)
        for each in ("1", "2", "3"):
            await bus.publish(f"plain.{tenant}", each)
        await started.wait()
    assert heard == [b"1"]


# -- disconnect


@pytest.mark.parametrize("kind", ["jobs", "mail", "plain"])
@pytest.mark.parametrize("how", ["unsubscribed", "unsubscribed inside", "twice", "cancelled"])
async def test_disconnecting_waits_for_callbacks_of_subscriptions_that_are_ending(
    shared: Account, tenant: str, kind: str, how: str
) -> None:
    started, go, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
    made: list[BusSubscription] = []
    runs = 0

    async def hear(msg: Msg) -> None:
        nonlocal runs
        runs += 1
        if how == "unsubscribed inside":
            await made[0].unsubscribe()
        started.set()
        await go.wait()
        ended.set()

    async with connected(shared) as bus:
        made.append(await subscribe(bus, kind, tenant, hear))
        await send(bus, kind, tenant, 1)
        await asyncio.wait_for(started.wait(), 20)
        if how == "unsubscribed":
            ending = asyncio.create_task(made[0].unsubscribe())
            await eventually(lambda: made[0].closed)
            ending.cancel()
        first = asyncio.create_task(bus.disconnect())
        await asyncio.sleep(0)
        if how == "cancelled":
            first.cancel()
        second = asyncio.create_task(bus.disconnect())
        await asyncio.wait([first, second], timeout=0.05)
        assert not second.done()
        go.set()
        await second
        assert ended.is_set()
    if kind != "plain":
        async with connected(shared) as bus:  # its ack was sent before the connection was closed
            stream = "AI_AGENT_TASKS" if kind == "jobs" else "AI_AGENT_MESSAGE"
            subject = f"{subject_of(kind, tenant)}.{'normal' if kind == 'jobs' else 'reader'}"
            assert await bus.client.connection.last(stream, subject) is None
    assert runs == 1


@pytest.mark.parametrize("kind", ["jobs", "mail", "plain"])
async def test_a_callback_may_disconnect_its_client_which_then_waits_for_it(
    shared: Account, tenant: str, kind: str
) -> None:
    ended = asyncio.Event()
    refused: list[str] = []
    async with connected(shared) as bus:

        async def hear(msg: Msg) -> None:
            await bus.disconnect()
            for call in (lambda: bus.subscribe("a", callback=hear), bus.connect):
                with pytest.raises(BadInput) as raised:
                    await call()
                refused.append(str(raised.value))
            await bus.publish(f"other.{tenant}", b"")  # the connection is still there
            ended.set()

        await subscribe(bus, kind, tenant, hear)
        await send(bus, kind, tenant, 1)
        await asyncio.wait_for(ended.wait(), 20)
        await bus.disconnect()
        assert refused == [
            "the client is disconnecting: subscribe before `disconnect`, or after the next `connect`",
            "the client is disconnecting, and waits for this callback: connect when it has returned",
        ]
        with pytest.raises(BadInput, match="not connected"):
            await bus.publish("a", b"")


async def test_a_client_connects_again_after_and_while_it_disconnects(shared: Account, tenant: str) -> None:
    heard: list[bytes] = []
    bus = aiqueue.NATSClient(shared.url, user=shared.user, password=shared.password)
    await asyncio.gather(bus.connect(), bus.connect())
    first = bus.client.connection
    for each in ("1", "2"):
        await bus.subscribe(f"plain.{tenant}", callback=lambda msg: heard.append(msg.data))
        await bus.publish(f"plain.{tenant}", each)
        await asyncio.gather(bus.disconnect(), bus.connect())
        assert bus.client.connection is not first
        first = bus.client.connection
    assert heard == [b"1", b"2"]
    await bus.disconnect()
    assert not bus.connected


async def test_a_subscription_that_is_starting_when_its_client_disconnects_is_ended(
    shared: Account, tenant: str
) -> None:
    for kind in KINDS:
        async with connected(shared) as bus:
            starting = asyncio.create_task(subscribe(bus, kind, tenant, lambda msg: None))
            await asyncio.sleep(0)
            await bus.disconnect()
            with pytest.raises(Unavailable, match="the client was disconnected while it subscribed to"):
                await starting
            assert not bus._subscriptions


@pytest.mark.parametrize("how", ["raises", "is cancelled"])
async def test_a_block_that_is_left_by_an_error_drains_and_raises_it(shared: Account, tenant: str, how: str) -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    async def hear(msg: Msg) -> None:
        started.set()
        await asyncio.sleep(0.05)
        ended.set()

    async def use() -> None:
        async with connected(shared) as bus:
            await bus.subscribe(f"plain.{tenant}", callback=hear)
            await bus.publish(f"plain.{tenant}", b"")
            await started.wait()
            if how == "raises":
                raise ValueError("the body")
            await asyncio.Event().wait()

    using = asyncio.create_task(use())
    await started.wait()
    if how == "is cancelled":
        using.cancel()
    with pytest.raises(ValueError if how == "raises" else asyncio.CancelledError):
        await using
    assert ended.is_set()


async def test_a_client_that_was_given_stays_open(shared: Account, tenant: str) -> None:
    async with aiqueue.connect(shared.url, user=shared.user, password=shared.password) as client:
        async with aiqueue.NATSClient(client=client) as bus:
            subscription = await bus.subscribe(f"plain.{tenant}", callback=lambda msg: None)
        assert subscription.closed
        assert client.connection.connected


@pytest.mark.parametrize("reply", ["a b", "a\r\nPUB b 0\r\n", "a.*", ">", "a..b", 5, "a" * 2_000])
async def test_a_reply_that_is_no_subject_is_refused_and_the_connection_stays(
    bus: aiqueue.NATSClient, tenant: str, reply: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(BadInput, match=r"^reply .*(must|wildcard)"):
        await bus.publish(f"plain.{tenant}", b"", reply)
    await bus.client.connection.flush()
    assert "lost the connection" not in caplog.text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"url": "nats://a"}, "pass the server's address as nats_url="),
        ({"nats_url": ""}, r'nats_url must be an address such as "nats://host:4222", .*, not \'\': leave it out'),
        ({"nats_url": ["nats://a:4222"]}, "several joined by commas, not list: leave it out"),
    ],
)
def test_a_wrong_address_says_what_to_pass(options: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        aiqueue.NATSClient(**options)


async def test_a_timeout_that_is_none_is_refused_on_every_subject(bus: aiqueue.NATSClient) -> None:
    with pytest.raises(BadInput, match="timeout: 'soon' is not a duration"):
        await bus.subscribe("plain", callback=lambda msg: None, timeout="soon")


# -- run


async def test_run_ends_when_until_is_done_or_somebody_disconnects(shared: Account, tenant: str) -> None:
    for how in ("until", "disconnect", "until raises"):
        bus = await aiqueue.NATSClient(shared.url, user=shared.user, password=shared.password).connect()
        subscription = await bus.subscribe(f"plain.{tenant}", callback=lambda msg: None)
        stop: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        running = asyncio.create_task(bus.run(until=stop))
        await asyncio.sleep(0)
        if how == "until":
            stop.set_result(None)
        elif how == "until raises":
            stop.set_exception(ValueError("the watch failed"))
        else:
            await bus.disconnect()
        if how == "until raises":
            with pytest.raises(ValueError, match="the watch failed"):
                await running
        else:
            await asyncio.wait_for(running, 20)
        assert subscription.closed
        assert not bus.connected


async def test_run_says_what_until_must_be(bus: aiqueue.NATSClient) -> None:
    with pytest.raises(BadInput, match=r"until must be awaitable, such as `stop\.wait\(\)` of an asyncio\.Event, not"):
        await bus.run(until=asyncio.Event())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["jobs", "plain", "plain queue"])
async def test_run_raises_what_has_ended_a_subscription(own_server: Callable[..., NatsProcess], kind: str) -> None:
    server = own_server(users())
    async with two(server) as (every, less):
        bus = await aiqueue.NATSClient(client=less).connect()
        subscription = await subscribe(bus, kind, "acme", lambda msg: None)
        running = asyncio.create_task(bus.run(until=asyncio.Event().wait()))
        verb, denied = ("publish", "$JS.API.CONSUMER.MSG.NEXT.>") if kind == "jobs" else ("subscribe", "plain.acme")
        server.extra = users(**{verb: [denied]})
        server.reload()
        async with asyncio.timeout(30):
            while not running.done():
                await every.connection.publish(subject_of(kind, "acme"), b"{}")
                await asyncio.sleep(0.02)
        with pytest.raises(AccessDenied, match=f"may not {verb} to"):
            await running
        assert subscription.closed
        assert isinstance(subscription.error, AccessDenied)
        assert not bus.connected
