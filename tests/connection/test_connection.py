"""The connection: translated errors, frames, credentials, TLS, permissions, and reconnecting."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import logging
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nats.errors
import nats.js.errors
import nkeys
import pytest

from aiqueue.config import Settings
from aiqueue.connection import Connection, Received, frames, reply_inbox
from aiqueue.connection.dial import RECONNECT_CAP_S, RECONNECT_FIRST_S, reconnect_delay_s
from aiqueue.connection.faults import CLASSES, CODES, error_text, from_api, translate
from aiqueue.errors import (
    AccessDenied,
    AccountFull,
    AIQueueError,
    BadInput,
    Conflict,
    DiskFull,
    LaneFull,
    NotFound,
    ServerError,
    SettingsError,
    StreamFull,
    TooLarge,
    Unavailable,
)

from ..support import Account, Cluster, Eventually, NatsProcess, tls_config

OwnServer = Callable[..., NatsProcess]
LOG = "aiqueue.connection"


def settings(where: Account | NatsProcess, **more: Any) -> Settings:
    account = where.account if isinstance(where, NatsProcess) else where
    return Settings.load(**{"url": account.url, "user": account.user, "password": account.password} | more)


@contextlib.asynccontextmanager
async def opened(where: Settings) -> AsyncIterator[Connection]:
    connection = Connection(where)
    await connection.open()
    try:
        yield connection
    finally:
        await connection.close()


def connected(where: Account | NatsProcess, **more: Any) -> contextlib.AbstractAsyncContextManager[Connection]:
    return opened(settings(where, **more))


@pytest.fixture
async def conn(account: Account) -> AsyncIterator[Connection]:
    async with connected(account) as connection:
        yield connection


async def make_stream(connection: Connection, name: str = "S", **config: Any) -> None:
    declared = {"name": name, "subjects": ["s.>"], "storage": "memory", "allow_direct": True} | config
    await connection.api(f"STREAM.CREATE.{name}", declared)


async def count(connection: Connection, name: str = "S") -> int:
    found: int = (await connection.api(f"STREAM.INFO.{name}"))["state"]["messages"]
    return found


async def store(connection: Connection, subject: str, body: bytes = b"x", *, key: str = "", **more: Any) -> Any:
    return await connection.store(subject, body, {"Nats-Msg-Id": key or subject}, **more)


# the error table


def test_every_error_class_of_nats_py_is_in_the_table() -> None:
    theirs = {
        each
        for module in (nats.errors, nats.js.errors)
        for _, each in inspect.getmembers(module, inspect.isclass)
        if issubclass(each, nats.errors.Error)
    }
    assert theirs - set(CLASSES) == set()
    assert set(CLASSES) - theirs == set()


def instance(kind: type[Exception]) -> Exception:
    if kind is nats.js.errors.ConsumerSequenceMismatchError:  # its text needs its numbers
        return kind(stream_resume_sequence=1, consumer_sequence=2, last_consumer_sequence=3)  # type: ignore[call-arg]
    for arguments in ((), ("x",), (1, 2), ("x", 1, 2), (None,) * 4):
        with contextlib.suppress(TypeError):
            return kind(*arguments)
    error = kind.__new__(kind)
    if isinstance(error, nats.js.errors.APIError):
        error.code, error.err_code, error.description = 500, 10999, "odd"
    return error


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_every_entry_of_the_table_translates_into_one_line(kind: type[Exception]) -> None:
    ours = translate(instance(kind), "publishing")
    assert isinstance(ours, AIQueueError)
    assert str(ours)
    assert len(str(ours).splitlines()) == 1


@pytest.mark.parametrize(("err_code", "kind"), CODES.items())
def test_every_known_code_of_jetstream_becomes_its_class(err_code: int, kind: type[AIQueueError]) -> None:
    ours = from_api(400, err_code, "because of a maximum", "s.x")
    assert isinstance(ours, BadInput if kind is TooLarge else kind)
    assert "because" in str(ours)


def test_an_unknown_code_becomes_a_server_error_with_both_codes() -> None:
    ours = from_api(418, 19999, "teapot", "s.x")
    assert isinstance(ours, ServerError)
    assert (ours.code, ours.err_code) == (418, 19999)
    assert "teapot" in str(ours)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (nats.errors.Error("nats: 'Authorization Violation'"), AccessDenied),
        (nats.errors.Error("nats: 'User Authentication Expired'"), AccessDenied),
        (nats.errors.Error('nats: permissions violation for publish to "x"'), AccessDenied),
        (nats.errors.Error("nats: 'maximum connections exceeded'"), Unavailable),
        (ConnectionRefusedError(111, "refused"), Unavailable), (socket.gaierror(-2, "unknown name"), Unavailable),
        (ssl.SSLCertVerificationError("unknown CA"), AccessDenied), (TimeoutError(), Unavailable),
        (ValueError("odd"), ServerError), (NotFound("as it is"), NotFound),
        (nats.js.errors.APIError(code=503, err_code=10077, description="maximum messages exceeded"), StreamFull),
        (nats.js.errors.APIError(code=503, err_code=10077, description="maximum bytes exceeded"), StreamFull),
        (nats.js.errors.APIError(code=503, err_code=10077, description="no space left on device"), DiskFull),
        (nats.js.errors.APIError(code=503, err_code=10077, description="store is closed"), Unavailable),
        (nats.js.errors.APIError(code=503, err_code=10023, description="insufficient resources"), DiskFull),
        (nats.js.errors.APIError(code=400, err_code=10002, description="resource limits exceeded"), AccountFull),
    ],
)  # fmt: skip
def test_errors_that_are_told_by_their_text_or_by_python_find_their_class(error: Exception, kind: type) -> None:
    assert type(translate(error, "x")) is kind


def test_a_text_is_never_empty_and_one_line() -> None:
    assert error_text(TimeoutError()) == "TimeoutError"
    assert error_text(nats.errors.Error("nats: a\n b")) == "a b"


# storing and reading


async def test_a_stored_message_is_read_back_by_sequence_by_subject_and_in_order(conn: Connection) -> None:
    await make_stream(conn)
    acks = [await store(conn, f"s.{n % 2}", str(n).encode(), key=str(n)) for n in range(6)]
    assert [each.seq for each in acks] == [1, 2, 3, 4, 5, 6]
    found = await conn.get("S", 3)
    assert found is not None
    assert (found.subject, found.data, found.headers) == ("s.0", b"2", {"Nats-Msg-Id": "2"})
    assert abs(found.time - time.time()) < 30
    newest = await conn.last("S", "s.1")
    assert newest is not None
    assert (newest.seq, newest.data) == (6, b"5")
    assert [each.seq async for each in conn.read("S", "s.0")] == [1, 3, 5]
    assert [each.data async for each in conn.read("S", "s.>", seq=4)] == [b"3", b"4", b"5"]


async def test_what_is_not_there_is_none_and_a_missing_stream_is_not_found(conn: Connection) -> None:
    await make_stream(conn)
    assert await conn.get("S", 99) is None
    assert await conn.last("S", "s.none") is None
    assert [each async for each in conn.read("S", "s.none")] == []
    for ask in (conn.get("NONE", 1), conn.last("NONE", "x"), conn.api("STREAM.INFO.NONE")):
        with pytest.raises(NotFound):
            await ask
    with pytest.raises(NotFound, match="aiqueue apply"):
        _ = [each async for each in conn.read("NONE", "x")]


async def test_a_read_goes_on_over_many_pages(conn: Connection) -> None:
    await make_stream(conn)
    await asyncio.gather(*(store(conn, "s.x", bytes(20_000), key=str(n)) for n in range(700)))
    found = [each.seq async for each in conn.read("S", "s.x")]
    assert found == list(range(1, 701))


async def test_the_same_message_id_is_stored_once_and_the_second_told_so(conn: Connection) -> None:
    await make_stream(conn)
    assert not (await store(conn, "s.x", key="k")).duplicate
    again = await store(conn, "s.x", key="k")
    assert (again.seq, again.duplicate) == (1, True)
    assert await count(conn) == 1


async def test_a_write_that_expects_another_last_sequence_is_a_conflict(conn: Connection) -> None:
    await make_stream(conn)
    await store(conn, "s.x")
    with pytest.raises(Conflict):
        await conn.store("s.x", b"", {"Nats-Msg-Id": "2", "Nats-Expected-Last-Subject-Sequence": "0"})


async def test_a_full_stream_is_queue_full_with_the_servers_reason(conn: Connection) -> None:
    await make_stream(conn, max_msgs_per_subject=1, discard="new", discard_new_per_subject=True)
    await store(conn, "s.x", key="1")
    with pytest.raises(LaneFull) as caught:
        await store(conn, "s.x", key="2")
    assert "per subject" in caught.value.reason


async def test_a_subject_that_no_stream_takes_is_not_found_at_once(conn: Connection) -> None:
    started = time.monotonic()
    with pytest.raises(NotFound, match="no stream matches subject nobody"):
        await store(conn, "nobody")
    assert time.monotonic() - started < 20


FOREIGN_REPLIES = [
    b"hello", b"", b"null", b"[]", b"5", b"{}", b'{"error": "no"}', b'{"error": {"code": 404, "message": "no"}}',
    b'{"stream": 5, "seq": 1}', b'{"stream": "S"}', b'{"stream": "S", "seq": "1"}', b'"stream"', b"\xff",
]  # fmt: skip


@contextlib.asynccontextmanager
async def responder(account: Account, subject: str, reply: bytes | None) -> AsyncIterator[list[str]]:
    """Another program's subscriber of `subject`. It replies to each message that asks for that, before the stream does,
    or to none. The server closes the connection of a client that publishes to no subject.
    """
    seen: list[str] = []

    def answer(message: Received) -> None:
        seen.append(message.subject)
        if reply is not None and message.reply:
            other.tell(message.reply, reply)

    async with connected(account) as other:
        await other.subscribe(subject, answer)
        await other.flush()
        yield seen
        await other.flush()


async def test_a_message_for_an_ended_subscription_is_dropped_where_it_is_read(conn: Connection) -> None:
    """Nothing of it is left to be awaited, which a connection that is lost meanwhile would not do."""
    subscription = await conn.subscribe("heard", lambda _: None)
    attached = subscription._attached
    assert attached is not None
    client, ended = attached
    await subscription.close()
    assert client._ps.feed(b"MSG heard %d 1\r\nx\r\n" % ended._id) == b""


async def test_a_cancellation_during_a_flush_is_not_swallowed(conn: Connection) -> None:
    """nats-py swallows one that comes while its flusher writes."""
    for _ in range(20):
        task = asyncio.create_task(conn.flush())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await conn.flush()


async def test_a_flush_that_is_cancelled_while_it_waits_does_not_lose_the_connection(
    conn: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """nats-py's socket reader fails on the answer to it."""
    for steps in range(12):
        task = asyncio.create_task(conn.flush())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    await conn.flush()
    assert conn.connected
    assert "encountered error" not in caplog.text
    assert "lost the connection" not in caplog.text


