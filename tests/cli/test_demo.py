from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from aiqueue import connect
from aiqueue.cli import main
from aiqueue.cli.demo import analysis
from aiqueue.cli.json_keys import OUTPUTS
from aiqueue.config import Settings
from aiqueue.topology import provision
from tools.docs.json_text import problems_of

from ..support import ROOT, Account, processes, wait_until

WITHIN_S = 50

SOME = {
    "guide_md": "# Guide\n\nThe queue keeps a job until a worker has done it. It is on disk, and nothing is lost.\n",
    "notes_md": "# Notes\n\n## One\n\nLanes are for tenants.\n\n## Two\n\nA lane is the work of one tenant.\n",
    "code_py": "def lease() -> None:\n    '''Hold a job.'''\n",
    "facts_toml": '[stream]\nname = "AI"\n',
}
LATIN = "Gr\xfc\xdfe Nummer {}, und viel Gl\xfcck"


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def finish(process: subprocess.Popen[str]) -> Ended:
    with process:
        try:
            out, err = process.communicate(timeout=WITHIN_S)
        except BaseException:
            process.kill()
            raise
    return Ended(process.returncode, out, err)


class Place:
    """A directory with documents, and one for what the demo keeps while it runs."""

    def __init__(self, directory: Path) -> None:
        self.documents = directory / "documents"
        self.temporary = directory / "tmp"
        self.documents.mkdir()
        self.temporary.mkdir()
        self._started: list[subprocess.Popen[str]] = []

    def write(self, **files: str | bytes) -> None:
        for name, content in files.items():
            path = self.documents / name.replace("_", ".")
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AIQUEUE_", "NATS_"))}
        process = subprocess.Popen(
            [sys.executable, "-m", "aiqueue", "demo", *arguments],
            cwd=self.documents,
            env={**inherited, "TMPDIR": str(self.temporary), "PYTHONPATH": str(ROOT), "COLUMNS": "80", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._started.append(process)
        return process

    def end(self) -> None:
        """To be called when the test is over, or has failed half-way."""
        for process in self._started:
            if process.stdout is not None and not process.stdout.closed:
                process.terminate()
                finish(process)

    def run(self, *arguments: str, **environment: str) -> Ended:
        return finish(self.start(*arguments, **environment))

    def is_clean(self) -> bool:
        """Nothing is left, neither now nor in a moment: a process that has ended may still be on its way out."""
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not self.left())
        return not self.left()

    def left(self) -> list[str]:
        return [*map(str, self.temporary.iterdir()), *map(str, processes(str(self.temporary)))]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    place.end()


@pytest.fixture
def some(place: Place) -> Place:
    place.write(**SOME)
    return place


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Place, subprocess.Popen[str]]]]:
    """Three whole runs, which go on side by side: each takes its time to be watched."""
    places = {name: Place(tmp_path_factory.mktemp(name)) for name in ("own", "some", "latin")}
    places["some"].write(**SOME)
    places["latin"].write(**{f"n{number}_txt": LATIN.format(number).encode("cp1252") for number in range(5)})
    arguments = {"own": ("--tenants", "2"), "some": (".", "--json"), "latin": (".", "--json", "--keep")}
    started = {name: (place, place.start(*arguments[name])) for name, place in places.items()}
    yield started
    for place in places.values():
        place.end()


Runs = Mapping[str, tuple[Place, "subprocess.Popen[str]"]]


def report_of(out: str) -> dict[str, Any]:
    report = json.loads(out)
    assert isinstance(report, dict)
    assert problems_of(["demo", "--json"], out, OUTPUTS) == []
    return report


