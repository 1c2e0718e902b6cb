"""What is stored: the same acts for the former version, whose store is the fixture, and for this one, whose forms are
compared. Only the public face of aiqueue is used, and plain NATS where no library has its say.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from unittest import mock

import cbor2
import nats
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg

import aiqueue
from aiqueue.agent import Mail

HERE = Path(__file__).resolve().parent
STREAMS = HERE / "streams"
CENTURY = "36500d"
FAR_S = 365 * 86_400.0
LARGE = "What is asked here is long. " * 12_000  # above the claim check's 256 KiB
MANUAL, PAGE = b"how it is done\n" * 10_000, b"a page of it\n" * 500
LETTER_BYTES = 1_048_576 - 200  # of the server's max_payload
TENANTS = ("acme", "globex")
AGENTS = ("planner", "writer", "critic")
POLL_S = 0.02
FAMILIES = {
    "AI_AGENT_TASKS": "agent.tasks", "AI_GATEWAY_REQUESTS": "gateway.requests", "AI_RAG_INGEST": "rag.ingest",
    "UPGRADE_ACTS": "upgrade.acts", "UPGRADE_BRITTLE": "upgrade.brittle",
}  # fmt: skip
JOURNALS = {
    "ai.agent.results": "agent.tasks", "ai.gateway.responses": "gateway.requests", "ai.rag.status": "rag.ingest",
    "ai.upgrade.said": "upgrade.acts", "ai.upgrade.broken": "upgrade.brittle",
}  # fmt: skip
WAITING = 18  # jobs that a worker will run


class Task(aiqueue.Message, kind="upgrade.task"):
    do: str
    task_id: str | None = None
    text: str = ""


class Ask(aiqueue.Message, kind="gateway.request", family="gateway.requests"):
    prompt: str


class Report(aiqueue.Message, kind="report", family="rag.ingest"):
    source: aiqueue.Document


class Act(aiqueue.Message, kind="act", family="upgrade.acts"):
    do: str = "return"


class Kill(aiqueue.Message, kind="kill", family="upgrade.acts"):
    pass


class Brittle(aiqueue.Message, kind="brittle", family="upgrade.brittle"):
    pass


class Note(aiqueue.Message, kind="note"):
    text: str


async def kill(job: aiqueue.Job[Kill]) -> None:
    os._exit(9)


def worker(
    *families: str,
    tenants: tuple[str, ...] | None = None,
    say: Callable[[str], None] | None = None,
    seen: list[aiqueue.Job[Any]] | None = None,
) -> aiqueue.Worker:
    """A worker whose jobs end as their messages tell. `say` hears of a job that waits for its worker's end; without it
    none waits. `seen` gets all jobs.
    """
    looked: list[aiqueue.Job[Any]] = [] if seen is None else seen
    made = aiqueue.Worker(families=families or None, tenants=tenants, concurrency=16, name="former", drain_timeout=1)
    soon = aiqueue.Backoff(attempts=2, first=0.02, cap=0.02)

    @made.handle(Task, retry=soon, timeout=0.5)
    async def task(job: aiqueue.Job[Task]) -> Any:
        looked.append(job)
        match job.message.do:
            case "never":
                raise RuntimeError("it never works")
            case "reject":
                raise aiqueue.Reject("no such page")
            case "hang":
                await asyncio.sleep(60)
            case "huge":
                return "x" * 2_000_000
            case "twice" if job.attempt == 1:
                await job.chunk("in vain")
                raise ValueError("not yet")
            case "soon" | "later" | "far" if job.attempt == 1:
                raise aiqueue.Retry("come again", after={"soon": 4.5, "later": 8.0, "far": FAR_S}[job.message.do])
        await job.progress(0.5, "half of it")
        await job.chunk("one ")
        await job.chunk({"two": [2, "zwei"]})
        return {"text": job.message.text.upper(), "attempt": job.attempt, "raw": b"\x00\xff", "none": None}

    @made.handle(Ask)
    async def ask(job: aiqueue.Job[Ask]) -> dict[str, Any]:
        looked.append(job)
        return {"answer": job.message.prompt[:40].upper(), "length": len(job.message.prompt)}

    @made.handle(Report)
    async def report(job: aiqueue.Job[Report]) -> int:
        looked.append(job)
        return len(await job.open(job.message.source).read())

    @made.handle(Act, timeout=None)
    async def act(job: aiqueue.Job[Act]) -> str:
        looked.append(job)
        if job.message.do == "wait" and say is not None:
            await job.progress(0.25, "begun")
            say(job.id)
            await asyncio.sleep(60)
        return f"acted, attempt {job.attempt}"

    made.handle(Kill)(kill)

    @made.handle(Brittle)
    async def brittle(job: aiqueue.Job[Brittle]) -> None:
        looked.append(job)
        if say is not None:
            say(job.id)
            await asyncio.sleep(60)

    return made


# -- plain NATS


@contextlib.asynccontextmanager
async def plain(directory: Path) -> AsyncIterator[Nats]:
    """A plain connection to the server of a directory."""
    state = json.loads((directory / "state.json").read_text())
    connection = await nats.connect(
        f"nats://127.0.0.1:{state['port']}", user=state["user"], password=state["password"], inbox_prefix="_INBOX.plain"
    )
    try:
        yield connection
    finally:
        await connection.close()


async def api(connection: Nats, call: str, request: dict[str, Any] | None = None) -> dict[str, Any]:
    answer = await connection.request(f"$JS.API.{call}", json.dumps(request or {}).encode(), timeout=5)
    told: dict[str, Any] = json.loads(answer.data)
    assert "error" not in told, told
    return told


async def configs(connection: Nats) -> dict[str, dict[str, Any]]:
    """The streams as the server has them."""
    listed = (await api(connection, "STREAM.LIST"))["streams"] or []
    return {each["config"]["name"]: each["config"] for each in listed}


async def stored(connection: Nats, stream: str) -> list[tuple[str, dict[str, str], bytes]]:
    """All messages of a stream: subject, headers, body."""
    state = (await api(connection, f"STREAM.INFO.{stream}"))["state"]
    found = []
    for seq in range(max(1, state["first_seq"]), state["last_seq"] + 1):
        with contextlib.suppress(nats.js.errors.NotFoundError):
            message = await connection.jetstream().get_msg(stream, seq)
            found.append((message.subject or "", dict(message.headers or {}), message.data or b""))
    return found


async def until(fact: Callable[[], Any], within: float = 20.0) -> Any:
    """Wait for a fact, plain or async."""
    deadline = time.monotonic() + within
    while True:
        value = fact()
        value = await value if asyncio.iscoroutine(value) else value
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {within:g} s"
        await asyncio.sleep(POLL_S)


async def _publish(connection: Nats, subject: str, body: Any, headers: dict[str, str] | None = None) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    await connection.jetstream().publish(subject, data, headers=headers)


# -- the acts


async def ended(client: aiqueue.Client, connection: Nats, *, far: float) -> None:
    """Jobs that have come to their end, dead letters, parked ones, agents that have run. `far` is when the job that is
    delayed for long is due.
    """

    async def enqueue(do: str, unique: str, **options: Any) -> aiqueue.Handle:
        return await client.enqueue(Task(do=do, text=unique), unique=unique, **{"tenant": "acme", **options})

    manual = await client.documents.put(
        MANUAL, tenant="acme", name="manual.txt", content_type="text/plain", keep=CENTURY
    )
    taken_back = await enqueue("return", "task-taken-back")
    assert await taken_back.cancel()
    handles = [
        await enqueue("return", "task-done", headers={"traceparent": "00-1-2-03"}),
        await enqueue("twice", "task-twice", priority="high"),
        await enqueue("never", "task-never"),
        await enqueue("reject", "task-rejected", tenant="globex"),
        await enqueue("hang", "task-hung", priority="low"),
        await enqueue("huge", "task-huge"),
        await enqueue("return", "task-late", deadline=0.001),
        await client.enqueue(Ask(prompt="what is asked"), tenant="acme", unique="ask-done"),
        await client.enqueue(Ask(prompt=LARGE), tenant="acme", unique="ask-large"),
        await client.enqueue(Report(source=manual), tenant="acme", unique="report-done"),
        await client.enqueue(Act(), tenant="acme", unique="act-done"),
    ]
    await _publish(connection, "ai.agent.tasks.acme", b"\xff\x00 no body", {"task_id": "task-undecodable"})
    kind = {"Aiq-Kind": "upgrade.task"}
    await _publish(connection, "ai.agent.tasks.acme", {"text": 1}, {**kind, "task_id": "task-invalid"})
    filling = {"text": "x" * (LETTER_BYTES - 12)}  # so much that its dead letter takes two messages
    await _publish(connection, "ai.agent.tasks.acme", filling, {**kind, "task_id": "task-filling"})
    gone = {**kind, "task_id": "task-bodiless", "Aiq-Document": "0" * 64, "Aiq-Document-Size": "3"}
    await _publish(connection, "ai.agent.tasks.acme", b"", gone)
    for each in ("task-undecodable", "task-invalid", "task-filling", "task-bodiless"):
        handles.append(await until(lambda each=each: _job(client, each)))  # noqa: PERF401
    begun: list[str] = []
    async with worker(say=begun.append).running(client):
        for each in handles:
            with contextlib.suppress(aiqueue.JobFailed):
                await each.result(timeout=20)
        waits = await client.enqueue(Act(do="wait"), tenant="acme", unique="act-stopped")
        await until(lambda: begun)
        assert await waits.cancel()
    # as if their workers had died twice: the third delivery is a suspect's
    suspects = [await client.enqueue(Act(), tenant="acme", unique="act-suspect")]
    suspects.append(await client.enqueue(Kill(), tenant="acme", unique="act-killer"))
    for _ in range(2):
        request = json.dumps({"batch": 2, "expires": 5_000_000_000}).encode()
        answers = await connection.subscribe(connection.new_inbox())
        await connection.publish("$JS.API.CONSUMER.MSG.NEXT.UPGRADE_ACTS.acme-normal", request, reply=answers.subject)
        for _ in range(2):
            await (await answers.next_msg(timeout=5)).respond(b"-NAK")
        await answers.unsubscribe()
    async with worker("upgrade.acts").running(client):
        for each in suspects:
            with contextlib.suppress(aiqueue.JobFailed):
                await each.result(timeout=20)
    letter = [each async for each in client.dead.find() if each.job_id == "task-never"][-1]
    await client.dead.replay(letter)
    async with worker("agent.tasks").running(client):
        await until(lambda: _died(client, "task-never", 1))
    await enqueue("return", "task-far", at=far)
    parked = await enqueue("return", "task-taken-back-parked", delay=600)
    assert await parked.cancel()


async def _job(client: aiqueue.Client, job_id: str) -> aiqueue.Handle | None:
    with contextlib.suppress(aiqueue.errors.NotFound):
        return await client.job(job_id)
    return None


async def _died(client: aiqueue.Client, job_id: str, replays: int) -> bool:
    return any([each.job_id == job_id and each.replays == replays async for each in client.dead.find()])


async def mailed(client: aiqueue.Client, connection: Nats) -> None:
    """A roster, an agent that has run, and mail that waits."""
    for name in AGENTS:
        await client.inboxes.create(
            name, tenant="acme", kinds=["note"], capabilities=[f"{name}s"], description="one of three"
        )
    critic = aiqueue.Agent("critic", tenant="acme", capabilities=["critics"], description="one of three")
    answered = asyncio.Event()

    @critic.handle(Note)
    async def criticise(mail: Mail[Note]) -> None:
        await mail.reply(Note(text=f"not {mail.message.text}"))
        answered.set()

    async def send(text: str, to: str, **options: Any) -> Any:
        return await client.inboxes.send(Note(text=text), tenant="acme", to=to, **options)

    await send("good", "critic", sender="planner", conversation="on-style", unique="mail-asked")
    await send("too late", "critic", sender="planner", conversation="on-time", unique="mail-late", expires=0.01)
    late = time.time() + 0.02
    await until(lambda: time.time() > late)
    async with critic.running(client):
        await asyncio.wait_for(answered.wait(), 25)
        await until(lambda: _unread(client, "planner", 2))
    for number in (1, 2, 3):
        await send(f"line {number}", "writer", sender="planner", conversation="on-lines", unique=f"mail-line-{number}")
    await send("urgent", "writer", expires=CENTURY, unique="mail-urgent", extra={"traceparent": "00-1-2-03"})
    await client.inboxes.broadcast(Note(text="to all"), tenant="acme", sender="planner", conversation="on-all")
    told = {"Aiq-Job-Id": "mail-plain", "Aiq-Kind": "note", "target_agent_id": "writer", "source_agent_id": "planner"}
    await _publish(connection, "ai.agent.message.acme", {"text": "a plain line"}, told)


async def _unread(client: aiqueue.Client, agent: str, count: int) -> bool:
    return len([each async for each in client.inboxes.read(agent, tenant="acme")]) >= count


async def waiting(client: aiqueue.Client, connection: Nats) -> None:
    """Jobs that wait for a worker: half done, parked, due, or just queued."""
    enqueue = client.enqueue
    failed = {"soon": "task-retry-lane", "later": "task-retry-parked", "far": "task-retry-far"}
    for do, unique in failed.items():
        await enqueue(Task(do=do, text=unique), tenant="acme", unique=unique)
    async with worker("agent.tasks", tenants=("acme",)).running(client):
        for unique in failed.values():
            await until(lambda unique=unique: _failed_once(client, unique))
    await enqueue(Task(do="return", text="due"), tenant="acme", unique="task-due", at=time.time() + 0.3)
    await until(lambda: _has_due(connection))
    for tenant, priority in (("acme", "normal"), ("acme", "high"), ("acme", "low"), ("globex", "normal")):
        unique = f"task-{tenant}-{priority}"
        await enqueue(Task(do="return", text=unique), tenant=tenant, priority=priority, unique=unique)
    await enqueue(Task(do="return", text="in time"), tenant="acme", unique="task-in-time", deadline=CENTURY)
    await enqueue(Task(do="return", text="too late"), tenant="acme", unique="task-overtaken", deadline=0.01)
    await enqueue(Task(do="return", text="keyed", task_id="task-keyed"), tenant="acme")
    await enqueue(Ask(prompt="in a batch"), tenant="acme", priority="batch", unique="ask-batch")
    await enqueue(Ask(prompt=LARGE + "Again."), tenant="acme", unique="ask-large-queued")
    page = await client.documents.put(PAGE, tenant="acme", name="page.txt", content_type="text/plain", keep=1)
    await enqueue(Report(source=page), tenant="acme", unique="report-queued")
    keyed = {"do": "return", "task_id": "task-json"}
    await _publish(connection, "ai.agent.tasks.globex", keyed, {"Aiq-Kind": "upgrade.task"})
    envelope = {"schema_version": "1.0", "message_type": "llm_request", "data": {"prompt": "in an envelope"}}
    told = {"request_id": "ask-enveloped", "model": "small"}
    await _publish(connection, "ai.gateway.requests.globex.high", envelope, told)
    twice = {"prompt": "what was asked before"}
    await _publish(connection, "ai.gateway.requests.acme", twice, {"request_id": "ask-done"})
    await _publish(connection, "ai.gateway.requests.globex", cbor2.dumps({"prompt": "by nobody"}))


async def crowded(client: aiqueue.Client, trace: Trace) -> None:
    """A job that nobody here knows is handed back, as it was before, and keeps one that is due out of its lane."""

    class Strange(aiqueue.Message, kind="strange", family="upgrade.brittle"):
        pass

    await client.enqueue(Strange(), tenant="acme", unique="brittle-strange")
    late = await client.enqueue(Brittle(), tenant="acme", unique="brittle-late", at=time.time() + 0.05)

    async def hand_back(settlement: Any, delivery: Any, *_: Any) -> None:
        await settlement.return_to_queue(delivery, 5.0)

    with mock.patch("aiqueue.worker.settlement.Settlement._settle_unknown", hand_back):
        await _hand_back(client, trace)
    assert await late.cancel()


async def _hand_back(client: aiqueue.Client, trace: Trace) -> None:
    async with worker("upgrade.brittle").running(client):
        waited = "ai.parked.at.upgrade.brittle.{tenant}.normal.*.new"
        await until(lambda: "aiq.back.upgrade.brittle" in trace.headers and "Aiq-Waited" in trace.headers[waited])


async def overdue(client: aiqueue.Client) -> aiqueue.Handle:
    """A delayed job that is due soon: while no server runs."""
    message = Task(do="return", text="overdue")
    return await client.enqueue(message, tenant="acme", unique="task-overdue", at=time.time() + 2.5)


async def _failed_once(client: aiqueue.Client, job_id: str) -> bool:
    status = await (await client.job(job_id)).status()
    return status.state == "retrying"


async def _has_due(connection: Nats) -> bool:
    request = {"subjects_filter": "ai.parked.due.>"}
    return bool((await api(connection, "STREAM.INFO.AI_PARKED", request))["state"].get("subjects"))


# -- what was said


class Trace:
    """What travels, as forms: subjects with `*` for what differs from run to run, and the names of the headers."""

    def __init__(self) -> None:
        self.headers: dict[str, set[str]] = defaultdict(set)
        self.msg_ids: set[str] = set()
        self.events: dict[str, set[str]] = defaultdict(set)
        self.keys: dict[str, set[str]] = defaultdict(set)
        self.reasons: set[str] = set()

    async def hear(self, connection: Nats) -> None:
        async def heed(message: Msg) -> None:
            self.add(message.subject, dict(message.headers or {}), message.data)

        for subject in ("ai.>", "aiq.>", "$KV.>", "$O.>"):
            await connection.subscribe(subject, cb=heed)
        await connection.flush()

    def add(self, subject: str, told: dict[str, str], body: bytes) -> None:
        shape = shape_of(subject)
        self.headers[shape] |= set(told)
        if "Nats-Msg-Id" in told and not subject.startswith("aiq.live."):
            self.msg_ids.add(f"{'.'.join(shape.split('.')[:3])}: {id_shape(told['Nats-Msg-Id'])}")
        if event := told.get("Aiq-Event"):
            value = cbor2.loads(body) if body else None
            own = event not in ("result", "chunk") and isinstance(value, dict)
            self.events[event] |= set(value) if own else {type(value).__name__}
        elif body[:1] == b"{" and subject.startswith("$"):
            value = json.loads(body)
            self.keys[shape] |= set(value)
        elif shape.startswith(("aiq.cancel", "aiq.back")):
            self.keys[shape].add(f"{len(body.split())} words")
        elif told.get("Aiq-Kind") == "agent.bounce":
            self.keys["agent.bounce"] |= set(cbor2.loads(body))
        if "Aiq-Reason" in told:
            self.reasons.add(told["Aiq-Reason"])
        if "Aiq-History" in told:
            for attempt in json.loads(told["Aiq-History"]):
                self.keys["Aiq-History"] |= set(attempt)

    def plain(self) -> dict[str, Any]:
        return {
            "headers": {shape: sorted(names) for shape, names in sorted(self.headers.items())},
            "msg_ids": sorted(self.msg_ids),
            "events": {event: sorted(keys) for event, keys in sorted(self.events.items())},
            "keys": {where: sorted(keys) for where, keys in sorted(self.keys.items())},
            "reasons": sorted(self.reasons),
        }


def shape_of(subject: str) -> str:
    return ".".join(_word(each) for each in subject.split("."))


def id_shape(msg_id: str) -> str:
    def part(text: str) -> str:
        hop = re.fullmatch(r"(dead|replay|park|due|routed|lane|moved)-.*", text)
        if hop or re.fullmatch(r"[0-9a-f]{8}", text):  # a writer's own word
            return f"{hop[1]}-*" if hop else "*"
        return "0" if text.isdigit() else shape_of(text)

    return "/".join(part(each) for each in msg_id.split("/"))


def _word(word: str) -> str:
    if word in TENANTS:
        return "{tenant}"
    if word in AGENTS:
        return "{agent}"
    return "*" if "-" in word or len(word) >= 16 else word


async def forms(directory: Path, *, streams: Path = STREAMS) -> dict[str, Any]:
    """The forms of what this version of the library sends and stores for the acts, on a server of its own."""
    async with aiqueue.connect(directory=directory, streams=streams) as client, plain(directory) as connection:
        trace = Trace()
        await trace.hear(connection)
        await asyncio.gather(ended(client, connection, far=time.time() + 300 * 86_400), mailed(client, connection))
        await crowded(client, trace)
        await waiting(client, connection)
        await overdue(client)
        for stream in await configs(connection):
            for message in await stored(connection, stream):
                trace.add(*message)
        return trace.plain()


# -- what is read


def plainly(value: Any) -> Any:
    """As it comes back from a JSON file."""
    return json.loads(json.dumps(value, default=lambda raw: {"bytes": raw.hex()}))


def short(text: str) -> str:
    return text if len(text) < 200 else f"{len(text)} characters, {hashlib.sha256(text.encode()).hexdigest()}"


def settings(config: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """Of a stream's configuration what another one has too: a later server may add to it."""
    return {key: config.get(key) for key in like if key != "metadata"}


