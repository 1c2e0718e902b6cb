"""How many acks the server may owe a worker: counted without a server, and on one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiqueue
from aiqueue.connection.nats_client import WireMessage
from aiqueue.lanes import Delivery, LanePull, ack_window, line
from aiqueue.lanes.ack_window import EVERY, UNCONFIRMED_MAX, AckWindow
from aiqueue.subjects import Lane

from ..support import Account, Eventually, create_streams


class Echo(aiqueue.Message, kind="echo"): ...


def acked(window: AckWindow, token: str = "1f") -> bytes:
    """Send an ack, as a `Delivery` does."""
    lane = LanePull(Lane("agent.tasks", "acme", "normal"), "S", "c", 30.0, token=token, acks=window)
    message = WireMessage(b"ai.agent.tasks.acme.normal", b"$JS.ACK.S.c.1.2.3.4.5", b"", b"NATS/1.0\r\n\r\n")
    return Delivery(lane, message, 1, 1, 0.0, 0.0).ack_frame()


def sent(window: AckWindow, count: int, token: str = "1f") -> list[str]:
    """Send so many acks, and return the numbers of those that the server answers."""
    frames = [acked(window, token).split(b"\r\n")[0].decode() for _ in range(count)]
    return [frame.split()[2].rpartition(".")[2] for frame in frames if len(frame.split()) == 4]


def window() -> AckWindow:
    made = AckWindow()
    made.restart("_INBOX.x.")
    return made


def test_one_ack_in_some_is_a_request_to_the_inbox_and_the_others_are_plain() -> None:
    made = window()
    frames = [acked(made) for _ in range(2 * EVERY)]
    plain = [b"PUB $JS.ACK.S.c.1.2.3.4.5 4\r\n+ACK\r\n"] * (EVERY - 1)
    asked = [b"PUB $JS.ACK.S.c.1.2.3.4.5 _INBOX.x.1f.a%d 4\r\n+ACK\r\n" % n for n in (1, 2)]
    assert frames == [*plain, asked[0], *plain, asked[1]]


@given(st.lists(st.integers(0, 3), max_size=400))
def test_the_room_is_what_the_server_has_confirmed_of_what_was_sent(steps: list[int]) -> None:
    made, open_ = window(), list[str]()
    for step in steps:
        if step == 0 and open_:
            made.confirm(open_.pop(0))
        else:
            open_ += sent(made, step * EVERY)
        assert made.room() == UNCONFIRMED_MAX - EVERY * len(open_)
    for number in open_:
        made.confirm(number)
    assert made.room() == UNCONFIRMED_MAX


def test_an_answer_is_news_only_where_less_than_half_was_room() -> None:
    made = window()
    made.unconfirmed_max = 8 * EVERY
    numbers = sent(made, 6 * EVERY)
    assert not made.confirm(numbers[0])
    assert made.room() == 3 * EVERY  # a worker may find that not worth a request: it is to look again
    assert made.confirm(numbers[1])
    assert not made.confirm(numbers[2])
    assert made.room() == 5 * EVERY
    assert not made.confirm(numbers[3])


def test_answers_about_a_lane_that_is_gone_and_those_of_a_former_link_are_not_waited_for() -> None:
    made = window()
    sent(made, 3 * EVERY, "1")
    sent(made, 2 * EVERY, "2")
    made.forget("1")
    assert made.room() == UNCONFIRMED_MAX - 2 * EVERY
    made.restart("_INBOX.y.")
    assert made.room() == UNCONFIRMED_MAX


def test_answers_that_never_come_are_not_waited_for_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    made = window()
    sent(made, EVERY)
    made.drop_lost()
    assert made.room() == UNCONFIRMED_MAX - EVERY
    monkeypatch.setattr(ack_window, "LOST_S", 0.0)
    made.drop_lost()
    assert made.room() == UNCONFIRMED_MAX


@given(st.integers(0, 100_000), st.floats(0, 1_000), st.floats(0, 1_000), st.floats(0, 100))
def test_in_line_the_server_may_owe_the_less_the_longer_lanes_have_waited(
    lanes: int, wait: float, backlog_s: float, longer: float
) -> None:
    owed = line.unconfirmed_max(lanes, wait, backlog_s)
    assert line.OWED_LATE <= line.unconfirmed_max(lanes, wait + longer, backlog_s) <= owed
    assert owed <= line.OWED_MAX
    if backlog_s < line.DEEP_S:
        assert owed == line.OWED_MAX
    else:
        first = line.unconfirmed_max(lanes, wait, backlog_s, is_first_round=True)
        assert first == (line.OWED_LATE if owed == line.OWED_LATE else line.OWED_MIN) <= owed


async def test_a_worker_asks_for_no_more_jobs_while_the_server_owes_it_acks(
    account: Account, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    confirm, held = AckWindow.confirm, list[Any]()

    def hold(window: AckWindow, number: str) -> bool:
        held.append((window, number))
        return False

    monkeypatch.setattr(AckWindow, "confirm", hold)
    monkeypatch.setattr(ack_window, "UNCONFIRMED_MAX", 5 * EVERY)
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await create_streams(client)
        for _ in range(40 * EVERY):
            await client.enqueue(Echo(), tenant="acme")
        worker, ran = aiqueue.Worker(concurrency=8), 0

        @worker.handle(Echo, result=False)
        async def echo(job: aiqueue.Job[Echo]) -> None:
            nonlocal ran
            ran += 1

        async with worker.running(client) as session:
            await eventually(lambda: len(held) >= 5 and session.puller.granted == 0 and not session.running)
            before = ran
            assert before < 8 * EVERY  # the window, and what was asked for before it was full
            for _ in range(10):
                session.puller.refill(8, 8)
                await client.connection.flush()
            assert ran == before
            monkeypatch.setattr(AckWindow, "confirm", confirm)
            for window, number in held:
                if confirm(window, number):
                    session._schedule_pull()
            await eventually(lambda: ran == 40 * EVERY)
            await eventually(lambda: session.puller.acks.room() == session.puller.acks.unconfirmed_max)


async def test_a_lane_whose_consumer_was_deleted_owes_nothing(
    account: Account, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AckWindow, "confirm", lambda window, number: False)
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await create_streams(client)
        worker = aiqueue.Worker()

        @worker.handle(Echo, result=False)
        async def echo(job: aiqueue.Job[Echo]) -> None: ...

        for _ in range(2 * EVERY):
            await client.enqueue(Echo(), tenant="acme")
        async with worker.running(client) as session:
            acks = session.puller.acks
            await eventually(lambda: acks.room() == acks.unconfirmed_max - 2 * EVERY)
            await client.connection.api("CONSUMER.DELETE.AI_AGENT_TASKS.acme-normal")
            await eventually(lambda: acks.room() == acks.unconfirmed_max)
