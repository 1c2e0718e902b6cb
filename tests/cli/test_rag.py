"""`aiqueue rag` in-process, on a real server, with a retrieval worker beside it."""

from __future__ import annotations

import asyncio
import io
import json
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

import aiqueue
from aiqueue.cli.app import app
from aiqueue.cli.rag import watch
from aiqueue.cli.rag.files import Patterns, find_files
from aiqueue.cli.rag.pipeline import IngestOrder, IngestTotals, ingest_files
from aiqueue.gateway.standin import StandIn
from aiqueue.rag import RagWorker

from ..gateway.running import KEY, KEY_VARIABLE, running, write_config
from ..support import Account, eventually

Run = Callable[..., Coroutine[Any, Any, Result]]

DOCUMENTS = {
    "install.md": "# Installing\n\n## Linux\n\nUse your distribution's packages.\n\n## Windows\n\nRun the setup.",
    "guide/replay.md": "# Dead letters\n\nA dead letter is replayed with one command, once its cause is mended.",
    "guide/notes.txt": "The otter sleeps on its back and holds the paw of its neighbour.",
}


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    for name, text in DOCUMENTS.items():
        path = tmp_path / "docs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "docs"


@pytest.fixture
def rag_toml(tmp_path: Path) -> Path:
    path = tmp_path / "rag.toml"
    path.write_text('[store]\npath = "store"\n[parsing]\nprocesses = 1\n[answers]\nmodel = "small"\ntokens_max = 100\n')
    return path


@pytest.fixture
def run(account: Account, rag_toml: Path) -> Run:
    environment = {
        "AIQUEUE_URL": account.url, "AIQUEUE_USER": account.user, "AIQUEUE_PASSWORD": account.password,
        "AIQUEUE_RAG": str(rag_toml), "COLUMNS": "120",
    }  # fmt: skip

    async def run(*arguments: str) -> Result:
        return await asyncio.to_thread(CliRunner().invoke, app, ["rag", *arguments], env=environment)

    return run


@pytest.fixture
async def worker(client: aiqueue.Client, rag_toml: Path) -> AsyncIterator[RagWorker]:
    worker = RagWorker(rag_toml, concurrency=16)
    async with worker.running(client):
        yield worker