async def test_a_connection_that_is_cancelled_at_any_step_of_its_opening_or_closing_leaves_nothing(
    account: Account, eventually: Eventually
) -> None:
    """Twice, as the end of an event loop does it. A socket that is left open fails the test by its warning."""

    async def run() -> None:
        connection = Connection(settings(account))
        try:
            await connection.open()
        finally:
            await connection.close()

    before = asyncio.all_tasks()
    for step in range(80):
        task = asyncio.create_task(run())
        for _ in range(step):
            await asyncio.sleep(0)
        task.cancel()
        for _ in range(step % 7):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    await eventually(lambda: not asyncio.all_tasks() - before)
    gc.collect()


@pytest.mark.parametrize("reply", FOREIGN_REPLIES)
async def test_a_subscriber_that_replies_to_a_publish_is_not_the_stream(
    account: Account, conn: Connection, eventually: Eventually, reply: bytes
) -> None:
    await make_stream(conn)
    async with responder(account, "s.>", reply) as seen:
        for number in range(1, 21):
            ack = await conn.store("s.x", b"x", {"Nats-Msg-Id": str(number)})
            assert (ack.stream, ack.seq, ack.duplicate) == ("S", number, False)
        await conn.flush()
        await eventually(lambda: len(seen) >= 20)
    assert len(seen) == 20  # none was sent twice