def sums(report: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(report["total"][name] for name in ("enqueued", "succeeded", "dead", "retries", "replays"))


def test_every_job_is_accounted_for_and_nothing_is_left_behind(runs: Runs) -> None:
    some, process = runs["some"]
    code, out, err = finish(process)
    assert (code, err) == (0, "")
    report = report_of(out)
    assert report["ok"] is True
    assert sums(report) == (10, 10, 0, 2, 1)  # four documents and the injected one, each ingested and analysed
    assert sum(row["enqueued"] for row in report["jobs"]) == 10
    assert {(row["tenant"], row["family"]) for row in report["jobs"]} == {
        (tenant, family) for tenant in ("acme", "globex", "initech") for family in ("rag.ingest", "agent.tasks")
    }
    (letter,) = report["dead_letters"]
    assert (letter["reason"], letter["attempt"], len(letter["history"])) == ("rejected", 1, 1)
    assert report["dead_letters_left"] == 0
    assert all(each["pending"] == each["in_flight"] == 0 for each in report["families"])
    assert sum(row["words"] for row in report["findings"]) > 50
    assert {language for row in report["findings"] for language in row["languages"]} >= {"en", "fr"}
    assert some.is_clean()
    assert len(list(some.documents.iterdir())) == len(SOME)


def test_several_documents_that_are_not_utf_8_are_all_replayed_and_can_be_kept(runs: Runs) -> None:
    place, process = runs["latin"]
    code, out, _ = finish(process)
    assert (code, sums(report_of(out))) == (0, (12, 12, 0, 2, 6))
    (kept,) = place.temporary.iterdir()
    assert report_of(out)["kept"] == str(kept)
    assert (kept / ".aiqueue" / "jetstream").is_dir()
    assert not processes(str(place.temporary))


@pytest.mark.parametrize(
    ("files", "argument", "says"),
    [
        ({}, "nowhere", "no such directory: nowhere"),
        ({"a_md": "# A\n"}, "a.md", "a.md is not a directory"),
        ({}, ".", "no text files in ."),
        ({"a_bin": b"\0\1\2", "b_bin": bytes(range(256))}, ".", "no text files in . (skipped: 2 binary)"),
        ({"a_md": ""}, ".", "no text files in . (skipped: 1 empty)"),
    ],
)
def test_a_directory_without_documents_is_refused_in_one_line(
    place: Place,
    files: dict[str, str | bytes],
    argument: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place.write(**files)
    monkeypatch.chdir(place.documents)
    monkeypatch.setattr(tempfile, "tempdir", str(place.temporary))
    monkeypatch.setattr(sys, "argv", ["aiqueue", "demo", argument])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, *capsys.readouterr()) == (2, "", f"error: {says}\n")
    assert place.is_clean()


@pytest.mark.slow
def test_a_signal_at_any_moment_ends_it_and_nothing_is_left(place: Place) -> None:
    moments = [
        ("documents from", signal.SIGINT, 130),
        ("private server", signal.SIGINT, 130),
        ("streams created", signal.SIGINT, 130),
        ("attempt 1", signal.SIGINT, 130),
        ("attempt 1", signal.SIGTERM, 143),
        ("attempt 1", signal.SIGHUP, 129),
    ]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup, which children inherit and obey
        moments.pop()
    started = [place.start() for _ in moments]
    for process, (line, number, _) in zip(started, moments, strict=True):
        assert process.stdout is not None
        assert process.stderr is not None
        assert any(line in each for each in process.stdout), process.stderr.read()
        process.send_signal(number)
    interrupted = "error: interrupted; everything is cleaned up\n"
    for process, (_, number, code) in zip(started, moments, strict=True):
        ended = finish(process)
        assert (ended.code, ended.err) == (code, interrupted if number == signal.SIGINT else ""), ended.out
    assert place.is_clean(), place.left()


def test_a_reader_who_leaves_ends_it_quietly(some: Place) -> None:
    with some.start(".") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(WITHIN_S) == 1
    assert some.is_clean()


async def test_on_a_named_server_it_asks_for_the_streams_and_leaves_them_empty(some: Place, account: Account) -> None:
    here = {"NATS_URL": account.url, "AIQUEUE_USER": account.user, "AIQUEUE_PASSWORD": account.password}
    code, _, err = await asyncio.to_thread(some.run, ".", **here)
    assert code == 1
    assert "run `aiqueue apply`" in err
    settings = Settings.load(url=account.url, user=account.user, password=account.password)
    async with connect(settings=settings) as client:
        await provision.apply(client.connection, client.topology)
        code, out, err = await asyncio.to_thread(some.run, ".", "--json", **here)
        assert (code, err) == (0, "")
        assert sums(report_of(out)) == (10, 10, 0, 2, 1)
        for stream in client.topology.streams:
            state = (await client.connection.api(f"STREAM.INFO.{stream}"))["state"]
            if client.topology.streams[stream].role != "metrics":  # what became of the jobs is kept
                assert (stream, state["messages"]) == (stream, 0)
            shared_by_workers = ("parked", "stranded", "ticks")  # roles of streams whose consumers all workers share
            if client.topology.streams[stream].role not in shared_by_workers:
                assert (stream, state["consumer_count"]) == (stream, 0)
    assert some.is_clean()


def test_the_story_of_its_own_documents_is_told_in_80_columns(runs: Runs) -> None:
    place, process = runs["own"]
    code, out, err = finish(process)
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    for expected in (
        "documents from aiqueue's own files, for 2 tenants", "23 streams created from streams/*.toml",
        "attempt 1 of", "attempt 2 of", "retry in", "the lock is released", "attempt 3 of",
        "became a dead letter (rejected)", "Dead letter 1", "was replayed and succeeded", "globex agent.tasks",
        "every job is accounted for", "its files are deleted",
    ):  # fmt: skip
        assert expected in text
    enqueued, succeeded, dead = re.findall(r"(\d+) jobs enqueued = (\d+) succeeded \+ (\d+) dead letters", text)[0]
    assert (int(enqueued) > 40, succeeded, dead) == (True, enqueued, "0")
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out
    assert place.is_clean()


def test_gathering_keeps_to_its_limits(tmp_path: Path) -> None:
    for number in range(analysis.DOCUMENTS_MAX + 1):
        (tmp_path / f"{number:03d}.txt").write_text("word")
    gathered = analysis.gather(tmp_path)
    assert (len(gathered.documents), gathered.more) == (analysis.DOCUMENTS_MAX, True)


def test_gathering_passes_over_what_is_no_document(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("text")
    (tmp_path / "big.txt").write_bytes(b"a" * (analysis.DOCUMENT_BYTES_MAX + 1))
    (tmp_path / "grows.txt").write_bytes(b"\xe9" * (analysis.DOCUMENT_BYTES_MAX - 1))
    (tmp_path / "link.md").symlink_to("a.md")
    (tmp_path / ".hidden").write_text("text")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("text")
    os.mkfifo(tmp_path / "pipe")
    gathered = analysis.gather(tmp_path)
    assert [each.name for each in gathered.documents] == ["a.md"]
    assert gathered.describe_skipped() == "1 unreadable, 2 above 512 KiB"


def test_a_name_cannot_command_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "a\x1b[2Jb.md").write_text("text")
    assert analysis.gather(tmp_path).documents[0].name == "a?[2Jb.md"


def test_a_text_is_told_from_the_others_by_its_own_words() -> None:
    found = analysis.distinctive({"a": [{"common": 5, "lease": 2}, {"common": 1}], "b": [{"common": 9, "inbox": 1}]}, 1)
    assert found == {"a": ["lease"], "b": ["inbox"]}


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The worker that holds a lease is the one that runs it, and it is not for the others to know " * 2, "en"),
        ("Der Arbeiter hält die Aufgabe, und sie ist nicht für den anderen, der auch auf eine wartet " * 2, "de"),
        ("L'ouvrier est dans la maison et les autres sont sur le toit avec une échelle pour lui " * 2, "fr"),
        ("zxcv qwer asdf " * 20, "?"),
        ("the end", "?"),
    ],
)
def test_languages_are_guessed_by_their_common_words(text: str, language: str) -> None:
    assert analysis.analyse("a.md", text)["language"] == language


def test_chunks_hold_the_whole_text() -> None:
    paragraphs = [f"paragraph {number} " + "word " * 30 for number in range(20)]
    pieces = analysis.split_text("\n\n".join(paragraphs), words=100)
    assert "\n\n".join(pieces) == "\n\n".join(paragraphs)
    assert all(100 <= len(piece.split()) < 140 for piece in pieces[:-1])