async def data_of(run: Run, *arguments: str) -> Any:
    done = await run(*arguments, "--tenant", "acme", "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


async def test_a_directory_is_ingested_asked_listed_and_deleted(run: Run, docs: Path, worker: RagWorker) -> None:
    done = await run("ingest", str(docs), "--tenant", "acme", "--metadata", "lang=en")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("3 documents: 3 completed, 0 with errors, 0 failed, ")

    asked = await run("ask", "How is a dead letter replayed?", "--tenant", "acme", "--k", "2", "--where", "lang=en")
    assert asked.exit_code == 0, asked.output
    assert asked.stdout.splitlines()[0].startswith("1  guide/replay.md > Dead letters  1.00")
    assert "is replayed with one command" in asked.stdout
    (found,) = (await data_of(run, "ask", "the otter", "--k", "1", "--mode", "keyword"))["passages"]
    assert (found["document_id"], found["metadata"]) == ("guide/notes.txt", {"lang": "en"})
    assert (await run("ask", "otter", "--tenant", "globex")).stdout.startswith("nothing found: ")

    listed = await run("ls", "--tenant", "acme")
    assert [line.split()[0] for line in listed.stdout.splitlines() if line[0] != " "] == [
        "document",
        *sorted(DOCUMENTS),
    ]
    stats = await data_of(run, "stats")
    assert (stats["documents"], stats["embedder"], stats["dimensions"]) == (3, "wordllama-256", 256)
    state = await data_of(run, "status", "install.md")
    assert (state["state"], state["title"], state["indexed_version"]) == ("completed", "Installing", state["version"])
    assert "this version" in (await run("status", "install.md", "--tenant", "acme")).stdout

    gone = await run("rm", "install.md", "guide/notes.txt", "--tenant", "acme")
    assert (gone.exit_code, gone.stdout) == (0, "deleted  install.md\ndeleted  guide/notes.txt\n")
    assert [each["document_id"] for each in await data_of(run, "ls")] == ["guide/replay.md"]
    assert (await run("status", "install.md", "--tenant", "acme")).stdout.split()[:4] == [
        "document", "install.md", "state", "deleted",
    ]  # fmt: skip


async def test_what_fails_or_has_errors_is_told_with_the_reason_and_fails_the_command(
    run: Run, docs: Path, worker: RagWorker
) -> None:
    (docs / "empty.md").write_text("")
    (docs / "image.bin").write_bytes(bytes(range(256)) * 10)
    (docs / "gone.md").symlink_to("nowhere")
    done = await run("ingest", str(docs), "--tenant", "acme")
    assert done.exit_code == 1
    assert done.stdout.startswith("6 documents: 3 completed, 0 with errors, 3 failed, ")
    for name in ("empty.md", "image.bin", "gone.md"):
        assert f"  failed  {name}: " in done.stdout
    assert "  failed  empty.md: it is empty (0 bytes)\n" in done.stdout
    listed = await run("ls", "--tenant", "acme", "--failed")
    assert "it is empty (0 bytes)" in [line.strip() for line in listed.stdout.splitlines()]
    undecodable = Path(os.fsdecode(os.fsencode(docs) + b"/caf\xe9.md"))
    undecodable.write_text("# Coffee\n\nIt is brewed here.")
    named = json.loads((await run("ingest", str(undecodable), "--tenant", "acme", "--json")).stdout)
    assert (named["completed"], named["failed"]) == (1, [])
    by_path = await run("ingest", str(undecodable), "--tenant", "acme", "--by-path")
    assert "its path is not UTF-8, and no job can hold it" in by_path.stdout
    again = json.loads((await run("ingest", str(docs), "--tenant", "acme", "--glob", "*.bin", "--json")).stdout)
    assert [each["document_id"] for each in again["failed"]] == ["image.bin"]
    assert again["found"] == 1
    failed = json.loads((await run("ls", "--tenant", "acme", "--failed", "--json")).stdout)
    assert [each["document_id"] for each in failed] == ["empty.md", "image.bin"]
    assert (await run("status", "image.bin", "--tenant", "acme")).exit_code == 1


async def test_without_a_worker_the_documents_wait_and_the_command_says_so(
    run: Run, docs: Path, client: aiqueue.Client, rag_toml: Path
) -> None:
    no_worker = "no retrieval worker is running: start `aiqueue work aiqueue.rag:worker`"
    done = await run("ingest", str(docs), "--tenant", "acme", "--no-wait")
    assert (done.exit_code, done.stdout) == (0, "3 of 3 documents enqueued, 0 not\n")
    assert done.stderr.startswith(no_worker)
    asked = await run("ask", "otter", "--tenant", "acme", "--timeout", "0.5s")
    assert (asked.exit_code, len(asked.stderr.splitlines())) == (1, 1)
    assert no_worker in asked.stderr
    status = await run("status", "install.md", "--tenant", "acme")
    assert status.stderr == "error: no retrieval worker answers: start `aiqueue work aiqueue.rag:worker`\n"
    async with RagWorker(rag_toml).running(client):
        await eventually(lambda: _has(run, 3))


async def _has(run: Run, documents: int) -> bool:
    return bool((await data_of(run, "stats"))["documents"] == documents)


async def test_wrong_use_is_one_line_and_exit_code_2(run: Run, docs: Path, client: aiqueue.Client) -> None:
    (docs.parent / "questions.json").write_text("[]")
    for arguments, problem in (
        (("ingest", "nothing"), "cannot read 'nothing': No such file or directory"),
        (("ingest", str(docs), "--glob", "*.pdf"), "no file to ingest in"),
        (("ingest", str(docs), "--metadata", "lang"), "--metadata 'lang': give KEY=VALUE"),
        (("ask", "q", "--where", "lang"), "--where 'lang': give KEY=VALUE"),
        (("ask", "q", "--where", "a b=1"), "where: key 'a b' must be 1 to 64 characters of A-Z a-z 0-9 _ . -"),
        (("ingest", str(docs), "--priority", "urgent"), "there is no priority 'urgent': use one of high, normal, low"),
        (("watch", str(docs / "install.md")), "it is not a directory"),
        (("watch", str(docs), "--interval", "0"), "--interval must be at least 100ms"),
        (("ingest", ""), "'DIR|FILE...': the path is empty"),
        (("watch", ""), "'DIR': the path is empty"),
        (("ingest", "/dev/null"), "'/dev/null' is neither a file nor a directory"),
        (("ingest", str(docs), "--metadata", "k" * 257 + "=1"), "--metadata: its keys must be texts of 1 to 256"),
        (("ingest", str(docs), "--metadata", "k=" + "v" * 66_000), "--metadata: has 66,008 bytes as JSON"),
        (("ask", " \n"), "the question is empty"),
        (("ask", "x" * 8_193), "a question has at most 8,192 characters, not 8,193"),
        (("ask", "q", "--where", "year=>2020"), "--where 'year=>2020': give KEY=VALUE, or one of"),
        (("ask", "q", "--where", "year>null"), "where: year: gt compares texts or numbers, not null"),
        (("status", ""), "an id has 1 to 1,024 characters, not 0"),
        (("rm", "a.md", "x" * 1_025), "an id has 1 to 1,024 characters, not 1,025"),
        (("reindex", ""), "an id has 1 to 1,024 characters, not 0"),
        (("eval", "nothing.json"), "cannot read 'nothing.json'"),
        (("eval", str(docs.parent / "questions.json")), "must be a JSON list of 1 to"),
    ):
        done = await run(*arguments, "--tenant", "acme")
        assert done.exit_code == 2, done.output
        assert problem in " ".join(done.stderr.replace("│", " ").split())
        assert len(done.stderr.splitlines()) == 1 or "Invalid value" in done.stderr  # what main() prints in one line
    assert (await run("ls", "--tenant", "a.b")).exit_code == 2
    assert len((await run("ingest", str(docs), "--tenant", "a.b")).stderr.splitlines()) == 1


async def test_a_store_on_another_host_is_one_line_with_the_remedy(
    run: Run, docs: Path, worker: RagWorker, rag_toml: Path
) -> None:
    rag_toml.write_text(rag_toml.read_text().replace("[store]\n", '[store]\nhost = "elsewhere"\n'))
    for command in (("ls",), ("stats",)):
        done = await run(*command, "--tenant", "acme")
        assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1)
        assert "the documents are kept on host" in done.stderr
        assert "run the worker there" in done.stderr


