"""What the former version (commit eb423bd) has stored is read, run and replayed by this one.

The store is a fixture, made by ``store.py`` with that commit; what is expected is what that commit itself reads in it,
and makes of it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import sys
import tarfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import cbor2
import pytest

import aiqueue
from aiqueue import codec
from aiqueue.agent import Bounce, Mail
from aiqueue.journal import Checkpoints
from aiqueue.subjects import ParentRun
from aiqueue.topology import provision
from aiqueue.worker.step_documents import StepDocuments

from .. import keyed
from ..support import Account, Eventually, processes, wait_until
from . import acts

FIXTURE = acts.HERE / "eb423bd.tar.gz"
EXPECTED = json.loads((acts.HERE / "expected.json").read_text())
JOBS, RAN = EXPECTED["jobs"], EXPECTED["ran"]
AGELESS = {"AI_AGENT_MESSAGE", "AI_DEAD", "AI_RESULTS"}  # in the fixture, so that it lasts


def unpack(place: Path) -> Path:
    with tarfile.open(FIXTURE) as tar:
        tar.extractall(place, filter="data")
    return place / ".aiqueue"


def of_state(*states: str) -> list[str]:
    found = sorted(job_id for job_id, told in JOBS.items() if told["state"] in states)
    assert found
    return found


@pytest.fixture(scope="module")
def places() -> Iterator[list[Path]]:
    """Where servers run; no test leaves one there, and what each takes to end is waited for once."""
    found: list[Path] = []
    yield found
    wait_until(lambda: not any(processes(str(place)) for place in found))


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory, places: list[Path]) -> Iterator[Path]:
    """The former version's store on this version's server, for tests that only look."""
    places.append(tmp_path_factory.mktemp("untouched"))
    directory = unpack(places[-1])
    with aiqueue.connect_sync(directory=directory, streams=acts.STREAMS):
        yield directory


@pytest.fixture
async def reader(untouched: Path) -> AsyncIterator[aiqueue.Client]:
    async with aiqueue.connect(directory=untouched, streams=acts.STREAMS) as client:
        yield client


@pytest.fixture
def directory(tmp_path: Path, places: list[Path]) -> Path:
    """A copy for one test."""
    places.append(tmp_path)
    return unpack(tmp_path)


@pytest.fixture
async def client(directory: Path) -> AsyncIterator[aiqueue.Client]:
    async with aiqueue.connect(directory=directory, streams=acts.STREAMS) as client:
        yield client


# -- read


@pytest.mark.parametrize("job_id", of_state("done"))
async def test_a_result_of_the_former_version_is_returned(reader: aiqueue.Client, job_id: str) -> None:
    told = JOBS[job_id]
    handle = await reader.job(job_id, family=told["family"], tenant=told["tenant"])
    assert acts.plainly(await handle.result(timeout=25)) == told["result"]


@pytest.mark.parametrize("job_id", of_state("failed", "cancelled"))
async def test_a_failure_of_the_former_version_is_raised(reader: aiqueue.Client, job_id: str) -> None:
    told = JOBS[job_id]
    handle = await reader.job(job_id, family=told["family"], tenant=told["tenant"])
    with pytest.raises(aiqueue.JobFailed) as raised:
        await handle.result(timeout=25)
    last = told["entries"][-1][6]
    assert (raised.value.reason, raised.value.error) == (last["reason"], last["error"])


async def test_outcomes_of_the_former_version_are_listed_without_their_kinds(reader: aiqueue.Client) -> None:
    listed = {each.job_id: each for each in (await reader.jobs.outcomes(limit=1_000)).outcomes}
    for job_id in of_state("done", "failed", "cancelled"):
        assert (listed[job_id].state, listed[job_id].kind) == (JOBS[job_id]["state"], ""), job_id


async def test_jobs_of_the_former_version_are_told_as_it_tells_them(
    reader: aiqueue.Client, eventually: Eventually
) -> None:
    for job_id, told in JOBS.items():

        async def same(job_id: str = job_id, told: dict[str, Any] = told) -> None:
            assert await acts.read_job(reader, job_id, told["family"], told["tenant"]) == told

        await eventually(same)  # the time of some has come while no server ran


async def test_a_journal_of_the_former_version_is_followed_to_its_end(reader: aiqueue.Client) -> None:
    for job_id, items in EXPECTED["streams"].items():
        told = JOBS[job_id]
        read = await acts.read_stream(reader, job_id, told["family"], told["tenant"])
        added = [item for item in read if item[0] == "restart" and item not in items]  # after a lone retry: new here
        assert [item for item in read if item not in added] == items, job_id
        assert len(added) <= 1
    assert [item[0] for item in EXPECTED["streams"]["task-twice"]] == [
        "chunk", "retry", "restart", "started", "progress", "chunk", "chunk", "result",
    ]  # fmt: skip


async def test_dead_letters_of_the_former_version_are_listed_and_shown(reader: aiqueue.Client) -> None:
    letters = await acts.read_letters(reader)
    assert letters == EXPECTED["letters"]
    for each in letters:
        shown = await reader.dead.get(each["seq"])
        assert (shown.job_id, shown.reason, shown.history) == (each["job_id"], each["reason"], each["history"])


async def test_mail_and_cards_of_the_former_version_are_listed(reader: aiqueue.Client) -> None:
    assert await acts.read_mail(reader) == EXPECTED["mail"]


async def test_documents_of_the_former_version_are_read_and_held(reader: aiqueue.Client) -> None:
    documents = await acts.read_documents(reader)
    assert documents == EXPECTED["documents"]
    by_name = {each["name"]: each["sha256"] for each in documents if each["name"]}
    for name, body in {"manual.txt": acts.MANUAL, "page.txt": acts.PAGE}.items():
        document = await reader.documents.get(by_name[name], tenant="acme")
        assert await reader.documents.open(document).read() == body


# -- run


async def test_what_waits_in_the_store_of_the_former_version_runs_as_it_does_there(
    client: aiqueue.Client, directory: Path, eventually: Eventually
) -> None:
    async with acts.plain(directory) as connection:
        ran = await acts.run_all(client, connection)
    for job_id, told in RAN.items():
        assert ran[job_id] == told
    assert "ask-done" not in ran  # a second message of an id that another one has claimed
    assert [ran[each]["attempt"] for each in ("task-retry-lane", "task-retry-parked", "act-killed")] == [2, 2, 1]
    for job_id, before in EXPECTED["half_done"].items():
        journal = ran[job_id]["journal"]
        assert journal[: len(before)] == before
        assert journal[-1][0] == "result"
    assert [entry[4] for entry in ran["act-tried"]["journal"] if entry[0] == "trial"] == [1, 2]

    async def settled() -> None:
        late = [each async for each in client.dead.find() if each.job_id == "task-overtaken"]
        assert [each.reason for each in late] == ["deadline"]
        assert not [each for each in await acts.read_documents(client) if each["jobs"]]  # nobody holds them any more

    await eventually(settled)
    for job_id in ("task-far", "task-retry-far"):
        assert await acts.read_job(client, job_id, "agent.tasks", "acme") == JOBS[job_id]


async def test_dead_letters_of_the_former_version_are_replayed_and_run(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    wanted = {"task-late": 0, "task-never": 1, "task-rejected": 0}
    seen: list[aiqueue.Job[Any]] = []
    again = aiqueue.Worker(name="again")

    @again.handle(acts.Task)
    async def heal(job: aiqueue.Job[acts.Task]) -> str:
        seen.append(job)
        return "healed"

    letters = [each async for each in client.dead.find() if each.job_id in wanted]
    assert {each.job_id: each.replays for each in letters} == wanted
    for each in letters:
        await client.dead.replay(each)
    assert not [each async for each in client.dead.find() if each.job_id in wanted]
    async with again.running(client):
        await eventually(lambda: wanted.keys() <= {job.id for job in seen})
        for each in letters:
            handle = await client.job(each.job_id)
            assert await handle.result(timeout=25) == "healed"
    enqueued = {each.job_id: each.enqueued_at for each in letters}
    assert {job.id: job.first_stored for job in seen if job.id in wanted} == {
        job_id: (pytest.approx(enqueued[job_id], abs=1e-6), 0) for job_id in wanted
    }
    told = {job.id: (job.message.do, job.attempt, job.headers["Aiq-Replay"]) for job in seen if job.id in wanted}
    assert told == {
        "task-late": ("return", 1, "1"),
        "task-never": ("never", 1, "2"),
        "task-rejected": ("reject", 1, "1"),
    }


async def test_a_waiting_job_of_the_former_version_is_taken_back(client: aiqueue.Client) -> None:
    for job_id in ("task-acme-normal", "task-far", "task-retry-far", "task-due"):
        handle = await client.job(job_id)
        assert await handle.cancel()
        with pytest.raises(aiqueue.JobFailed, match="cancelled"):
            await handle.result(timeout=25)


async def test_mail_of_the_former_version_is_handled_in_its_order(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    writer, planner = aiqueue.Agent("writer", tenant="acme"), aiqueue.Agent("planner", tenant="acme")
    seen: list[Mail[acts.Note]] = []
    bounced: list[Mail[Bounce]] = []

    @writer.handle(acts.Note)
    async def write(mail: Mail[acts.Note]) -> None:
        seen.append(mail)

    @planner.handle(acts.Note)
    async def plan(mail: Mail[acts.Note]) -> None:
        seen.append(mail)

    @planner.handle(Bounce)
    async def regret(mail: Mail[Bounce]) -> None:
        bounced.append(mail)

    async with writer.running(client), planner.running(client):
        await eventually(lambda: len(seen) == 7 and bounced)
    told = {mail.id: mail for mail in seen}
    lines = [mail.message.text for mail in seen if mail.conversation == "on-lines"]
    assert lines == ["line 1", "line 2", "line 3"]
    assert (told["mail-plain"].message.text, told["mail-plain"].sender) == ("a plain line", "planner")
    assert told["mail-urgent"].headers["traceparent"] == "00-1-2-03"
    (answer,) = (mail for mail in seen if mail.to == "planner")
    assert (answer.message.text, answer.correlation, answer.sender) == ("not good", "mail-asked", "critic")
    assert (bounced[0].message.mail_id, bounced[0].message.reason) == ("mail-late", "expired")


# -- declared and stored


def test_the_server_of_the_former_version_is_taken_up_with_its_credentials(untouched: Path) -> None:
    with tarfile.open(FIXTURE) as tar:
        packed = tar.extractfile(".aiqueue/state.json")
        assert packed is not None
        former = json.load(packed)
    state = json.loads((untouched / "state.json").read_text())
    assert state.keys() == former.keys()
    assert (state["user"], state["password"]) == (former["user"], former["password"])


async def test_streams_of_the_former_version_are_as_this_one_declares_them(
    client: aiqueue.Client, directory: Path
) -> None:
    """Except that requests for a model that is limited get lanes of their own, and that there are batches, which have a
    journal and may be stranded: `apply` adds the subjects.
    """
    declared = json.loads(json.dumps(EXPECTED["declared"]))
    keyed_lanes = [f"ai.gateway.requests.*.{each}.*" for each in ("high", "normal", "low", "batch")]
    declared["AI_GATEWAY_REQUESTS"]["subjects"] += keyed_lanes
    declared["AI_RESULTS"]["subjects"] += ["ai.gateway.batch-results.*.*"]
    advisories = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES"
    stranded = declared["AI_STRANDED"]["subjects"]
    stranded.insert(stranded.index(f"{advisories}.AI_GATEWAY_REQUESTS.*"), f"{advisories}.AI_GATEWAY_BATCHES.*")
    async with acts.plain(directory) as connection:

        async def changed() -> set[str]:
            found = await acts.configs(connection)
            assert found.keys() == declared.keys() | {
                "AI_AUDIT",
                "AI_METRICS",
                "AI_CHECKPOINTS",
                "AI_GATEWAY_BATCHES",
                "AI_GATEWAY_RECENT",
                "AI_GATEWAY_USAGE",
                "AI_RAG_STORES",
                "AI_TICKS",
                "KV_AI_API_KEYS",
                "KV_AI_BATCHES",
                "KV_AI_SCHEDULES",
                "KV_AI_LIMITS",
            }
            return {
                name for name, like in declared.items()
                if acts.settings(found[name], like) != acts.settings(like, like)
            }  # fmt: skip

        new = {"AI_GATEWAY_REQUESTS", "AI_STRANDED"}
        assert await changed() == AGELESS | new  # `apply` at the start would have deleted messages
        for name in AGELESS:
            await acts.api(connection, f"STREAM.UPDATE.{name}", declared[name])
        for verb, code in (("plan", 3), ("apply", 0), ("plan", 0)):  # plan ends with 3 where anything differs
            options = ("--directory", str(directory), "--streams", str(acts.STREAMS))
            command = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "aiqueue", verb, *options, stdout=asyncio.subprocess.PIPE
            )
            said, _ = await command.communicate()
            assert command.returncode == code, said.decode()
            assert await changed() == (new if code else set())
            assert ("3 changes:" in said.decode()) == bool(code)  # and the ack_wait of documents, on their lane


async def test_every_message_of_the_former_version_is_there_with_its_headers(
    untouched: Path, eventually: Eventually
) -> None:
    async with acts.plain(untouched) as connection:

        async def same() -> None:
            for stream, messages in EXPECTED["stored"].items():
                assert await acts.shapes(connection, stream) == messages, stream

        await eventually(same)


async def test_this_version_stores_and_sends_in_the_forms_of_the_former_one(tmp_path: Path, places: list[Path]) -> None:
    places.append(tmp_path)
    forms = await acts.forms(tmp_path / ".aiqueue")
    for what in ("headers", "keys"):
        assert forms[what].pop("$KV.AI_PRESENCE.worker.former"), "workers' records are new"
    forms["msg_ids"].remove("$KV.AI_PRESENCE.worker: *")
    for subject in [each for each in forms["headers"] if "Aiq-Resumes" in forms["headers"][each]]:
        assert subject.startswith("ai.dead.") or "Aiq-Replay" in forms["headers"][subject]
        forms["headers"][subject].remove("Aiq-Resumes")  # new: the run that a replay goes on from
    for subject in [each for each in forms["headers"] if "Aiq-First-Stored" in forms["headers"][each]]:
        assert "Aiq-Replay" in forms["headers"][subject]
        forms["headers"][subject].remove("Aiq-First-Stored")  # new: when a replay was stored first
    forms["headers"]["ai.parked.at.agent.tasks.{tenant}.normal.*.*"].remove("Aiq-Original")  # new: whose copy it is
    for ingest in ("ai.rag.ingest.{tenant}", "ai.rag.ingest.{tenant}.normal"):  # new: a document's id is no job's id
        if ingest in forms["headers"]:
            forms["headers"][ingest] = sorted([*forms["headers"][ingest], "document_id"])
    del forms["headers"]["$O.AI_DOCUMENTS.R.{tenant}.*.result.*"]
    forms["reasons"] = sorted([*forms["reasons"], "result"])  # of a large result
    for subject, names in forms["headers"].items():
        if "Aiq-Event" in names and "Aiq-Document" in names:  # new: a large result is a document
            assert "Aiq-Document" not in EXPECTED["forms"]["headers"][subject]
            forms["headers"][subject] = [name for name in names if not name.startswith("Aiq-Document")]
        if "Aiq-Event" in names and "Aiq-Read-Kind" in names:  # new: final entries state the job's kind
            assert "Aiq-Read-Kind" not in EXPECTED["forms"]["headers"][subject]
            forms["headers"][subject].remove("Aiq-Read-Kind")
    for subject in ("ai.gateway.responses.{tenant}.*", "aiq.live.ai.gateway.responses.{tenant}.*"):
        forms["headers"][subject].remove("Aiq-Fingerprint")  # new: an id is of one body
    for what in ("headers", "keys", "msg_ids", "bodies"):  # new: counters of what becomes of jobs
        for subject in [each for each in forms.get(what, ()) if each.startswith("ai.metrics.")]:
            forms[what].pop(subject) if isinstance(forms[what], dict) else forms[what].remove(subject)
    for what, wanted in EXPECTED["forms"].items():
        assert forms[what] == wanted, what


# -- ids


async def test_failed_jobs_of_the_former_version_are_rerun_and_their_dead_letters_dropped(
    client: aiqueue.Client,
) -> None:
    wanted = ("task-late", "task-never", "task-rejected")
    seen: list[str] = []
    again = aiqueue.Worker(name="again")

    @again.handle(acts.Task)
    async def heal(job: aiqueue.Job[acts.Task]) -> str:
        seen.append(job.id)
        return job.message.text

    async with again.running(client):
        for job_id in wanted:
            message = acts.Task(do="return", text=f"{job_id} anew")
            calls = [
                client.enqueue(message, tenant=JOBS[job_id]["tenant"], unique=job_id, on_duplicate="rerun_failed")
                for _ in range(3)
            ]
            handles = await asyncio.gather(*calls)
            assert sorted(each.duplicate for each in handles) == [False, True, True]
            assert [await each.result(timeout=25) for each in handles] == [f"{job_id} anew"] * 3
    assert [seen.count(job_id) for job_id in wanted] == [1, 1, 1]
    assert not [each async for each in client.dead.find() if each.job_id in wanted]


async def test_an_id_that_the_former_version_has_answered_is_answered_so_whatever_the_body(
    client: aiqueue.Client,
) -> None:
    """It has written no fingerprint, so nothing tells that the body is another one."""
    worker, ran = aiqueue.Worker(name="again"), []

    @worker.handle(acts.Ask)
    async def answer(job: aiqueue.Job[acts.Ask]) -> str:
        ran.append(job.id)
        return "another answer"

    async with worker.running(client):
        handle = await client.enqueue(acts.Ask(prompt="something else"), tenant="acme", unique="ask-done")
        assert acts.plainly(await handle.result(timeout=25)) == JOBS["ask-done"]["result"]
    assert "ask-done" not in ran


async def test_a_job_that_the_former_version_has_run_well_is_the_duplicate_of_a_rerun_of_failures(
    client: aiqueue.Client,
) -> None:
    (job_id,) = (each for each in of_state("done") if each == "task-done")
    handle = await client.enqueue(acts.Task(do="return"), tenant="acme", unique=job_id, on_duplicate="rerun_failed")
    assert handle.duplicate
    assert acts.plainly(await handle.result(timeout=25)) == JOBS[job_id]["result"]


async def test_a_parked_job_of_the_former_version_is_replaced_and_another_one_rescheduled(
    client: aiqueue.Client,
) -> None:
    seen: list[str] = []
    again = aiqueue.Worker(name="again", tenants=["acme"])

    @again.handle(acts.Task)
    async def heal(job: aiqueue.Job[acts.Task]) -> str:
        seen.append(job.id)
        return job.message.text

    new = await client.enqueue(
        acts.Task(do="return", text="replaced"), tenant="acme", unique="task-far", delay=0.5, on_duplicate="replace"
    )
    retry = await client.job("task-retry-far")
    await retry.run_now()
    async with again.running(client):
        assert await new.result(timeout=25) == "replaced"
        assert await retry.result(timeout=25) == "task-retry-far"
    assert (seen.count("task-far"), seen.count("task-retry-far")) == (1, 1)


async def test_a_rerun_and_a_hashed_key_are_stored_in_the_form_of_the_former_version(
    client: aiqueue.Client, directory: Path
) -> None:
    """So its workers run them: a rerun differs in its Msg-Id, a key that is no token by one more header."""
    async with acts.plain(directory) as connection:
        js = connection.jetstream()

        async def newest() -> dict[str, str]:
            info = await js.stream_info("AI_AGENT_TASKS")
            return dict((await js.get_msg("AI_AGENT_TASKS", info.state.last_seq)).headers or {})

        await client.enqueue(acts.Task(do="return"), tenant="acme", unique="like-before")
        before = await newest()
        again = await client.enqueue(
            acts.Task(do="return"), tenant="globex", unique="task-rejected", on_duplicate="rerun_failed"
        )
        assert not again.duplicate
        rerun = await newest()
        key = "https://example.com/1"
        await client.enqueue(acts.Task(do="return"), tenant="acme", unique=key)
        hashed = await newest()
    assert rerun.keys() == before.keys()
    assert rerun["Nats-Msg-Id"].startswith("globex/agent.tasks/task-rejected/again-")
    assert hashed.keys() - before.keys() == {"Aiq-Unique"}
    assert hashed["Nats-Msg-Id"] == f"acme/agent.tasks/{hashed['Aiq-Job-Id']}"


async def test_steps_are_stored_in_the_forms_of_the_wire_contract(account: Account) -> None:
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await provision.apply(client.connection, client.topology)
        run = ParentRun("agent.tasks", "j", "7-1700000000")

        async def find_order() -> list[float]:
            return [7, 0, 1]

        kept = Checkpoints(
            client.connection, "AI_CHECKPOINTS", run.checkpoints("acme"), run=7, attempt=1, find_order=find_order,
            has_past=False, large=StepDocuments(client.documents, "acme", run),
        )  # fmt: skip
        await kept.keep_step("small", {"n": 1})
        await kept.keep_step("large", "x" * 100_000)
        small, large = [each async for each in client.connection.read("AI_CHECKPOINTS", ">")]
        assert small.subject == large.subject == "ai.checkpoint.agent.tasks.acme.j.7-1700000000"
        assert cbor2.loads(small.data) == {"name": "small", "result": {"n": 1}}
        body = cbor2.dumps({"name": "large", "result": "x" * 100_000})
        sha256 = hashlib.sha256(body).hexdigest()
        reference = {"tenant": "acme", "sha256": sha256, "size": len(body), "name": "", "content_type": codec.CBOR}
        assert cbor2.loads(large.data) == {"name": "large", "document": reference}
        held = {name: value for name, value in large.headers.items() if name.startswith("Aiq-Document")}
        ref = held.pop("Aiq-Document-Ref")
        assert held == {"Aiq-Document": sha256, "Aiq-Document-Size": str(len(body))}
        hold, *_ = [each async for each in client.connection.read("OBJ_AI_DOCUMENTS", "$O.AI_DOCUMENTS.R.>")]
        assert hold.subject == f"$O.AI_DOCUMENTS.R.acme.{sha256}.step.{ref}"
        assert ref.startswith("agent.tasks.j.7-1700000000.")
        assert ref.count(".") == 4


async def test_a_pause_is_stored_in_the_documented_form_and_read_with_less_or_more(client: aiqueue.Client) -> None:
    """Workers of the former version do not know the keys, and those of this one ignore forms that they do not know."""
    await client.pause("agent.tasks", tenant="acme", kind="crawl.page", by="anna", reason="slow", now=True)
    hashed = hashlib.sha256(b"crawl.page").hexdigest()[:40]
    subject = f"$KV.AI_PRESENCE.pause.agent.tasks.tenant.acme.kind.x{hashed}"
    stored = await client.connection.last("KV_AI_PRESENCE", subject)
    assert stored is not None
    body = json.loads(stored.data)
    assert abs(body.pop("since") - stored.time) < 1
    assert body == {
        "family": "agent.tasks", "tenant": "acme", "kind": "crawl.page", "by": "anna", "reason": "slow", "until": None,
        "now": True,
    }  # fmt: skip
    await client.resume("agent.tasks", tenant="acme", kind="crawl.page")

    documents = {
        "agent.tasks": b"",
        "agent.tasks.tenant.acme": b'{"since": 1700000000.5, "by": "anna", "later": [1]}',
        "agent.tasks.kind.crawl": b'{"since": "then", "until": true, "reason": 7}',
        "agent.tasks.key.gpt": b"{}",
    }
    for key, data in documents.items():
        await client.connection.store(f"$KV.AI_PRESENCE.pause.{key}", data, {"Nats-Msg-Id": key})
    found = {each.scope: each for each in await client.pauses()}
    assert [each[:3] for each in found] == [
        ("agent.tasks", None, None), ("agent.tasks", None, "crawl"), ("agent.tasks", "acme", None),
    ]  # fmt: skip
    whole, kind, acme = found.values()
    assert (acme.since, acme.by, acme.until) == (1700000000.5, "anna", None)
    assert whole.since > 1700000000.5
    assert (kind.until, kind.reason) == (None, "")


async def test_a_job_of_a_limited_key_is_stored_in_the_documented_form(account: Account, tmp_path: Path) -> None:
    (tmp_path / "streams").mkdir()
    rule = f'[[limit]]\nfamily = "{keyed.FAMILY}"\nrequests = 5\n'
    (tmp_path / "streams" / "limits.toml").write_text(rule)
    async with keyed.connect(account, tmp_path) as client:
        hints: dict[str, bytes] = {}
        await client.connection.subscribe("aiq.hint.>", lambda each: hints.setdefault(each.subject, each.data))
        await client.key_lanes.find_token(client.topology.family(keyed.FAMILY), "acme", "a/b é")
        await client.enqueue(keyed.Call(model="a/b é", n=1), tenant="acme", unique="one")
        await client.enqueue(keyed.Call(model="a/b é", n=2), tenant="acme", priority="high")
        key = hashlib.sha256("a/b é".encode()).hexdigest()[:32]
        stored = [each async for each in client.connection.read(keyed.STREAM, ">")]
        assert [each.subject for each in stored] == [f"ai.test.calls.acme.{each}.{key}" for each in ("normal", "high")]
        assert stored[0].headers == {
            "Nats-Msg-Id": "acme/test.calls/one", "Content-Type": "application/cbor", "Aiq-Kind": "call",
            "Aiq-Job-Id": "one", "priority": "normal", "Aiq-Limit-Key": "a%2Fb%20%C3%A9",
        }  # fmt: skip
        family = client.topology.family(keyed.FAMILY)
        config = family.lane_config("acme", "normal", key)
        assert config["durable_name"] == f"acme-normal={key}"
        assert config["filter_subject"] == f"ai.test.calls.acme.normal.{key}"
        assert hints[f"aiq.hint.test.calls.acme.normal.{key}"] == "a/b é".encode()


async def test_an_act_is_written_down_in_the_documented_form_and_lines_of_others_are_left_out(
    client: aiqueue.Client,
) -> None:
    async with client.audit.act("dead.replay", {"tenant": "acme", "all": True}, by="anna") as line:
        line.count, line.details = 2, {"failed": 1}
    found = [each async for each in client.connection.read("AI_AUDIT", "ai.audit.dead-replay")]
    begun, ended = (json.loads(each.data) for each in found)
    said = {
        "id": line.id, "act": "dead.replay", "target": {"tenant": "acme", "all": True}, "os_user": "anna",
        "nats_user": client.settings.user or begun["nats_user"], "host": socket.gethostname(),
    }  # fmt: skip
    assert begun == {**said, "phase": "begun"}
    assert ended == {**said, "phase": "ended", "count": 2, "details": {"failed": 1}, "error": ""}
    for number, body in enumerate((b"", b"[]", b'{"id": 1}', b"\xff", json.dumps({**begun, "target": 7}).encode())):
        await client.connection.store("ai.audit.other", body, {"Nats-Msg-Id": f"other-{number}"})
    more = {**begun, "id": "later", "act": "new", "phase": "begun", "more": [1]}
    await client.connection.store("ai.audit.new", json.dumps(more).encode(), {"Nats-Msg-Id": "later"})
    lines = [each async for each in client.audit.find()]
    assert [(each.act, each.count, each.ended_at is None) for each in lines] == [
        ("dead.replay", 2, False), ("new", None, True),
    ]  # fmt: skip