async def test_a_subscriber_that_replies_to_atomic_batches_is_not_the_stream(
    account: Account, conn: Connection, eventually: Eventually
) -> None:
    await make_stream(conn, allow_atomic=True)
    conn.window._get_batcher("S").pace.batches = True  # from the first message on
    async with responder(account, "s.>", b"hello") as seen:
        acks = await asyncio.gather(
            *(conn.store_block("s.x", frames.block({"Nats-Msg-Id": str(n)}), b"x", stream="S") for n in range(200))
        )
        assert sorted(ack.seq for ack in acks) == list(range(1, 201))
        assert not any(ack.duplicate for ack in acks)
        await conn.flush()
        await eventually(lambda: len(seen) >= 200)
    assert len(seen) == 200


@pytest.mark.parametrize("reply", [None, b"hello", b'{"error": {"code": 404, "message": "no"}}'])
async def test_without_a_stream_a_subscriber_of_the_subject_does_not_hide_that(
    account: Account, conn: Connection, reply: bytes | None
) -> None:
    async with responder(account, "s.>", reply):
        started = time.monotonic()
        with pytest.raises(NotFound, match=r"no stream matches subject s\.x: run `aiqueue apply`"):
            await store(conn, "s.x", timeout_s=20)
        assert time.monotonic() - started < 15


async def test_a_user_who_may_not_ask_for_streams_learns_that_only_others_replied(own_server: OwnServer) -> None:
    server = own_server(LIMITED)
    async with (
        responder(Account(server.url, "admin", "p"), "s.>", b"hello"),
        connected(server, user="tenant", password="p", inbox_prefix="_mine.x") as tenant,
    ):
        with pytest.raises(Unavailable, match="only replies of other subscribers") as caught:
            await store(tenant, "s.acme", timeout_s=1.5)
        assert caught.value.maybe_stored


async def test_an_account_without_jetstream_is_named_at_once(own_server: OwnServer) -> None:
    server = own_server("accounts { A: { users: [{ user: plain, password: p }] } }\nauthorization {}")
    async with connected(server, user="plain", password="p") as connection:
        started = time.monotonic()
        with pytest.raises(Unavailable, match="JetStream not enabled for account: enable JetStream") as caught:
            await store(connection, "s.x", timeout_s=20)
        assert time.monotonic() - started < 15
        assert not caught.value.maybe_stored


async def test_an_api_call_that_nobody_answers_in_time_is_unavailable(own_server: OwnServer) -> None:
    server = own_server()
    async with connected(server) as connection:
        server.pause()
        started = time.monotonic()
        with pytest.raises(Unavailable):
            await connection.api("STREAM.NAMES", timeout=0.5)
        assert 0.4 < time.monotonic() - started < 4.5  # its own time, not that of a call without one
        server.resume()
        assert (await connection.api("STREAM.NAMES"))["total"] == 0


async def test_without_jetstream_an_api_call_says_so(own_server: OwnServer) -> None:
    server = own_server("accounts { A: { users: [{ user: plain, password: p }] } }\nauthorization {}")
    with contextlib.suppress(Exception):
        async with connected(server, user="plain", password="p") as connection:
            with pytest.raises(Unavailable, match=r"(?i)jetstream"):
                await connection.api("STREAM.NAMES")


async def test_a_request_that_nobody_takes_is_unavailable_at_once(conn: Connection) -> None:
    with pytest.raises(Unavailable, match="no responders"):
        await conn.request("nobody", b"", timeout_s=5)


