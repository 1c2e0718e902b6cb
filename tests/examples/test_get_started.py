"""The pages of docs/get-started, followed as a reader does: files are saved, commands are typed, services stay."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from aiqueue.server import supervisor

from ..support import ROOT

WITHIN_S = 60
PAGES = ROOT / "docs/get-started"
STEP = re.compile(
    r"[Ss]ave this as `(?P<file>[\w.]+)`(?:,? and run `(?P<run>[^`]+)`)?:\n\n```\w+\n(?P<text>.*?)^```"
    r"|^```sh\n(?P<commands>.*?)^```",
    re.MULTILINE | re.DOTALL,
)
STAYS = re.compile(r"aiqueue (gateway )?(work|serve)\b|standin\b")
SHOWS = {  # of each page, what its commands print
    "first-job": {"python app.py": "…", "aiqueue inspect agent.tasks": "acme"},
    "first-agent": {"python agents.py": "Dune is on shelf 3", "aiqueue inbox read": "Emma is on shelf 3"},
    "first-gateway": {
        "aiqueue enqueue": '"response": "Say hello.',
        "aiqueue gateway usage": "acme",
        "curl": '"object":"chat.completion"',
    },
    "first-rag": {"aiqueue rag ask": "otters.md > Otters", "aiqueue rag ls": "completed"},
}


class Step(NamedTuple):
    """One thing that a page says to do: save a file, or type a command."""

    command: str
    file: str = ""
    text: str = ""


def steps(page: str) -> Iterator[Step]:
    for found in STEP.finditer((PAGES / f"{page}.md").read_text()):
        if found["file"]:
            yield Step("", found["file"], found["text"])
            if found["run"]:
                yield Step(found["run"])
        else:
            yield from map(Step, found["commands"].replace("\\\n", "").splitlines())


class Reader:
    """Who follows a page in an empty directory, with ports that are free here."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(("NATS_", "AIQUEUE_"))}
        self.env |= {"PATH": path, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "120"}
        self.ports = {port: str(supervisor.free_port()) for port in ("8080", "8000")}
        self.services: list[subprocess.Popen[str]] = []

    def here(self, text: str) -> str:
        return re.sub(r"\b(8080|8000)\b", lambda port: self.ports[port[0]], text)

    def follow(self, step: Step, shows: str) -> None:
        if step.file:
            (self.directory / step.file).write_text(self.here(step.text))
        elif step.command.startswith("export "):
            key, _, value = step.command.removeprefix("export ").partition("=")
            self.env[key] = value
        elif STAYS.search(step.command):
            self.start(self.here(step.command))
        else:
            self.run(self.here(step.command), shows)

    def start(self, command: str) -> None:
        log = self.directory / f"service-{len(self.services)}.log"
        with log.open("w") as file:
            self.services.append(
                subprocess.Popen(
                    ["bash", "-c", f"exec {command}"],
                    cwd=self.directory,
                    env=self.env,
                    stdout=file,
                    stderr=file,
                    text=True,
                )
            )
        end = time.monotonic() + WITHIN_S
        while "127.0.0.1" not in log.read_text():  # each says where it serves, or which server it uses
            assert self.services[-1].poll() is None, log.read_text()
            assert time.monotonic() < end, f"{command}: {log.read_text()}"
            time.sleep(0.05)

    def run(self, command: str, shows: str) -> None:
        """Run a command until it succeeds and shows this: a reader types what comes too early once more."""
        end = time.monotonic() + WITHIN_S
        while True:
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=self.directory, env=self.env, capture_output=True, text=True, timeout=WITHIN_S, check=False,
            )  # fmt: skip
            if done.returncode == 0 and shows in done.stdout:
                break
            assert time.monotonic() < end, (command, done)
            time.sleep(0.2)
        if token := re.search(r"^aiq-\S+", done.stdout, re.MULTILINE):
            self.env["KEY"] = token[0]

    def leave(self) -> None:
        for service in reversed(self.services):
            service.send_signal(signal.SIGINT)
        for service in self.services:
            service.wait(WITHIN_S)


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    reader = Reader(tmp_path)
    yield reader
    reader.leave()


def test_all_first_pages_are_followed() -> None:
    assert {page.stem for page in PAGES.glob("*.md")} - {"README"} == set(SHOWS)


@pytest.mark.timeout(3 * WITHIN_S)
@pytest.mark.parametrize("page", SHOWS)
def test_a_reader_who_types_what_a_first_page_says_sees_what_the_page_promises(page: str, reader: Reader) -> None:
    left = dict(SHOWS[page])
    for step in steps(page):
        begins = next((each for each in left if step.command.startswith(each)), None)
        reader.follow(step, left.pop(begins) if begins else "")
    assert left == {}
