"""Scenarios of those who know no aiqueue, and of those who mean harm: plain NATS clients."""

from __future__ import annotations

import asyncio
import importlib
import json
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import nats
import nats.errors
from nats.aio.client import Client as Plain

import aiqueue
from aiqueue.gateway import GatewayRequest

from ..scenarios import Finding
from .bench import FAMILY, Asked, Ground, Setting, ground

GUIDE = "tests.guide.clients"  # where NATS's client for Node.js is installed
VICTIM, EVIL = "victim", "evil"
SECRET = "the-secret-of-the-victim"
MEGABYTES = 20
DEPTH = 100_000
SETTLED_S = 3.0
STORM_S = 10.0


class Trap:
    """A host that nobody may call. It counts its connections."""

    async def __aenter__(self) -> Self:
        self.visits = 0
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.visits += 1
        writer.close()


class Attack(NamedTuple):
    """A message of a plain publisher of the tenant EVIL. `body`: bytes are sent as they are. `harmless`: it may be
    answered, for the harm would be in what it sees.
    """

    name: str
    body: Any
    headers: Mapping[str, str] = {}
    harmless: bool = False


class Large(aiqueue.Message[Any], kind="gateway.request", family=FAMILY):
    """A request that the sender does not check."""

    model: str
    messages: list[dict[str, Any]]


HELLO = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}


def attacks(trap: str) -> list[Attack]:
    """All of them. None may reach `trap`."""
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"{trap}/x.png"}}]}]
    file = [{"role": "user", "content": [{"type": "file", "file": {"file_id": f"{trap}/f"}}]}]
    tool = [{"type": "mcp", "server_label": "x", "server_url": trap}]
    refused: dict[str, Any] = {
        "api_base": trap, "base_url": trap, "api_key": "sk-evil", "api_version": trap, "extra_headers": {"Host": trap},
        "extra_body": {"base_url": trap}, "custom_llm_provider": "openai", "mock_response": "free of charge",
        "fallbacks": [{"model": "openai/x", "api_base": trap}], "timeout": 1e9, "proxy": trap, "organization": "org",
        "model_list": [{"model_name": "m", "litellm_params": {"api_base": trap}}], "num_retries": 1_000,
        "vertex_location": trap, "aws_bedrock_runtime_endpoint": trap, "litellm_params": {"api_base": trap},
    }  # fmt: skip
    return [
        *(Attack(f"option {name}", {**HELLO, name: value}) for name, value in refused.items()),
        Attack("api_base among options", {**HELLO, "options": {"api_base": trap}}),
        Attack("api_base among parameters", {"prompt": "hello", "model": "m", "parameters": {"api_base": trap}}),
        Attack("an unknown option", {**HELLO, "reasoning_url": trap}),
        Attack("an image elsewhere", {**HELLO, "messages": image}),
        Attack("a file elsewhere", {**HELLO, "messages": file}),
        Attack("a tool elsewhere", {**HELLO, "tools": tool}),
        Attack("a model elsewhere", {**HELLO, "model": f"openai/{trap}"}),
        Attack("a loop", {**HELLO, "model": "aiqueue/m"}),
        Attack("header and body of two models", HELLO, {"model": "n"}),
        Attack("another tenant's id", {**HELLO, "request_id": "r-victim"}, harmless=True),
        Attack("another tenant's name", {**HELLO, "tenant_id": VICTIM}),
        Attack("deep JSON", b'{"model": "m", "messages": ' + b"[" * DEPTH + b"]" * DEPTH + b"}"),
        Attack("no JSON", b"\x00\xff{"),
        Attack("a negative price", {**HELLO, "max_tokens": -5}),
    ]


async def hostile(asked: Asked) -> list[Finding]:
    """30 hostile requests of a plain publisher: they call no foreign host, and see no other's word and no key."""
    setting = Setting(models=("m", "n"), budgets=['tenant = "*"\nmonth = 10'])
    async with Trap() as trap, ground(asked, setting) as here, aiqueue.Responder().running(here.client):
        victim = GatewayRequest(
            model="m", messages=[{"role": "user", "content": SECRET}], request_id="r-victim", max_tokens=5
        )
        await (await here.client.enqueue(victim, tenant=VICTIM)).result(timeout=30)
        before = len(await here.calls())
        sent = attacks(trap.url)
        harmless = {f"e-{n}" for n, each in enumerate(sent) if each.harmless}
        plain = await nats.connect(here.account.url, user=here.account.user, password=here.account.password)
        told: dict[str, str | dict[str, Any]] = {}
        for number, each in enumerate(sent):
            told[each.name] = await _publish(plain, f"e-{number}", each)
        told[f"{MEGABYTES} MB"] = await _publish_large(here, plain)
        texts = [each if isinstance(each, str) else each.get("cause", "") for each in told.values()]
        stolen = [
            await _ask(plain, EVIL, {"request_id": "r-victim"}),
            await _ask(plain, "*", {"request_id": "r-victim"}),
        ]
        await plain.close()
        left = await here.left()
        calls = (await here.calls())[before:]
        await asyncio.sleep(STORM_S / 2)
        later = (await here.calls())[before:]
        seen = await _seen(here)
        logs = (here.directory / "workers.log").read_text(errors="replace")
        alive = sum(each.code is None for each in here.workers.alive)
        answered = [name for name, each in told.items() if isinstance(each, dict) and "error" not in each]
        for name, reply in told.items():
            asked.say(f"  {name}: {reply.get('cause', 'answered') if isinstance(reply, dict) else reply}"[:120])
        evil = [each for subject, each in seen if f".{EVIL}" in subject]
        evil += [json.dumps(each).encode() for each in stolen]
        lines = [*logs.splitlines(), *map(str, told.values())]
        overheard, keys = sum(SECRET.encode() in each for each in evil), sum(here.key in each for each in lines)
        return [
            Finding("hostile requests", len(told), at_least=30),
            Finding("visits of foreign hosts", trap.visits, at_most=0),
            Finding("of them answered by a model", len(answered), at_most=len(harmless)),
            Finding("calls of the provider for them", len(calls), at_most=len(harmless)),
            Finding("calls that came later", len(later) - len(calls), at_most=0),
            Finding("messages of theirs with another tenant's words", overheard, at_most=0),
            Finding("stored messages with the key", sum(here.key.encode() in each for _, each in seen), at_most=0),
            Finding("lines of logs and errors with the key", keys, at_most=0),
            Finding("refusals of more than one line", sum("\n" in each for each in texts), at_most=0),
            Finding("jobs left", left, at_most=0),
            Finding("workers that ended", asked.workers - alive, at_most=0),
        ]