async def test_thousands_of_reads_at_once_are_sent_once_each_however_long_all_of_them_take(
    account: Account, conn: Connection, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    monkeypatch.setattr(reply_inbox, "REPEAT_S", 0.1)
    await make_stream(conn)
    await conn.store("s.x", b"1", {"Nats-Msg-Id": "1"})
    sent: list[Received] = []
    async with connected(account) as observer:
        await observer.subscribe("$JS.API.STREAM.MSG.GET.S", sent.append)
        await observer.flush()
        found = await asyncio.gather(*(conn.get("S", 1) for _ in range(4_000)))
        await eventually(lambda: len(sent) >= 4_000)
        await observer.flush()
    assert {each.data for each in found if each is not None} == {b"1"}
    assert len(sent) <= 4_400


async def test_thousands_who_hear_of_a_regained_link_leave_in_any_order_without_a_search(conn: Connection) -> None:
    removals = [conn.on_regained(lambda: None) for _ in range(20_000)]
    started = time.process_time()
    for remove in reversed(removals):
        remove()
        remove()
    assert time.process_time() - started < 1


async def test_a_request_that_is_given_up_as_the_connection_is_lost_leaves_no_word_in_the_log(
    conn: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    asking = asyncio.create_task(conn.request("$JS.API.INFO"))
    while not conn._replies._requests:
        await asyncio.sleep(0)
    await asyncio.sleep(0)  # it waits for the reply
    conn._replies.fail_requests(Unavailable("the connection was lost"))
    asking.cancel()
    await asyncio.wait([asking])
    assert asking.cancelled()
    del asking
    gc.collect()
    assert [each.message for each in caplog.records if "never retrieved" in each.message] == []


# frames


@pytest.mark.parametrize("headers", [{}, {"a": ""}, {"Nats-Msg-Id": "k", "model": "x" * 200, "B": "two words"}])
async def test_a_frame_of_exactly_max_payload_passes_and_one_byte_more_is_refused_unsent(
    own_server: OwnServer, headers: dict[str, str]
) -> None:
    server = own_server("max_payload: 2000")
    headers = {"Nats-Msg-Id": "k"} | headers
    size = len("NATS/1.0\r\n") + 2 + sum(len(k) + len(v) + 4 for k, v in headers.items())
    async with connected(server) as connection:
        await make_stream(connection)
        with pytest.raises(TooLarge) as caught:
            await connection.store("s.x", bytes(2000 - size + 1), headers)
        assert (caught.value.size, caught.value.limit) == (2001, 2000)
        with pytest.raises(TooLarge):
            await connection.publish("s.x", bytes(2000 - size + 1), headers=headers)
        with pytest.raises(TooLarge):
            await connection.request("s.x", bytes(2001))
        assert await count(connection) == 0
        assert (await connection.store("s.x", bytes(2000 - size), headers)).seq == 1
        await connection.publish("s.y", bytes(2000))
        while await count(connection) < 2:  # a stream stores when it likes; pytest's timeout bounds this
            await connection.flush()
        assert connection.connected


@pytest.mark.parametrize(
    ("name", "value"),
    [("model", "é"), ("model", "a\nb"), ("model", "a\r\nInjected: yes"), ("model", "\x00"), ("model", 5),
     ("model", None), ("mod el", "x"), ("", "x"), ("modèle", "x"), ("a:b", "x"), ("a\n", "x"), (5, "x"),
     ("model", "\x7f"), ("m", "\u0660")],
)  # fmt: skip
async def test_headers_that_would_not_arrive_as_given_are_refused(conn: Connection, name: Any, value: Any) -> None:
    with pytest.raises(BadInput, match="header"):
        await conn.publish("s.x", b"", headers={name: value})


@pytest.mark.parametrize(
    "wrong", ["a b", "a\r\nPUB b 0\r\n", "a\tb", "a\n", " a", "a..b", "", "a.", "a\ud83d", "a" * 1_001, 7]
)
async def test_a_subject_reply_or_queue_that_would_be_read_as_protocol_is_refused(conn: Connection, wrong: Any) -> None:
    calls: list[Any] = [
        conn.publish(wrong), conn.request(wrong), conn.store(wrong, b"", {"Nats-Msg-Id": "1"}),
        conn.subscribe(wrong, print),
    ]  # fmt: skip
    if wrong:
        calls += [conn.publish("a", reply=wrong), conn.subscribe("a", print, queue=wrong)]
    for call in calls:
        with pytest.raises(BadInput, match="must be tokens without spaces"):
            await call
    await conn.flush()  # the server has closed nothing
    assert conn.connected


async def test_a_foreign_publishers_non_ascii_headers_arrive_as_text(conn: Connection, eventually: Eventually) -> None:
    seen: list[Any] = []

    def hear(message: Received) -> None:
        seen.append(message.headers["model"])

    await conn.subscribe("s.x", hear)
    await conn._client.publish("s.x", b"", headers={"model": "modèle"})
    await eventually(lambda: seen)
    assert type(seen[0]) is str


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2026-01-02T03:04:05Z", 0.0), ("2026-01-02T03:04:05.5Z", 0.5), ("2026-01-02T03:04:05.123456789Z", 0.123456789),
     ("2026-01-02T05:04:05.25+02:00", 0.25)],
)  # fmt: skip
def test_the_servers_times_are_read(text: str, seconds: float) -> None:
    assert frames.timestamp(text) == pytest.approx(1767323045 + seconds, abs=1e-6)


