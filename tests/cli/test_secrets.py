"""Secrets of a message: whole for its handler and for who awaits a result, masked wherever somebody looks."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Generic, TypeVar

import nats
import pydantic
import pytest
from pydantic import BaseModel, Field, SecretBytes, SecretStr
from typer.testing import CliRunner, Result

import aiqueue
from aiqueue import headers
from aiqueue.agent import Mail
from aiqueue.cli.app import app
from aiqueue.codec.secret_paths import MASK, header_of_class, header_of_value, mask, paths_in, redact
from aiqueue.errors import JobFailed

from ..processes.isolated_secrets import Guarded
from ..processes.isolated_secrets import worker as guarding
from ..support import Account, Eventually, create_streams

WORD = "hunter2-swordfish"
ONCE = aiqueue.Backoff(attempts=1)
T = TypeVar("T")


class Login(BaseModel):
    user: str
    password: SecretStr = Field(alias="pass word")


class Pages(BaseModel, Generic[T]):
    items: list[T]


class Fetch(aiqueue.Message, kind="fetch"):
    url: str = "https://x"
    key: SecretStr
    spare: SecretBytes | None = None
    logins: list[Login] = Field([])
    pages: Pages[SecretStr] | None = None
    by_host: dict[str, SecretStr] = Field({})


class Tree(BaseModel):
    name: str
    key: SecretStr
    inner: list[Tree] = []


class Note(aiqueue.Message, kind="note", family="agent.message"):
    text: str = ""
    key: SecretStr


class Ask(aiqueue.Message, kind="gateway.request", family="gateway.requests"):
    prompt: str = ""
    key: SecretStr


def full(word: str = WORD) -> Fetch:
    login = Login(user="ada", **{"pass word": word})  # type: ignore[arg-type]
    return Fetch(
        key=SecretStr(word), spare=SecretBytes(word.encode()), logins=[login],
        pages=Pages[SecretStr](items=[SecretStr(word)]),
        by_host={"x.org": SecretStr(word)},
    )  # fmt: skip


@pytest.fixture
async def client(account: Account, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[aiqueue.Client]:
    for name, value in {"URL": account.url, "USER": account.user, "PASSWORD": account.password}.items():
        monkeypatch.setenv(f"AIQUEUE_{name}", value)
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await create_streams(client)
        yield client


Cli = Callable[..., Awaitable[Result]]


@pytest.fixture
def cli() -> Cli:
    async def run(*words: str) -> Result:
        result = await asyncio.to_thread(CliRunner().invoke, app, list(words))
        assert result.exit_code in (0, 1), result.output
        return result

    return run


async def only_letter(client: aiqueue.Client) -> Any:
    (letter,) = [each async for each in client.dead.find()]
    return letter


# which fields


def test_the_header_names_secrets_in_models_lists_maps_and_generics_under_their_names_and_aliases() -> None:
    assert header_of_class(Fetch).split() == [
        "/by_host/*", "/key", "/logins/*/pass%20word", "/logins/*/password", "/pages/items/*", "/spare",
    ]  # fmt: skip
    assert header_of_class(Login) == "/pass%20word /password"
    assert header_of_class(aiqueue.Message) == ""


def test_a_model_inside_itself_is_masked_as_a_whole_below() -> None:
    tree = {"name": "a", "key": WORD, "inner": [{"name": "b", "key": WORD, "inner": []}]}
    assert WORD not in json.dumps(mask(tree, header_of_class(Tree)))
    assert mask(tree, header_of_class(Tree))["name"] == "a"


def test_a_long_header_is_cut_to_paths_that_mask_more() -> None:
    value = {"outer": {f"a long name of a field, number {number}": SecretStr(WORD) for number in range(500)}, "open": 1}
    assert paths_in(header_of_value(value)) == (("outer",),)
    assert mask({"outer": {"x": 1}, "open": 1}, header_of_value(value)) == {"outer": MASK, "open": 1}


@pytest.mark.parametrize(
    ("data", "header", "shown"),
    [
        ({"a": {"b": 1}}, "/a/b", {"a": {"b": MASK}}), ({"a": [{"b": 1}, {"b": None}]}, "/a/*/b", {"a": [{"b": MASK},
        {"b": None}]}),
        ({"a": [{"b": 1}]}, "/a/b", {"a": [{"b": MASK}]}), ({"a": "text"}, "/a/b", {"a": MASK}), ([1, 2], "/", MASK),
        ({"x/y": 1, "é *": 2}, "/x%2Fy /%C3%A9%20%2A", {"x/y": MASK, "é *": MASK}), ({"a": 1}, "", {"a": 1}), (None,
        "/a", None),
        ({"a": 1}, "nonsense //", {"a": 1}),
    ],
)  # fmt: skip
def test_data_is_masked_at_the_paths_whatever_is_there(data: Any, header: str, shown: Any) -> None:
    assert mask(data, header) == shown


def test_an_error_text_loses_the_secrets_that_it_repeats() -> None:
    data = {"key": "it's a\nsecret", "pin": 123456, "short": "a"}
    text = "bad 'it\\'s a\\nsecret' or it's a\nsecret, 123456, a pin"
    shown = redact(text, data, "/key /pin /short")
    assert "secret" not in shown
    assert "123456" not in shown
    assert shown.endswith("a pin")


# jobs


async def test_a_handler_gets_secrets_whole_and_the_job_names_them(client: aiqueue.Client) -> None:
    worker, seen = aiqueue.Worker(), asyncio.Queue[aiqueue.Job[Fetch]]()

    @worker.handle(Fetch)
    async def fetch(job: aiqueue.Job[Fetch]) -> None:
        seen.put_nowait(job)

    async with worker.running(client):
        await client.enqueue(full(), tenant="acme")
        await client.enqueue(full("another"), tenant="acme", delay=0.3)
        assert [each async for each in client.enqueue_many([full("third")], tenant="acme")]
        jobs = [await asyncio.wait_for(seen.get(), 25) for _ in range(3)]
    words = {job.message.key.get_secret_value(): job for job in jobs}
    assert sorted(words) == ["another", WORD, "third"]
    for word, job in words.items():
        assert job.message == full(word)
        assert job.headers[headers.SECRET] == header_of_class(Fetch)


async def test_a_dead_letter_is_shown_without_its_secrets_and_replayed_with_them(
    client: aiqueue.Client, cli: Cli, caplog: pytest.LogCaptureFixture
) -> None:
    worker, replayed = aiqueue.Worker(), asyncio.Queue[Fetch]()
    broken = True

    @worker.handle(Fetch, retry=ONCE)
    async def fetch(job: aiqueue.Job[Fetch]) -> None:
        if broken:
            raise ValueError(f"cannot log in with {job.message.key.get_secret_value()}")
        replayed.put_nowait(job.message)

    with caplog.at_level(logging.DEBUG, "aiqueue"):
        async with worker.running(client):
            handle = await client.enqueue(full(), tenant="acme")
            with pytest.raises(JobFailed, match="cannot log in") as failed:
                await handle.result(25)
            letter = await only_letter(client)
            assert WORD.encode() in letter.body, "it is kept whole"
            shown = [
                (await cli("dead", "show", str(letter.seq))).output,
                (await cli("dead", "show", str(letter.seq), "--json")).output,
                (await cli("dead", "ls")).output,
                (await cli("inspect", handle.id)).output,
                (await cli("inspect", handle.id, "--json")).output,
                (await cli("tail", handle.id, "--json")).output,
                str(failed.value),
                str(await handle.status()),
                caplog.text,
            ]
            broken = False
            await client.dead.replay(letter)
            assert await asyncio.wait_for(replayed.get(), 25) == full()
    for text in shown:
        assert WORD not in text
    assert MASK in shown[0]
    assert json.loads(shown[1])["payload"]["key"] == MASK
    assert json.loads(shown[1])["payload"]["url"] == "https://x"


@pytest.mark.parametrize("envelope", [False, True])
async def test_a_plain_publishers_secrets_are_masked_by_the_handlers_model(
    client: aiqueue.Client, cli: Cli, account: Account, eventually: Eventually, envelope: bool
) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Ask, retry=ONCE)
    async def fetch(_: aiqueue.Job[Ask]) -> None: ...

    data: dict[str, Any] = {"prompt": 5, "key": WORD, "request_id": "r1"}  # no text, so the handler's model refuses it
    if envelope:
        data = {"schema_version": "1", "message_type": "llm_request", "data": data}
    plain = await nats.connect(account.url, user=account.user, password=account.password)
    await plain.jetstream().publish("ai.gateway.requests.acme", json.dumps(data).encode())
    await plain.close()
    async with worker.running(client):
        await eventually(lambda: find_all(client))
    letter = await only_letter(client)
    assert letter.reason == "invalid"
    shown = (await cli("dead", "show", str(letter.seq))).output
    assert WORD not in shown
    assert MASK in shown


async def find_all(client: aiqueue.Client) -> list[Any]:
    return [each async for each in client.dead.find()]


class Strict(BaseModel):
    n: int


async def test_pydantics_errors_in_a_handler_are_kept_without_their_input(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()

    class Plain(aiqueue.Message, kind="plain"):
        text: str

    @worker.handle(Plain, retry=ONCE)
    async def plain(job: aiqueue.Job[Plain]) -> None:
        try:
            Strict(n=job.message.text)  # type: ignore[arg-type]
        except pydantic.ValidationError as error:
            raise RuntimeError("no number") from error

    async with worker.running(client):
        handle = await client.enqueue(Plain(text=WORD), tenant="acme")
        with pytest.raises(JobFailed):
            await handle.result(25)
    letter = await only_letter(client)
    assert WORD not in str(letter.history)
    assert "int_parsing" in str(letter.history)


# results and chunks


async def test_a_result_and_chunks_are_whole_for_their_reader_and_masked_for_who_looks(
    client: aiqueue.Client, cli: Cli
) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Fetch)
    async def fetch(job: aiqueue.Job[Fetch]) -> Any:
        await job.chunk({"token": job.message.key, "n": 1})
        await job.chunk("text")
        return {"logins": job.message.logins, "key": job.message.key, "open": "to see"}

    async with worker.running(client):
        handle = await client.enqueue(full(), tenant="acme")
        assert await handle.result(25) == {
            "logins": [{"user": "ada", "pass word": WORD}], "key": WORD, "open": "to see",
        }  # fmt: skip
        items = [item async for item in handle.stream(timeout=25)]
        assert [item.data for item in items if item.event == "chunk"] == [{"token": WORD, "n": 1}, "text"]
        assert [item.masked().data for item in items if item.event == "chunk"] == [{"token": MASK, "n": 1}, "text"]
        assert WORD not in str(await handle.status())
        for words in (
            ["inspect", handle.id],
            ["inspect", handle.id, "--json"],
            ["tail", handle.id],
            ["tail", handle.id, "--json"],
        ):
            shown = (await cli(*words)).output
            assert WORD not in shown, words
            assert "to see" in shown or words == ["tail", handle.id]


async def test_secrets_pass_a_child_process_in_both_directions(client: aiqueue.Client, cli: Cli) -> None:
    async with guarding.running(client):
        handle = await client.enqueue(Guarded(key=SecretStr(WORD)), tenant="acme")
        assert await handle.result(60) == {"again": WORD}
        items = [item async for item in handle.stream(timeout=25)]
        assert [item.data for item in items if item.event == "chunk"] == [{"part": WORD}, "\U0001f600", "\ufffd"]
        assert WORD not in (await cli("inspect", handle.id, "--json")).output
        failing = await client.enqueue(Guarded(key=SecretStr(WORD), fail=True), tenant="acme")
        with pytest.raises(JobFailed) as failed:
            await failing.result(60)
    assert "no entry with" in str(failed.value)
    assert WORD not in str(failed.value)
    assert WORD not in str((await only_letter(client)).history)


# requests and mail


async def test_a_request_carries_its_secrets_and_its_answer_names_those_of_the_result(client: aiqueue.Client) -> None:
    worker, seen = aiqueue.Worker(), asyncio.Queue[aiqueue.Job[Ask]]()

    @worker.handle(Ask)
    async def answer(job: aiqueue.Job[Ask]) -> Any:
        seen.put_nowait(job)
        return {"key": job.message.key}

    async with worker.running(client), aiqueue.Responder().running(client):
        assert await client.request(Ask(key=SecretStr(WORD)), tenant="acme", timeout=25) == {"key": WORD}
    job = seen.get_nowait()
    assert job.message.key.get_secret_value() == WORD
    assert job.headers[headers.SECRET] == "/key"


class Knock(aiqueue.Message, kind="knock", family="agent.message"):
    door: int = 0
    key: SecretStr

    @pydantic.model_validator(mode="after")
    def fits(self) -> Knock:
        if self.door == 1:
            raise RuntimeError(f"door 1 does not open with {self.key.get_secret_value()}")
        return self


@pytest.mark.parametrize("envelope", [False, True])
@pytest.mark.parametrize(("door", "reason"), [("north", "invalid"), (1, "invalid"), (2, "attempts"), (3, "expired")])
async def test_secrets_of_plain_mail_are_masked_by_the_handlers_model(
    client: aiqueue.Client, cli: Cli, account: Account, eventually: Eventually, caplog: pytest.LogCaptureFixture,
    envelope: bool, door: Any, reason: str,
) -> None:  # fmt: skip
    agent = aiqueue.Agent("ada", tenant="acme")

    @agent.handle(Knock, retry=ONCE)
    async def knock(mail: Mail[Knock]) -> None:
        raise RuntimeError(f"no door opens with {mail.message.key.get_secret_value()}")

    data: dict[str, Any] = {"door": door, "key": WORD}
    plain_headers = {} if envelope else {"Aiq-Kind": "knock"}
    if envelope:
        data = {"schema_version": "1", "message_type": "knock", "data": data}
    if reason == "expired":
        plain_headers["Aiq-Deadline"] = "1"
    plain = await nats.connect(account.url, user=account.user, password=account.password)
    await plain.jetstream().publish("ai.agent.message.acme.ada", json.dumps(data).encode(), headers=plain_headers)
    await plain.close()
    async with agent.running(client):
        await eventually(lambda: find_all(client))
    letter = await only_letter(client)
    assert letter.reason == reason
    shown = (await cli("dead", "show", str(letter.seq))).output
    assert MASK in shown
    for text in (shown, letter.error, caplog.text):
        assert WORD not in text


async def test_a_bounce_repeats_no_secret_of_its_mail(
    client: aiqueue.Client, account: Account, eventually: Eventually
) -> None:
    agent = aiqueue.Agent("ada", tenant="acme")

    @agent.handle(Knock, retry=ONCE)
    async def knock(_: Mail[Knock]) -> None: ...

    plain = await nats.connect(account.url, user=account.user, password=account.password)
    plain_headers = {"Aiq-Kind": "knock", "source_agent_id": "bob"}
    body = json.dumps({"door": 1, "key": WORD}).encode()
    await plain.jetstream().publish("ai.agent.message.acme.ada", body, headers=plain_headers)
    await plain.close()

    async def bodies() -> list[bytes]:
        return [each.body async for each in client.inboxes.read("bob", tenant="acme")]

    async with agent.running(client):
        await eventually(bodies)
    (bounce,) = await bodies()
    assert b"door 1 does not open with" in bounce
    assert WORD.encode() not in bounce


async def test_mail_carries_its_secrets_and_the_inbox_is_shown_without_them(client: aiqueue.Client, cli: Cli) -> None:
    await client.inboxes.create("ada", tenant="acme")
    await client.inboxes.send(Note(key=SecretStr(WORD)), tenant="acme", to="ada")
    shown = await cli("inbox", "read", "ada", "--tenant", "acme", "--json")
    assert WORD not in shown.output
    assert MASK in shown.output
    agent, seen = aiqueue.Agent("ada", tenant="acme"), asyncio.Queue[str]()

    @agent.handle(Note, retry=ONCE)
    async def note(mail: Mail[Note]) -> None:
        seen.put_nowait(mail.message.key.get_secret_value())
        raise RuntimeError(f"no door opens with {WORD}")

    async with agent.running(client):
        assert await asyncio.wait_for(seen.get(), 25) == WORD
        async with asyncio.timeout(25):
            while not (letters := await find_all(client)):
                await asyncio.sleep(0.05)
    assert WORD not in letters[0].error
    assert WORD not in (await cli("dead", "show", str(letters[0].seq))).output