async def shapes(connection: Nats, stream: str) -> dict[str, Any]:
    """The forms of what a stream holds: how many messages of each, and the headers they have. Marks of what was taken
    out of a bucket go by themselves.
    """
    counts: dict[str, int] = defaultdict(int)
    names: dict[str, set[str]] = defaultdict(set)
    for subject, told, _ in await stored(connection, stream):
        if "KV-Operation" not in told:
            counts[shape_of(subject)] += 1
            names[shape_of(subject)] |= set(told)
    return {shape: [counts[shape], *sorted(names[shape])] for shape in sorted(counts)}


async def journal(connection: Nats, job_id: str) -> list[Any]:
    """What a journal holds, without what another run of the same job need not say in the same words."""
    said = []
    for subject, told, body in await stored(connection, "AI_RESULTS"):
        if subject.endswith(f".{job_id}"):
            data = cbor2.loads(body)
            more = data if isinstance(data, dict) else {}
            failed = [[each["attempt"], each["at"], each["error"]] for each in more.get("history") or ()]
            numbers = [told[name] for name in ("Aiq-Run", "Aiq-Epoch", "Aiq-Attempt")]
            said.append([told["Aiq-Event"], *numbers, more.get("trials"), failed])
    return said


async def names(client: aiqueue.Client, connection: Nats) -> dict[str, tuple[str, str]]:
    """The ids of all jobs that have left a trace, with family and tenant."""
    found: dict[str, tuple[str, str]] = {}
    for subject, _, _ in await stored(connection, "AI_RESULTS"):
        root, tenant, job_id = subject.rsplit(".", 2)
        found[job_id] = JOURNALS[root], tenant
    for subject, _, _ in await stored(connection, "AI_PARKED"):
        parts = subject.split(".")
        found[parts[7]] = f"{parts[3]}.{parts[4]}", parts[5]
    for stream, family in FAMILIES.items():
        for subject, told, _ in await stored(connection, stream):
            job_id = told.get("Aiq-Job-Id") or told.get("request_id")
            if job_id:
                found[job_id] = family, subject.split(".")[3]
    return found