@pytest.mark.parametrize(
    "reply",
    ["$JS.ACK.S.acme-normal.3.10.12.1767323045500000000.7",
     "$JS.ACK.hub.ACCHASH.S.acme-normal.3.10.12.1767323045500000000.7",
     "$JS.ACK.hub.ACCHASH.S.acme-normal.3.10.12.1767323045500000000.7.random"],
)  # fmt: skip
def test_both_forms_of_an_ack_subject_tell_the_same(reply: str) -> None:
    assert frames.ack_info(reply) == ("S", "acme-normal", 3, 10, 1767323045.5, 7)


@pytest.mark.parametrize("reply", ["", "_INBOX.x", "$JS.ACK.S", "$JS.ACK.S.c.x.y.z.t.p"])
def test_another_reply_subject_is_no_ack(reply: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - int's own text serves as well
        frames.ack_info(reply)


# the first connection


async def refusal(where: Settings) -> tuple[AIQueueError, float]:
    """What `open` raises, and after how many seconds. Nothing may be left running."""
    before = asyncio.all_tasks()
    connection = Connection(where)
    started = time.monotonic()
    with pytest.raises(AIQueueError) as caught:
        await connection.open()
    after = time.monotonic() - started
    await connection.close()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
    return caught.value, after


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


async def test_no_server_is_unavailable_within_the_connect_timeout_without_showing_secrets() -> None:
    where = Settings.load(url=f"nats://me:sekret@127.0.0.1:{free_port()}", connect_timeout=0.5)
    error, after = await refusal(where)
    assert isinstance(error, Unavailable)
    assert "is it running" in str(error)
    assert "sekret" not in str(error)
    assert after < 4.5  # the default is 5 s


async def test_a_port_where_nobody_speaks_is_unavailable_within_the_connect_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        error, after = await refusal(Settings.load(url=f"nats://127.0.0.1:{port}", connect_timeout=0.5))
    assert isinstance(error, Unavailable)
    assert after < 4.5  # the default is 5 s


async def test_an_address_that_is_none_is_refused() -> None:
    for url in ("nats://", "http//x", "nats://127.0.0.1:notaport", "nats://127.0.0.1:99999"):
        with pytest.raises(AIQueueError):
            await Connection(Settings.load(url=url, connect_timeout=0.3)).open()


async def test_a_wrong_password_is_refused_at_once(own_server: OwnServer) -> None:
    error, after = await refusal(settings(own_server(), password="wrong", connect_timeout=20))
    assert isinstance(error, AccessDenied)
    assert after < 15


async def test_no_credentials_are_refused_at_once(own_server: OwnServer) -> None:
    error, after = await refusal(Settings.load(url=own_server().url, connect_timeout=20))
    assert isinstance(error, AccessDenied)
    assert after < 15


async def test_a_token_opens_and_a_wrong_one_does_not(own_server: OwnServer) -> None:
    server = own_server('authorization { token: "right" }')
    async with connected(server, user=None, password=None, token="right") as connection:
        await connection.flush()
    error, after = await refusal(settings(server, user=None, password=None, token="wrong", connect_timeout=20))
    assert isinstance(error, AccessDenied)
    assert after < 15


def credentials_in(url: str, user: str, password: str) -> str:
    return url.replace("://", f"://{quote(user, safe='')}:{quote(password, safe='')}@")


@pytest.mark.parametrize("password", ["p@ss/w:rd", "100%", "a,b c#?"])
async def test_credentials_in_an_address_are_decoded(own_server: OwnServer, password: str) -> None:
    server = own_server(f'authorization {{ user: "b@b", password: "{password}" }}')
    async with opened(Settings.load(url=credentials_in(server.url, "b@b", password))) as connection:
        await connection.flush()
    error, _ = await refusal(Settings.load(url=credentials_in(server.url, "b@b", "wrong"), connect_timeout=20))
    assert isinstance(error, AccessDenied)


async def test_credentials_of_the_first_address_reach_servers_that_the_cluster_announces(
    own_cluster: Cluster, eventually: Eventually
) -> None:
    first, *others = own_cluster.nodes
    url = credentials_in(first.url, first.user, first.password)
    async with opened(Settings.load(url=url)) as connection:
        await eventually(lambda: len(connection._open_client.servers) == 3)
        first.kill()
        await eventually(lambda: connection.connected and connection.server in {each.url for each in others})


async def test_credentials_of_the_first_address_are_those_of_all_without(
    own_server: OwnServer, eventually: Eventually
) -> None:
    open_to_all = 'authorization { user: "me", password: "s3cret" }'
    first, second = own_server(open_to_all), own_server(open_to_all)
    url = f"{credentials_in(first.url, 'me', 's3cret')},{second.url}"
    async with opened(Settings.load(url=url)) as connection:
        for server, other in ((first, second), (second, first), (first, second)):
            server.start()
            other.kill()
            await eventually(lambda here=server: connection.connected and connection.server == here.url)


async def test_an_address_with_credentials_of_its_own_is_given_these(
    own_server: OwnServer, eventually: Eventually
) -> None:
    first = own_server('authorization { user: "me", password: "one" }')
    second = own_server('authorization { token: "two" }')
    url = f"{credentials_in(first.url, 'me', 'one')},{second.url.replace('//', '//two@')}"
    async with opened(Settings.load(url=url)) as connection:
        for server, other in ((first, second), (second, first), (first, second)):
            server.start()
            other.kill()
            await eventually(lambda here=server: connection.connected and connection.server == here.url)


async def test_an_nkey_opens_and_another_one_does_not(own_server: OwnServer, tmp_path: Path) -> None:
    seeds = [nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER) for _ in range(2)]
    files = [tmp_path / f"{n}.nk" for n in range(2)]
    for file, seed in zip(files, seeds, strict=True):
        file.write_bytes(seed)
    public = nkeys.from_seed(bytearray(seeds[0])).public_key.decode()
    server = own_server(f"authorization {{ users: [{{ nkey: {public} }}] }}")
    async with connected(server, user=None, password=None, nkey=files[0]) as connection:
        await connection.flush()
    error, after = await refusal(settings(server, user=None, password=None, nkey=files[1], connect_timeout=20))
    assert isinstance(error, AccessDenied)
    assert after < 15


