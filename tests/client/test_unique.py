"""`unique` takes any text: a token is the id itself, of any other the id is a hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote, unquote

import nats
import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiqueue
from aiqueue import headers, subjects
from aiqueue.agent import Mail
from aiqueue.connection import HEADERS_MAX, block
from aiqueue.enqueue import Filter, id_of_key, with_header, with_step
from aiqueue.errors import JobFailed

from ..support import ROOT, Eventually, create_streams

URL = "https://example.com/a?b=ü#c"
KEYS = [URL, "two\nlines\r\nAiq-Kind: other", "🎈", "x" * 65, "a b", ".", "*", ">", "%41", "é" * 5_000, "y" * 10_240]
TENANT = "acme"


class Task(aiqueue.Message, kind="task"):
    fails: bool = False


class Ask(aiqueue.Message, kind="rag.query", family="rag.queries"):
    prompt: str = ""


@pytest.fixture
async def client(account: Any) -> AsyncIterator[aiqueue.Client]:
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await create_streams(client)
        yield client


def hashed(key: str) -> str:
    return "x" + hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:40]


@given(st.text(min_size=1))
def test_the_id_of_any_key_is_a_token_and_a_token_is_its_own_id(key: str) -> None:
    found = id_of_key(key)
    assert subjects.TOKEN.fullmatch(found.id)
    if subjects.TOKEN.fullmatch(key):
        assert (found.id, found.shown) == (key, "")
    else:
        assert found.id == hashed(key)
        assert found.shown.isascii()
        assert found.shown.isprintable()
        assert id_of_key(found.id) == (found.id, True, "")  # so the id names the same job again


@given(st.text(min_size=1, max_size=100, alphabet=st.characters(exclude_categories=["Cs"])))
def test_a_key_is_shown_as_it_was_given(key: str) -> None:
    assert headers.unique_key({headers.UNIQUE: headers.encode_unique(key)}) == key


@pytest.mark.parametrize("key", ["é" * 5_000, "y" * 10_240, "🎈" * 1_000, "a%é" * 4_000])
def test_a_long_key_is_cut_where_it_is_shown_and_says_its_length(key: str) -> None:
    encoded = headers.encode_unique(key)
    assert len(encoded) < 1_100
    shown = headers.unique_key({headers.UNIQUE: encoded})
    start, _, length = shown.partition("… (")
    assert key.startswith(start)
    assert len(start) > 80
    assert length == f"{len(key):,} characters)"


def test_the_test_vector_of_the_wire_contract() -> None:
    found = id_of_key("https://example.com/reports/7?lang=de")
    assert found.id == "x6559fae42629ad1e04cee65b641f7d90b51cba3f"
    assert found.shown == "https%3A%2F%2Fexample.com%2Freports%2F7%3Flang%3Dde"
    page = (ROOT / "docs/reference/wire/jobs.md").read_text()
    assert found.id in page
    assert found.shown in page


def test_a_header_and_a_step_are_added_to_an_encoded_block() -> None:
    encoded = block({headers.MSG_ID: "acme/agent.tasks/k", headers.JOB_ID: "k"})
    assert with_step(encoded, "") == encoded
    more = with_header(with_step(encoded, "again-5-7"), headers.UNIQUE, "k%20")
    assert more == block({headers.MSG_ID: "acme/agent.tasks/k/again-5-7", headers.JOB_ID: "k", headers.UNIQUE: "k%20"})


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("delay", [None, 0.3])
async def test_any_text_is_a_key_and_its_job_is_found_by_it(
    client: aiqueue.Client, key: str, delay: float | None
) -> None:
    worker, seen = aiqueue.Worker(), []

    @worker.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> str:
        seen.append((job.id, job.headers[headers.UNIQUE]))
        return "done"

    handle = await client.enqueue(Task(), tenant=TENANT, unique=key, delay=delay)
    again = await client.enqueue(Task(), tenant=TENANT, unique=key, delay=delay)
    assert (handle.id, handle.duplicate) == (hashed(key), False)
    assert (again.id, again.duplicate) == (handle.id, True)
    async with worker.running(client):
        assert await handle.result(25) == "done"
    ((job_id, shown),) = seen
    assert job_id == handle.id
    assert unquote(shown.partition(" ")[0]).startswith(key[:80])
    assert (await client.job(key)).id == handle.id
    found = await handle.status()
    assert found.unique == headers.unique_key({headers.UNIQUE: shown})  # from the journal: the job is gone
    assert found.timeline[0].text == f"as {found.unique}"


async def test_enqueue_many_makes_the_same_ids(client: aiqueue.Client) -> None:
    items = [aiqueue.JobSpec(Task(), unique=key, delay=delay) for key in KEYS for delay in (None, "1h")]
    handles = [each async for each in client.enqueue_many(items, tenant=TENANT)]
    assert [each.id for each in handles if isinstance(each, aiqueue.Handle)] == [
        hashed(key) for key in KEYS for _ in range(2)
    ]
    stored = [each async for each in client.connection.read("AI_AGENT_TASKS", ">")]
    assert [each.headers[headers.UNIQUE] for each in stored] == [headers.encode_unique(key) for key in KEYS]
    assert max(len(block(each.headers)) for each in stored) < HEADERS_MAX // 20


async def test_a_plain_client_that_makes_the_id_itself_meets_the_same_job(client: aiqueue.Client, account: Any) -> None:
    handle = await client.enqueue(Task(), tenant=TENANT, unique=URL)
    plain = await nats.connect(account.url, user=account.user, password=account.password)
    try:
        for job_id in (hashed(URL), URL):
            ack = await plain.jetstream().publish(
                f"ai.agent.tasks.{TENANT}",
                json.dumps({"fails": False}).encode(),
                headers={"Nats-Msg-Id": f"{TENANT}/agent.tasks/{hashed(URL)}", "Aiq-Job-Id": quote(job_id, safe=":/")},
            )
            assert ack.duplicate
    finally:
        await plain.close()
    assert handle.id == hashed(URL)


async def test_a_dead_letter_names_the_key_and_a_replay_keeps_it(client: aiqueue.Client) -> None:
    worker, seen, fails = aiqueue.Worker(), [], True

    @worker.handle(Task, retry=aiqueue.Backoff(attempts=1))
    async def task(job: aiqueue.Job[Task]) -> None:
        seen.append(headers.unique_key(job.headers))
        if fails:
            raise ValueError("no")

    async with worker.running(client):
        handle = await client.enqueue(Task(), tenant=TENANT, unique=URL)
        with pytest.raises(JobFailed):
            await handle.result(25)
        (letter,) = [each async for each in client.dead.find(Filter(job_id=URL))]
        assert (letter.unique, letter.summary()["unique"], letter.job_id) == (URL, URL, handle.id)
        assert (await handle.status()).unique == URL
        fails = False
        await client.dead.replay(letter)
        assert await (await client.job(URL)).result(25) is None
    assert seen == [URL, URL]


async def test_a_job_is_cancelled_by_its_key(client: aiqueue.Client) -> None:
    handle = await client.enqueue(Task(), tenant=TENANT, unique=URL)
    assert await client.cancel(URL)
    with pytest.raises(JobFailed, match="cancelled"):
        await handle.result(25)


async def test_a_request_takes_any_key_too(client: aiqueue.Client) -> None:
    worker, asked = aiqueue.Worker(), []

    @worker.handle(Ask)
    async def ask(job: aiqueue.Job[Ask]) -> str:
        asked.append((job.id, headers.unique_key(job.headers)))
        return job.message.prompt.upper()

    async with worker.running(client), aiqueue.Responder().running(client):
        for _ in range(2):
            assert await client.request(Ask(prompt="hi"), tenant=TENANT, unique=URL, timeout=25) == "HI"
    assert asked == [(hashed(URL), URL)]


async def test_mail_takes_any_key_too(client: aiqueue.Client, eventually: Eventually) -> None:
    agent, seen = aiqueue.Agent("planner", tenant=TENANT), []

    @agent.handle(Task)
    async def task(mail: Mail[Task]) -> None:
        seen.append((mail.id, headers.unique_key(mail.headers)))

    sent = [await client.inboxes.send(Task(), tenant=TENANT, to="planner", unique=URL) for _ in range(2)]
    assert [(each.mail_id, each.duplicate) for each in sent] == [(hashed(URL), False), (hashed(URL), True)]
    async with agent.running(client):
        await eventually(lambda: len(seen) == 1)
    assert seen == [(hashed(URL), URL)]