async def read_job(client: aiqueue.Client, job_id: str, family: str, tenant: str) -> dict[str, Any]:
    """What the library tells of a job, without what depends on the moment."""
    handle = await client.job(job_id, family=family, tenant=tenant)
    told = await handle.status()
    steps = [
        [
            each.event,
            None if each.event in ("delivered", "due") else each.at,
            each.attempt,
            each.run,
            each.reason,
            each.worker,
        ]
        for each in told.timeline
    ]
    entries = [
        [each.event, each.seq, each.run, each.epoch, each.attempt, each.time, each.data] for each in told.entries
    ]
    plain = {
        "family": family, "tenant": tenant, "state": told.state, "priority": told.priority, "kind": told.kind,
        "attempt": told.attempt, "enqueued_at": told.enqueued_at, "next_attempt_at": told.next_attempt_at,
        "result": told.result, "failure": told.failure and dict(told.failure), "dead_seq": told.dead_seq,
        "due": handle.due, "timeline": steps, "entries": entries,
    }  # fmt: skip
    return dict(plainly(plain))


async def read_stream(client: aiqueue.Client, job_id: str, family: str, tenant: str) -> list[Any]:
    handle = await client.job(job_id, family=family, tenant=tenant)
    async with contextlib.aclosing(handle.stream(timeout=5)) as items:
        return list(plainly([[each.event, each.data, each.attempt, each.run, each.time] async for each in items]))


