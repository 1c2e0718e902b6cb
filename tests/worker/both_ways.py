"""Runs the same messages on the short way and on the full path, and compares what is left of them."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import codec, headers, subjects
from aiqueue.errors import AIQueueError
from aiqueue.journal import RETRY
from aiqueue.journal.entries import CHUNK, RESULT, entry_headers
from aiqueue.lanes import Delivery
from aiqueue.worker import session, unknown_kinds
from aiqueue.worker.opening import OpenedJob, Opener

from ..support import Server, create_streams, eventually
from .acting import FAMILIES, Acting
from .fuzzed_deliveries import TENANT, Fuzzed

Left = dict[str, dict[str, Any]]  # what is left, by what it is and by job
MESSAGES_MAX, FAR = 100_000, 1_000_000  # sequences are below the first; runs of other messages above the second
SHORT, FULL = "tenant-s", "tenant-f"  # the tenants: jobs of the second one take the full path


def job_fields(job: Any) -> Any:
    """What a handler can see of a job, or why there is none."""
    if not isinstance(job, aiqueue.Job):
        return job
    values = {name: getattr(job, name) for name in ("id", "kind", "family", "tenant", "priority", "attempt")}
    stated = {"enqueued_at": job.enqueued_at, "deadline": job.deadline, "headers": [*job.headers.items()]}
    return {**values, **stated, "state": f"{job.state}", "message": repr(job.message), "class": type(job.message)}


class Run:
    """A batch of messages in the lanes of both tenants, run by one worker, and what is left of it."""

    def __init__(self, client: aiqueue.Client, batch: Sequence[Fuzzed]) -> None:
        self.client = client
        self.batch = batch
        self.streams = {name: client.topology.family(name).stream for name in FAMILIES}
        self.numbers: dict[str, dict[tuple[str, int], int]] = {SHORT: {}, FULL: {}}  # by family and sequence
        self.refused: dict[str, dict[int, str]] = {SHORT: {}, FULL: {}}
        self.stored_at: dict[tuple[str, int], float] = {}  # by family and sequence
        self.replies: defaultdict[tuple[str, int], list[str]] = defaultdict(list)  # by stream and sequence
        self.deliveries: defaultdict[tuple[str, int], int] = defaultdict(int)  # by stream and sequence
        self.opened_short: set[int] = set()  # numbers
        self.hashed: dict[str, str] = {}  # texts by the ids that are hashes of them
        self.acting = Acting(self.describe_job, client)
        self.began_at = time.time()

    async def run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(unknown_kinds, "HOP_FIRST_S", 30.0)
        monkeypatch.setattr(unknown_kinds, "SOON_S", 60.0)  # or a job parked before the worker's look would be moved
        monkeypatch.setattr(session, "WAIT_HERE_MAX_S", 60.0)  # on a busy machine jobs would be delivered once more
        monkeypatch.setattr(Opener, "open_first", self._opener())
        monkeypatch.setattr(subjects, "foreign_id", self._id_noter())
        for tenant in (SHORT, FULL):
            await self._store(tenant)
        listening = await self.client.connection.subscribe("$JS.ACK.>", self._note_reply)
        try:
            async with self.acting.worker.running(self.client) as running:
                await eventually(lambda: self._is_settled(running))
        finally:
            await listening.close()

    def _opener(self) -> Any:
        """`open_first`, which leaves all deliveries of one tenant to the full path."""
        open_first = Opener.open_first

        def choose(opener: Opener, delivery: Delivery) -> OpenedJob | None:
            self.deliveries[delivery.location] += 1
            if delivery.tenant == FULL:
                return None
            opened = open_first(opener, delivery)
            number = self.numbers[SHORT].get((delivery.lane.key.family, delivery.seq))
            if opened is not None and number is not None:
                self.opened_short.add(number)
            return opened

        return choose

    def _id_noter(self) -> Any:
        """`foreign_id`, which notes what an id is a hash of: the tenant may be in it, and is not seen in the hash."""
        foreign_id = subjects.foreign_id

        def note(value: str) -> str:
            job_id = foreign_id(value)
            self.hashed[job_id] = value
            return job_id

        return note

    async def _store(self, tenant: str) -> None:
        for number, each in enumerate(self.batch):
            block, body = each.fill(tenant, number)
            subject = subjects.lane(each.family, tenant, each.priority)
            try:
                ack = await self.client.connection.store_block(subject, block, body, timeout_s=10)
            except AIQueueError as error:
                self.refused[tenant][number] = str(error).replace(tenant, TENANT)
                continue
            assert not ack.duplicate, each
            self.numbers[tenant][each.family, ack.seq] = number
            if each.before:
                await self._write_before(tenant, number, ack.seq)
        for family, stream in self.streams.items():
            async for stored in self.client.connection.read(stream, f"ai.{family}.>"):
                self.stored_at[family, stored.seq] = stored.time

    async def _write_before(self, tenant: str, number: int, seq: int) -> None:
        """Write what the message's journal holds before it is delivered, as if an earlier consumer had existed."""
        each = self.batch[number]
        root = self.client.topology.family(each.family).journal
        found = headers.read_plain(each.fill(tenant, number)[0])
        if root is None or found is None:
            return
        kind, run = (RESULT, seq + FAR) if each.before == "other run" else (each.before, seq)
        data = {"error": "before", "delay_s": 0.01, "history": [], "parked": False} if kind == RETRY else {"x": 1}
        fields = entry_headers(kind, run, 1, 1, "") | {headers.MSG_ID: f"{tenant}-{number}-before"}
        job_id = found[1]
        subject = subjects.journal(root, tenant, job_id)
        await self.client.connection.store(subject, codec.encode(data), fields)

    def _note_reply(self, message: Any) -> None:
        parts = message.subject.split(".")
        if message.data != b"+WPI":
            self.replies[parts[-7], int(parts[-4])].append(message.data.decode())

    async def _is_settled(self, running: Any) -> bool:
        """Whether nothing runs, and every message that is still there got no reply to its last delivery."""
        vitals = running.vitals()
        if vitals["running"] or vitals["waiting"]:
            return False
        for family, stream in self.streams.items():
            async for stored in self.client.connection.read(stream, f"ai.{family}.>"):
                location = stream, stored.seq
                if self.deliveries[location] <= sum(each.startswith("-NAK") for each in self.replies[location]):
                    return False
        return not running.vitals()["running"]

    # -- what is left

    def text(self, text: str, tenant: str, family: str) -> str:
        """Without the tenant, also in what an id is a hash of, and without sequences and times in names of messages."""

        def own_id(found: re.Match[str]) -> str:
            number = self.numbers[tenant].get((family, int(found[1])))
            return f"s-of-{number}"

        text = re.sub(r"\bx[0-9a-f]{40}\b", lambda found: f"x-of-{self.hashed.get(found[0], found[0])!r}", text)
        text = re.sub(r"\bs(\d+)-[0-9a-f]{12,}\b", own_id, text.replace(tenant, TENANT))
        text = re.sub(r"\b([ru])\d+-\d{9,}-([ah]\d+)", r"\1-OWN-\2", text)
        text = re.sub(r"\b(lane-\d+|dead-\d+-\d{9,})", "OWN", text)
        text = re.sub(r"\b0x[0-9a-f]{6,}", "0xADDRESS", text)
        return re.sub(r"\b[0-9,]+ bytes with headers", "MANY bytes with headers", text)

    def time(self, at: float, family: str) -> str:
        if any(abs(at - stored_at) < 2e-6 for (of, _), stored_at in self.stored_at.items() if of == family):
            return "stored"
        return "now" if self.began_at - 1 < at < time.time() + 1 else f"{at}"

    def fields(self, given: Any, tenant: str, family: str) -> list[tuple[str, str]]:
        """Headers, in their order."""
        return [(name, self.text(self.value(name, given[name], tenant, family), tenant, family)) for name in given]

    def value(self, name: str, value: str, tenant: str, family: str) -> str:
        if name in (headers.ENQUEUED, headers.STARTED_AT) and headers.decimal(value) is not None:
            return self.time(float(value), family)
        if name == headers.FIRST_STORED and (found := headers.first_stored({name: value}, 0, time.time()))[1]:
            return f"{self.time(found[0], family)}-{self.run_name(found[1], tenant, family)}"
        if name == headers.RUN:
            return self.run_name(headers.number(value), tenant, family)
        if name == headers.DOCUMENT_REF and subjects.made_at(value):
            return "a new hold"
        if name == headers.RESUMES and "-" in value:
            number = headers.number(value.partition("-")[0])
            return f"that of {self.run_name(number, tenant, family)}" if number else value
        if name == headers.HISTORY:
            with contextlib.suppress(ValueError):  # anybody may have written it
                return repr(self.history(json.loads(value), tenant, family))
        return "some time" if name in (headers.DUE, headers.SCHEDULE, headers.UNKNOWN) else value

    def run_name(self, run: int, tenant: str, family: str) -> str:
        far, seq = divmod(run, FAR)
        number = self.numbers[tenant].get((family, seq))
        if number is None:
            return "a message that was moved" if run < MESSAGES_MAX else f"{run}"
        return f"{'another' if far else 'own'} of {number}"

    def history(self, given: Any, tenant: str, family: str) -> Any:
        if not isinstance(given, list):
            return given
        return [
            {name: self.text(str(value), tenant, family) for name, value in each.items() if name != "at"}
            for each in given
            if isinstance(each, dict)
        ]

    def describe_job(self, job: aiqueue.Job[Any]) -> Any:
        fields = job_fields(job)
        fields["enqueued_at"] = self.time(job.enqueued_at, job.family)
        fields["headers"] = self.fields(job.headers, job.tenant, job.family)
        fields |= {"id": self.text(job.id, job.tenant, job.family), "tenant": "", "cancelled": job.cancelled}
        return fields

    def journal_of(self, entries: list[Any], tenant: str, family: str) -> list[Any]:
        """The entries of a journal. How chunks share entries is up to the moment, so they become one.

        Of a Msg-Id neither the nonce counts, nor how often the entry was tried.
        """
        made: list[Any] = []
        has_chunks = any(each.headers.get(headers.EVENT) == CHUNK for each in entries)
        for each in entries:
            fields = dict(each.headers)
            data = codec.decode(each.data, codec.CBOR) if each.data else None
            msg_id = fields.get(headers.MSG_ID, "").rsplit("/", 3)
            if len(msg_id) == 4:
                fields[headers.MSG_ID] = (
                    f"{msg_id[0]}/NONCE/{msg_id[2]}/{'N' if has_chunks else msg_id[3].partition('-')[0]}"
                )
            elif re.fullmatch(r"[0-9a-f]{16}", fields.get(headers.MSG_ID, "").rpartition("/")[2]):
                fields[headers.MSG_ID] = "a canceller's"
            if headers.EXPECTED in fields:
                fields[headers.EXPECTED] = "0" if fields[headers.EXPECTED] == "0" else "newest"
            if isinstance(data, dict) and "history" in data:
                data["history"] = self.history(data["history"], tenant, family)
            if isinstance(data, dict) and "delivery" in data:
                data |= {"seq": "own", "delivery": data["delivery"][2:]}
            if fields.get(headers.EVENT) == CHUNK and made and made[-1][0] == CHUNK:
                made[-1][2].extend(data)
                continue
            made.append((fields.get(headers.EVENT), self.fields(fields, tenant, family), data))
        return [(event_, fields, self.text(repr(data), tenant, family)) for event_, fields, data in made]

    async def left(self, tenant: str) -> Left:
        """What is left of the jobs of a tenant, by what it is and by job."""
        connection, topology = self.client.connection, self.client.topology
        found: Left = defaultdict(lambda: defaultdict(list))
        found["refused"] = {f"{number}": text for number, text in self.refused[tenant].items()}
        for (of, job_id), jobs in self.acting.seen.items():
            if of == tenant:
                found["jobs"][self.text(job_id, tenant, jobs[0]["family"])] += jobs
        journals: dict[tuple[str, str], list[Any]] = defaultdict(list)
        for family in FAMILIES:
            root = topology.family(family).journal
            if root is not None:
                async for stored in connection.read(topology.journal_stream.name, f"{root}.{tenant}.>"):
                    journals[family, subjects.parse_journal(stored.subject)[1]].append(stored)
            async for stored in connection.read(topology.dead_stream.name, f"ai.dead.{family}.{tenant}.>"):
                fields = self.fields(stored.headers, tenant, family)
                found["dead letters"][self.text(stored.subject, tenant, family)].append((fields, stored.data))
            async for stored in connection.read(topology.parked_stream.name, f"ai.parked.*.{family}.{tenant}.>"):
                delay_s = float(stored.headers[headers.DUE]) / 1000 - stored.time
                fields = self.fields(stored.headers, tenant, family)
                subject = self.text(stored.subject, tenant, family)
                found["parked"][subject].append((round(delay_s / 10), fields, stored.data))
            async for stored in connection.read(self.streams[family], f"ai.{family}.{tenant}.>"):
                found["in lanes"][f"{family} {self.numbers[tenant].get((family, stored.seq))}"] = "left"
        for (family, job_id), entries in journals.items():
            found["journal"][self.text(job_id, tenant, family)] = self.journal_of(entries, tenant, family)
        for (family, seq), number in self.numbers[tenant].items():
            location = self.streams[family], seq
            found["replies"][f"{number}"] = self.replies[location]
            found["deliveries"][f"{number}"] = self.deliveries[location]
        return {name: dict(each) for name, each in found.items()}

    async def compare(self) -> Left:
        """Fail for the first job that the two paths treat differently. Returns what is left."""
        assert not self.acting.faults
        short, full = await self.left(SHORT), await self.left(FULL)
        for what in sorted({*short, *full}):
            ours, theirs = short.get(what, {}), full.get(what, {})
            for name in sorted({*ours, *theirs}, key=str):
                if ours.get(name) != theirs.get(name):
                    found = re.search(r"\b\d{6}|\d+$", f"{name}")
                    number = int(found[0]) if found else len(self.batch)
                    about = f"{what} of {name}: {self.batch[number] if number < len(self.batch) else '(of no number)'}"
                    pytest.fail(f"{about}\n the short way's: {ours.get(name)}\n the full path's: {theirs.get(name)}")
        return short


async def run_both(server: Server, streams: Path, batch: Sequence[Fuzzed]) -> tuple[Run, Left]:
    """Run a batch on both paths, in an account of its own, and compare what is left. Returns that too."""
    account = server.take()
    try:
        async with aiqueue.connect(
            account.url, user=account.user, password=account.password, streams=streams
        ) as client:
            await create_streams(client)
            run = Run(client, batch)
            with pytest.MonkeyPatch.context() as patch:
                await run.run(patch)
            return run, await run.compare()
    finally:
        server.return_account(account)