@pytest.mark.parametrize("name", ["creds", "nkey"])
async def test_a_credentials_file_that_is_not_there_is_a_settings_error(name: str, tmp_path: Path) -> None:
    error, _ = await refusal(Settings.load(url="nats://127.0.0.1:1", **{name: tmp_path / "none"}))
    assert isinstance(error, SettingsError)
    assert f"{name}: file {tmp_path / 'none'} does not exist" in str(error)


@pytest.mark.parametrize("name", ["creds", "nkey"])
async def test_a_credentials_file_of_nonsense_is_refused_in_our_words(
    name: str, tmp_path: Path, own_server: OwnServer
) -> None:
    (tmp_path / "bad").write_text("nonsense")
    where = settings(own_server(), user=None, password=None, connect_timeout=3, **{name: tmp_path / "bad"})
    error, _ = await refusal(where)
    assert isinstance(error, SettingsError | AccessDenied)


# TLS


async def test_tls_with_a_private_ca_opens_and_survives_a_restart(
    own_server: OwnServer, certificates: Path, eventually: Eventually
) -> None:
    server = own_server(tls_config(certificates))
    async with connected(server, tls_ca=certificates / "ca.pem") as connection:
        await make_stream(connection, storage="file")
        server.kill()
        server.start()
        assert (await store(connection, "s.x")).seq == 1


async def test_a_server_of_another_ca_is_refused_at_once(own_server: OwnServer, certificates: Path) -> None:
    server = own_server(tls_config(certificates))
    error, after = await refusal(settings(server, tls_ca=certificates / "other.pem", connect_timeout=20))
    assert isinstance(error, AccessDenied)
    assert after < 15


async def test_a_server_of_another_name_is_refused(own_server: OwnServer, certificates: Path) -> None:
    server = own_server(tls_config(certificates))
    error, _ = await refusal(
        settings(server, tls_ca=certificates / "ca.pem", tls_hostname="x.example", connect_timeout=20)
    )
    assert isinstance(error, AccessDenied)