async def read_letters(client: aiqueue.Client) -> list[dict[str, Any]]:
    letters = [
        {
            "seq": each.seq, "job_id": each.job_id, "kind": each.kind, "lane": [*each.lane[:3]], "reason": each.reason,
            "error": each.error, "attempt": each.attempt, "worker": each.worker, "enqueued_at": each.enqueued_at,
            "replays": each.replays, "history": each.history, "headers": dict(each.headers),
            "body": await _body(client, each),
        }
        async for each in client.dead.find()
    ]  # fmt: skip
    return list(plainly(letters))


async def _body(client: aiqueue.Client, letter: Any) -> str | None:
    try:
        return short((await client.dead.body(letter)).hex())
    except aiqueue.errors.NotFound:
        return None


async def read_mail(client: aiqueue.Client) -> dict[str, Any]:
    mail = {}
    for agent in AGENTS:
        unread = client.inboxes.read(agent, tenant="acme")
        mail[agent] = [[each.seq, each.stored_at, *each.envelope, each.body.hex()] async for each in unread]
    stats = [[*each[:2], each.card and each.card.plain(), *each[3:]] for each in await client.inboxes.stats("acme")]
    return dict(plainly({"mail": mail, "stats": stats}))


async def read_documents(client: aiqueue.Client) -> list[dict[str, Any]]:
    found = [
        {**each.document.model_dump(), "touched_at": each.touched_at, "jobs": each.jobs, "puts": each.puts}
        async for each in client.documents.find()
    ]
    return list(plainly(sorted(found, key=lambda each: str(each["sha256"]))))


async def run_all(client: aiqueue.Client, connection: Nats, within: float = 20.0) -> dict[str, Any]:
    """Have a worker run all that waits. What each job said in the end, by its id, and as what its handler got it."""
    seen: list[aiqueue.Job[Any]] = []
    ran = {}
    async with worker(seen=seen).running(client):
        await until(lambda: len({each.id for each in seen}) >= WAITING, within)
        for job in seen:
            handle = await client.job(job.id, family=job.family, tenant=job.tenant)
            result = await handle.result(timeout=within)
            forwarded = "Aiq-Parked" in job.headers and "Aiq-Enqueued" not in job.headers  # in its lane since just now
            message = {name: short(value) if isinstance(value, str) else value for name, value in job.message}
            ran[job.id] = {
                "family": job.family, "tenant": job.tenant, "priority": job.priority, "kind": job.kind,
                "attempt": job.attempt, "deadline": job.deadline, "enqueued_at": None if forwarded else job.enqueued_at,
                "message": {name: dict(value) if name == "source" else value for name, value in message.items()},
                "headers": dict(job.headers), "result": result, "journal": await journal(connection, job.id),
            }  # fmt: skip
    return dict(plainly(ran))