async def _publish(plain: Plain, request_id: str, attack: Attack) -> str | dict[str, Any]:
    """Publish as the guide says, and ask for the answer: see `_ask`."""
    given = attack.body
    if isinstance(given, dict):
        request_id = given.get("request_id", request_id)
    body = given if isinstance(given, bytes) else json.dumps(given).encode()
    headers = {"request_id": request_id, "priority": "normal", **attack.headers}
    await plain.jetstream().publish(f"ai.gateway.requests.{EVIL}", body, headers=headers)
    return await _ask(plain, EVIL, {"request_id": request_id})


async def _ask(plain: Plain, tenant: str, request: dict[str, Any]) -> str | dict[str, Any]:
    """Ask for an answer by request/reply: the reply, which may have an `error`, or why there is none."""
    try:
        reply = await plain.request(f"ai.gateway.responses.{tenant}", json.dumps(request).encode(), timeout=SETTLED_S)
    except (nats.errors.Error, TimeoutError) as error:
        return f"no answer: {error!r}"
    found: dict[str, Any] = json.loads(reply.data)
    return found


async def _publish_large(here: Ground, plain: Plain) -> str:
    """20 MB: a plain client cannot send them, and a job that has them in a document is refused."""
    content = "x" * (MEGABYTES * 1_000_000)
    body = {**HELLO, "messages": [{"role": "user", "content": content}]}
    try:
        await plain.publish(f"ai.gateway.requests.{EVIL}", json.dumps(body).encode())
    except nats.errors.Error as error:
        refusal = repr(error)
    else:
        return "20 MB were sent"

    try:
        handle = await here.client.enqueue(
            Large(model="m", messages=[{"role": "user", "content": content}]), tenant=EVIL
        )
        await handle.result(timeout=20)
    except aiqueue.AIQueueError as error:
        return f"{refusal}; as a document: {error}"
    raise RuntimeError("a request of 20 MB was answered")


async def _seen(here: Ground) -> list[tuple[str, bytes]]:
    """All that is stored: subjects, and bodies with their headers."""
    connection, found = here.client.connection, list[tuple[str, bytes]]()
    for name in (await connection.api("STREAM.NAMES"))["streams"]:
        async for stored in connection.read(name, ">"):
            found.append((stored.subject, stored.data + repr(stored.headers).encode()))
    return found


async def node(asked: Asked) -> list[Finding]:
    """A plain client of Node.js publishes requests as the guide says, and asks for the answers by request/reply."""
    clients: Any = importlib.import_module(GUIDE)
    if problem := clients.node_problem():
        raise RuntimeError(problem)
    async with ground(asked, Setting()) as here, aiqueue.Responder().running(here.client):
        client = clients.node(here.account, here.directory / "node.log")
        answers, waits = [], []
        try:
            for number in range(20):
                body = json.dumps({
                    "request_id": f"n-{number}", "prompt": f"say {number}", "model": "m", "tenant_id": "a",
                    "parameters": {"max_tokens": 5, "temperature": 0.1}, "timestamp": "2026-01-01T00:00:00Z",
                })  # fmt: skip
                begun = time.monotonic()
                names = {"tenant_id": "a", "request_id": f"n-{number}", "model": "m", "encoded_request": body}
                await client.run("Publishing LLM request", **names)
                reply = await client.run("Requesting response", tenant_id="a", encoded_request=body)
                waits.append((time.monotonic() - begun) * 1000)
                answers.append(reply["data"])
        finally:
            client.end()
        asked.say(f"  an answer: {json.dumps(answers[0])[:300]}")
        calls = await here.calls()
        good = [
            each for n, each in enumerate(answers)
            if each.get("request_id") == f"n-{n}" and str(n) in each.get("response", "") and each.get("tokens", 0) > 0
        ]  # fmt: skip
        return [
            Finding("requests answered in the guide's shape", len(good), at_least=len(answers)),
            Finding("calls of the provider", len(calls), at_least=len(answers), at_most=len(answers)),
            Finding("median of publish to answer, ms", sorted(waits)[len(waits) // 2]),
        ]