async def test_questions_with_labels_measure_each_search(run: Run, docs: Path, worker: RagWorker) -> None:
    await run("ingest", str(docs), "--tenant", "acme")
    path = docs.parent / "questions.json"
    path.write_text(
        json.dumps([
            {"question": "How is a dead letter replayed?", "document": "guide/replay.md", "heading": "Dead letters"},
            {"question": "Which animal sleeps on its back?", "document": ["guide/notes.txt", "other.txt"]},
            {"question": "What is not there?", "document": "nothing.md"},
        ])
    )  # fmt: skip
    scores = await data_of(run, "eval", str(path))
    assert [each["mode"] for each in scores] == ["keyword", "vector", "hybrid"]
    assert scores[2]["hit_1"] == pytest.approx(2 / 3)
    assert scores[2]["missed"] == ["What is not there?"]
    done = await run("eval", str(path), "--tenant", "acme", "--missed")
    assert done.stderr.startswith(
        "1 of 3 questions count as missed: acme has none of their documents, such as of 'What is"
    )
    shown = done.stdout.splitlines()
    assert shown[0].split() == ["search", "hit@1", "hit@5", "hit@10", "MRR", "ms", "each"]
    assert shown[3].split()[:5] == ["hybrid", "0.667", "0.667", "0.667", "0.667"]
    assert shown[4].startswith("3 questions; one standard error")
    assert shown[5] == "  missed  What is not there?"
    none = await run("eval", str(path), "--tenant", "globex")
    assert (none.exit_code, "has no documents here" in none.stderr) == (2, True)