async def test_a_ca_file_of_nonsense_is_a_settings_error(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nonsense")
    for path in (tmp_path / "ca.pem", tmp_path / "none.pem"):
        error, _ = await refusal(Settings.load(url="nats://127.0.0.1:1", tls_ca=path))
        assert isinstance(error, SettingsError)
        assert "tls_ca" in str(error)


async def test_tls_that_is_demanded_and_not_offered_is_refused_before_the_password_is_sent(certificates: Path) -> None:
    received = b""

    async def in_the_clear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        writer.write(b'INFO {"server_id":"x","headers":true,"max_payload":1000,"auth_required":true}\r\n')
        received += await reader.read(10_000)
        writer.close()

    async with await asyncio.start_server(in_the_clear, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        for more in ({"url": f"tls://127.0.0.1:{port}"}, {"tls_ca": certificates / "ca.pem"}):
            where = {
                "url": f"nats://127.0.0.1:{port}",
                "user": "me",
                "password": "sekret",
                "connect_timeout": 20,
            } | more
            error, after = await refusal(Settings.load(**where))
            assert isinstance(error, AccessDenied)
            assert after < 15
    assert b"sekret" not in received
    assert b"CONNECT" not in received


# coming back


async def test_a_killed_and_restarted_server_is_one_line_lost_and_one_regained(
    own_server: OwnServer, caplog: pytest.LogCaptureFixture, eventually: Eventually
) -> None:
    caplog.set_level(logging.INFO)
    server, received, regained = own_server(), [], []

    def hear(message: Received) -> None:
        received.append(message.data)

    async with connected(server) as connection:
        connection.on_regained(lambda: regained.append(True))
        await connection.subscribe("news", hear)
        server.kill()
        await eventually(lambda: not connection.connected)
        with pytest.raises(Unavailable):
            await connection.publish("news", b"lost")
        server.start()
        await connection.wait_up(10)
        await connection.publish("news", b"again")
        await eventually(lambda: received == [b"again"])
    lines = [each.getMessage() for each in caplog.records if each.levelno >= logging.INFO]
    assert len(lines) == 2, lines
    assert lines[0] == f"lost the connection to {server.url}, reconnecting"
    assert lines[1].startswith(f"reconnected to {server.url} after ")
    assert regained == [True]


async def test_what_is_stored_while_the_server_is_killed_and_restarted_is_stored_exactly_once(
    own_server: OwnServer, eventually: Eventually
) -> None:
    server = own_server()
    async with connected(server) as connection:
        await make_stream(connection, storage="file")
        answered = 0

        async def one(n: int) -> None:
            nonlocal answered
            await store(connection, f"s.{n}", key=str(n), timeout_s=20)
            answered += 1

        work = [asyncio.create_task(one(n)) for n in range(2_000)]
        await eventually(lambda: answered > 100)
        server.kill()  # with publishes in flight
        await eventually(lambda: not connection.connected)
        work += [asyncio.create_task(one(n)) for n in range(2_000, 2_100)]  # issued while it is down
        server.start()
        await asyncio.gather(*work)
        subjects = (await connection.api("STREAM.INFO.S", {"subjects_filter": ">"}))["state"]["subjects"]
        assert len(subjects) == 2_100
        assert set(subjects.values()) == {1}


async def test_a_store_gives_up_at_its_timeout_and_says_whether_it_may_be_stored(
    own_server: OwnServer, eventually: Eventually
) -> None:
    server = own_server()
    async with connected(server) as connection:
        await make_stream(connection)
        server.pause()
        with pytest.raises(Unavailable) as caught:
            await store(connection, "s.x", timeout_s=0.5)
        assert caught.value.maybe_stored
        server.resume()

        async def is_stored() -> bool:
            return await count(connection) == 1

        await eventually(is_stored)  # it was
        server.kill()
        await eventually(lambda: not connection.connected)
        started = time.monotonic()
        with pytest.raises(Unavailable) as caught:
            await store(connection, "s.y", timeout_s=0.5)
        assert not caught.value.maybe_stored
        assert time.monotonic() - started < 20


async def test_a_server_that_hangs_is_noticed_within_ten_seconds(
    own_server: OwnServer, caplog: pytest.LogCaptureFixture, eventually: Eventually
) -> None:
    server = own_server()
    async with connected(server, ping_interval=1) as connection:
        await make_stream(connection)
        server.pause()
        await eventually(lambda: not connection.connected)
        server.resume()
        assert (await store(connection, "s.x", timeout_s=15)).seq == 1


def test_the_default_ping_finds_a_hanging_server_within_ten_seconds() -> None:
    from aiqueue.connection.dial import PINGS_MISSED_MAX  # noqa: PLC0415

    assert Settings.model_fields["ping_interval"].default * (PINGS_MISSED_MAX + 1) < 10


async def test_a_frame_that_makes_nats_py_give_up_does_not_end_the_connection(
    own_server: OwnServer, caplog: pytest.LogCaptureFixture, eventually: Eventually
) -> None:
    server, received = own_server("max_payload: 2000"), []

    def hear(message: Received) -> None:
        received.append(message.data)

    async with connected(server) as connection:
        await make_stream(connection)
        await connection.subscribe("news", hear)
        gone = await connection.subscribe("old", hear)
        await gone.close()
        for n in range(3):
            client = connection._client
            await client.publish("x", bytes(1990), headers={"more": "than fits"})
            await eventually(lambda client=client: client.is_closed)
            await connection.wait_up(10)
            assert connection._client is not client
            await connection.publish("news", str(n).encode())
            await connection.publish("old", b"unheard")
            await store(connection, f"s.{n}")
        await eventually(lambda: received == [b"0", b"1", b"2"])
        assert await count(connection) == 3
    assert [each.getMessage().split()[0] for each in caplog.records if each.name.startswith(LOG)] == [
        "lost",
        "reconnected",
    ] * 3


async def test_a_user_whose_password_changes_is_told_so_and_comes_back_with_it(
    own_server: OwnServer, caplog: pytest.LogCaptureFixture, eventually: Eventually
) -> None:
    server = own_server()
    right = server.password
    async with connected(server) as connection:
        await make_stream(connection)
        server.password = "other"
        server.reload()
        await eventually(lambda: not connection.connected)
        await eventually(lambda: "uthorization" in caplog.text or "uthentication" in caplog.text)
        server.password = right
        server.reload()
        assert (await store(connection, "s.x", timeout_s=15)).seq == 1
        errors = [each for each in caplog.records if each.name.startswith(LOG) and each.levelno >= logging.ERROR]
        assert len(errors) <= 2, [each.getMessage() for each in errors]  # not once per try


@pytest.mark.parametrize(
    "greeting",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b"INFO {broken\r\n", b"x" * 300_000, b"INFO \xff\xfe\r\n",
     b'INFO {"max_payload": "many"}\r\n-ERR \'odd\'\r\n'],
)  # fmt: skip
async def test_something_else_on_the_servers_port_does_not_stop_it_from_coming_back(
    own_server: OwnServer, greeting: bytes, eventually: Eventually
) -> None:
    server, met = own_server(), 0

    async def impostor(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal met
        met += 1
        with contextlib.suppress(OSError):
            writer.write(greeting)
            await writer.drain()
        writer.close()

    async with connected(server) as connection:
        server.kill()
        async with await asyncio.start_server(impostor, "127.0.0.1", server.port):
            await eventually(lambda: met >= 2)
        server.start()
        await connection.wait_up(15)
        await connection.flush()


async def test_calls_that_wait_for_a_link_end_when_the_connection_is_closed(
    own_server: OwnServer, eventually: Eventually
) -> None:
    server = own_server()
    connection = Connection(settings(server))
    await connection.open()
    server.kill()
    await eventually(lambda: not connection.connected)
    calls = [asyncio.create_task(store(connection, "s.x")), asyncio.create_task(connection.wait_up(30))]
    await asyncio.sleep(0)
    started = time.monotonic()
    await connection.close()
    found = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(each) for each in found] == [Unavailable, Unavailable]
    assert time.monotonic() - started < 20


def test_reconnect_delays_grow_exponentially_with_jitter_up_to_a_cap() -> None:
    longest = [reconnect_delay_s(n, lambda: 0.0) for n in range(40)]
    shortest = [reconnect_delay_s(n, lambda: 1.0) for n in range(40)]
    assert longest[:4] == [RECONNECT_FIRST_S * 2**n for n in range(4)]
    assert longest == sorted(longest)
    assert longest[-1] == RECONNECT_CAP_S
    assert shortest == [each / 2 for each in longest]
    assert reconnect_delay_s(10**9) <= RECONNECT_CAP_S
    assert len({reconnect_delay_s(3) for _ in range(20)}) > 1


# permissions

LIMITED = """authorization {
  users: [
    { user: admin, password: p },
    { user: tenant, password: p, permissions: {
        publish: ["s.acme", "s.acme.>"], subscribe: ["_mine.>"] } },
    { user: worker, password: p, permissions: { publish: { deny: ["$JS.API.STREAM.DELETE.>"] } } }
  ]
}"""


async def test_a_publish_that_is_not_permitted_is_access_denied_at_once(own_server: OwnServer) -> None:
    server = own_server(LIMITED)
    async with connected(server, user="admin", password="p") as admin:
        await make_stream(admin)
        async with connected(server, user="tenant", password="p", inbox_prefix="_mine.x") as tenant:
            assert (await store(tenant, "s.acme")).seq == 1
            started = time.monotonic()
            with pytest.raises(AccessDenied, match=r"s\.other"):
                await store(tenant, "s.other")
            assert time.monotonic() - started < 20
            assert (await store(tenant, "s.acme.high")).seq == 2  # the connection goes on


async def test_a_user_who_may_not_ask_for_streams_is_not_refused_for_a_stream_that_is_away(
    own_server: OwnServer,
) -> None:
    async with connected(own_server(LIMITED), user="tenant", password="p", inbox_prefix="_mine.x") as tenant:
        with pytest.raises(Unavailable):
            await store(tenant, "s.acme", timeout_s=0.3)


async def test_a_request_that_is_not_permitted_is_access_denied_at_once(own_server: OwnServer) -> None:
    server = own_server(LIMITED)
    async with connected(server, user="worker", password="p") as worker:
        await make_stream(worker)
        started = time.monotonic()
        with pytest.raises(AccessDenied, match=r"STREAM\.DELETE"):
            await worker.api("STREAM.DELETE.S", timeout=60)
        assert time.monotonic() - started < 20
        assert await count(worker) == 0


async def test_a_user_who_may_not_hear_answers_is_told_so_before_anything_is_stored(own_server: OwnServer) -> None:
    error, after = await refusal(settings(own_server(LIMITED), user="tenant", password="p", connect_timeout=20))
    assert isinstance(error, AccessDenied)
    assert "inbox_prefix" in str(error)
    assert after < 15


# leaving


async def test_close_is_safe_twice_and_unopened_and_a_closed_connection_can_be_opened_again(account: Account) -> None:
    connection = Connection(settings(account))
    await connection.close()
    with pytest.raises(Unavailable, match="not open"):
        await connection.api("INFO")
    with pytest.raises(Unavailable, match="not open"):
        await store(connection, "s.x")
    for _ in range(2):
        await connection.open()
        await connection.open()
        await connection.flush()
        await connection.close()
        await connection.close()
        with pytest.raises(Unavailable, match="not open"):
            await connection.publish("s.x")


async def test_what_was_published_before_close_has_arrived(account: Account) -> None:
    async with connected(account) as watcher:
        await make_stream(watcher)
        async with connected(account) as connection:
            for n in range(500):
                await connection.publish(f"s.{n}")
        while await count(watcher) < 500:
            await watcher.flush()


@pytest.mark.parametrize("when", ["up", "down", "replacing"])
async def test_no_task_is_left_after_close(own_server: OwnServer, when: str, eventually: Eventually) -> None:
    before = asyncio.all_tasks()
    server = own_server()
    connection = Connection(settings(server))
    await connection.open()

    def hear(_message: Received) -> None: ...

    await connection.subscribe("news", hear)
    if when == "replacing":
        server.pause()
        await connection._client._close(connection._client.CLOSED)
        await eventually(lambda: connection._replacing is not None)
    if when == "down":
        server.kill()
        await eventually(lambda: not connection.connected)
    await connection.close()
    server.resume() if when == "replacing" else None
    await eventually(lambda: asyncio.all_tasks() == before)


@pytest.mark.parametrize(
    "mistake",
    [
        RuntimeError("r"),
        OSError("o"),
        TimeoutError("t"),
        nats.errors.Error("n"),
        AccessDenied("a"),
        asyncio.CancelledError(),
    ],
)
async def test_a_callback_that_raises_is_logged_and_the_next_message_still_comes(
    conn: Connection, caplog: pytest.LogCaptureFixture, eventually: Eventually, mistake: BaseException
) -> None:
    received = []

    def hear(message: Received) -> None:
        received.append(message.data)
        raise mistake

    await conn.subscribe("news", hear)
    await conn.publish("news", b"1")
    await conn.publish("news", b"2")
    await eventually(lambda: received == [b"1", b"2"])
    await conn.flush()
    logged = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert [each.exc_info and each.exc_info[1] for each in logged] == [mistake, mistake]