async def test_all_chunks_are_embedded_anew(run: Run, docs: Path, worker: RagWorker, client: aiqueue.Client) -> None:
    await run("ingest", str(docs), "--tenant", "acme")
    done = await run("reindex", "--tenant", "acme")
    assert done.exit_code == 0, done.output
    assert done.stdout == "3 documents, 4 chunks, nothing to embed: all vectors are by wordllama-256\n"
    nobody = await run("reindex", "--tenant", "globex")
    assert nobody.stdout == "nothing to embed: tenant globex has no documents\n"
    refused = await run("reindex", "install.md", "--tenant", "acme")
    assert (refused.exit_code, "was ingested by value" in refused.stderr) == (1, True)
    unknown = await run("reindex", "none.md", "--tenant", "acme")
    assert (unknown.exit_code, unknown.stderr.count("\n"), "neither stored" in unknown.stderr) == (1, 1, True)
    assert [each async for each in client.dead.find()] == []


async def test_an_answer_is_printed_after_its_sources_and_its_absence_is_a_failure(
    run: Run, docs: Path, worker: RagWorker, client: aiqueue.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.setattr("aiqueue.rag.answering.LOOK_EVERY_S", 0.1)
    await run("ingest", str(docs), "--tenant", "acme")
    failed = await run("ask", "How do otters sleep?", "--tenant", "acme", "--answer")
    assert failed.exit_code == 1
    assert failed.stdout.startswith("[1] guide/notes.txt > notes\n[2] ")
    assert failed.stderr == (
        "error: no answer in words: no gateway worker is running: start `aiqueue work aiqueue.gateway:worker`\n"
    )
    async with StandIn() as standin, running(client, write_config(tmp_path, standin.url)):
        done = await run("ask", "How do otters sleep?", "--tenant", "acme", "--answer")
        assert done.exit_code == 0, done.output
        sources, answer = done.stdout.split("\n\n")
        assert sources.startswith("[1] guide/notes.txt > notes\n[2] ")
        assert answer.startswith("<passages> <passage")  # the stand-in repeats the words of the prompt
        result = await data_of(run, "ask", "How do otters sleep?", "--answer")
        assert (result["answer"], result["passages"][0]["document_id"]) == (answer.strip(), "guide/notes.txt")


async def test_a_watched_directory_is_followed(account: Account, docs: Path, worker: RagWorker) -> None:
    async def lists(*expected: str) -> bool:
        assert worker._runtime is not None
        found = await worker._runtime.store.documents("acme")
        return [each.document_id for each in found if each.state == "completed"] == [*expected]

    async def finds(word: str) -> bool:
        assert worker._runtime is not None
        return bool(await worker._runtime.store.search("acme", word, None, 5, mode="keyword"))

    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        order = IngestOrder("acme", wait_s=20)
        watching = asyncio.create_task(watch._watch(client, docs, Patterns(), order, 0.05, as_json=False))
        try:
            await eventually(lambda: lists(*sorted(DOCUMENTS)))
            (docs / "new.md").write_text("A new document about beavers.")
            (docs / "install.md").unlink()
            await eventually(lambda: lists("guide/notes.txt", "guide/replay.md", "new.md"))
            docs.rename(docs.with_name("away"))
            await asyncio.sleep(0.2)  # in which nothing is deleted
            docs.with_name("away").rename(docs)
            (docs / "new.md").write_text("Now it is about walruses, and not any more about what it was.")
            await eventually(lambda: finds("walruses"))
            assert await lists("guide/notes.txt", "guide/replay.md", "new.md")
        finally:
            watching.cancel()
            await asyncio.wait([watching])


async def test_a_content_above_the_claim_check_is_ingested(
    run: Run, docs: Path, worker: RagWorker, client: aiqueue.Client
) -> None:
    words = " ".join(f"word{number}" for number in range(28_000))
    assert len(words) > client.settings.claim_check
    (docs / "large.txt").write_text(words)
    done = await run("ingest", str(docs / "large.txt"), "--tenant", "acme")
    assert done.exit_code == 0, done.output
    (found,) = (await data_of(run, "ask", "word27999", "--k", "1", "--mode", "keyword"))["passages"]
    assert found["document_id"] == "large.txt"


async def test_a_document_that_waits_has_a_status_however_large_it_is(
    run: Run, docs: Path, worker: RagWorker, client: aiqueue.Client
) -> None:
    (docs / "large.txt").write_text("word " * (client.settings.claim_check // 4))
    await client.pause("rag.ingest")
    assert (await run("ingest", str(docs / "large.txt"), "--tenant", "acme", "--no-wait")).exit_code == 0
    assert (await data_of(run, "status", "large.txt"))["state"] == "queued"


async def test_by_path_the_worker_reads_the_files_that_the_roots_of_the_tenant_allow(
    run: Run, docs: Path, worker: RagWorker, client: aiqueue.Client, rag_toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("ingest", str(docs), "--tenant", "acme", "--by-path")
    off = await run(*arguments)
    assert off.exit_code == 1
    off_line = "documents by path are off: list the directory in `roots` of this tenant in rag.toml"
    assert len([line for line in off.stdout.splitlines() if line.endswith(off_line)]) == len(DOCUMENTS)
    rag_toml.write_text(f'{rag_toml.read_text()}\n[[tenant]]\nname = "acme"\nroots = ["{docs}"]\n')
    await worker.reload(client)

    monkeypatch.setattr("aiqueue.rag.CONTENT_BYTES_MAX", 8)
    by_value = await run("ingest", str(docs / "install.md"), "--tenant", "acme")
    assert by_value.exit_code == 1
    assert by_value.stdout.endswith("list its directory in `roots` of this tenant in rag.toml, and use --by-path\n")

    monkeypatch.chdir(docs.parent)
    (docs / "guide/two.md").symlink_to("replay.md")
    done = await run("ingest", "docs", "--tenant", "acme", "--by-path")
    assert done.stdout.startswith("4 documents: 3 completed, 0 with errors, 1 failed, ")
    assert done.stdout.endswith("it is a symlink: give the file's own path\n")
    state = await data_of(run, "status", "guide/notes.txt")
    assert (state["state"], state["source"], state["title"]) == ("completed", str(docs / "guide/notes.txt"), "notes")
    (docs / "guide/notes.txt").write_text("Now it is about beavers.")
    again = await run("reindex", "guide/notes.txt", "--tenant", "acme")
    assert again.stdout == "guide/notes.txt: completed, 1 chunk\n"
    (found,) = (await data_of(run, "ask", "beavers", "--k", "1", "--mode", "keyword"))["passages"]
    assert found["text"] == "Now it is about beavers."


async def test_how_far_a_single_large_document_is_is_shown_in_chunks(
    docs: Path, worker: RagWorker, client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", Terminal())
    (docs / "large.md").write_text("\n\n".join(f"# Part {number}\n\nwords of it" for number in range(200)))
    files = find_files([docs / "large.md"], Patterns(), None, pytest.fail)
    totals = IngestTotals(found=1)
    await ingest_files(client, files, IngestOrder("acme", wait_s=25), totals)
    assert (totals.completed, totals.chunks) == (1, 200)
    assert totals.doing == (1.0, "storing: 200 of 200 chunks")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True
