"""The documentation is true: its code runs, its commands exist, its links lead somewhere, its tables are complete."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple, get_args

import pytest
import typer
from typer.testing import CliRunner

import aiqueue
from aiqueue import headers
from aiqueue.cli.app import app
from aiqueue.config import Settings
from aiqueue.inspect.finding import REMEDIES, WHEN_FULL
from aiqueue.server.embedded import DIRECTORY, EmbeddedServer
from aiqueue.topology import provision
from aiqueue.topology.declared import Topology
from aiqueue.topology.problems import FATAL_SETTINGS

from .support import ROOT, Account

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
BLOCK_S = 60
GROUPS = ("dead", "documents", "gateway", "inbox", "jobs", "limits", "rag", "schedule")  # verbs with verbs of their own
NESTED = (["gateway", "keys"],)  # and with such as have some, too
_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6}\s+(.+)$", re.MULTILINE)


class Block(NamedTuple):
    """A fenced block of a page: where, the words behind its fence, its text."""

    page: Path
    line: int
    info: str
    text: str


class Command(NamedTuple):
    """A command line in a page: its verb (one or two words) and options."""

    page: Path
    verb: tuple[str, ...]
    options: tuple[str, ...]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks() -> list[Block]:
    return [
        Block(page, text.count("\n", 0, fence.start()) + 1, fence[1].strip(), fence[2])
        for page in PAGES
        for text in [page.read_text()]
        for fence in _FENCE.finditer(text)
    ]


def prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text())


PYTHON = [block for block in blocks() if block.info == "python"]


@pytest.fixture(scope="module")
def server_of() -> Iterator[Callable[[Path], EmbeddedServer]]:
    """The embedded server of a directory, held until the module ends, so that the blocks of a page share one."""
    held: dict[Path, EmbeddedServer] = {}

    def hold(directory: Path) -> EmbeddedServer:
        if directory not in held:
            held[directory] = EmbeddedServer.acquire(directory / DIRECTORY)
        return held[directory]

    yield hold
    for server in held.values():
        server.release()


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    return cache(lambda page: tmp_path_factory.mktemp(page.stem))


# Runs block.py in each directory that it is told, in a process of its own, as `python block.py` does. What all blocks
# import is loaded once, and half of their time went there.
FORKS = """
import json, os, runpy, sys
import aiqueue
for name in aiqueue.__all__:
    getattr(aiqueue, name)
for line in sys.stdin:
    directory, environment = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environment)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for fd in (1, 2):
            os.dup2(os.open("output", os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
        sys.argv, sys.path[0] = ["block.py"], directory
        runpy.run_path("block.py", run_name="__main__")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def run_block() -> Iterator[Callable[[Path, dict[str, str]], int]]:
    """A function that runs block.py of a directory and returns its exit code; what it printed is in `output` there."""
    env = {key: value for key, value in os.environ.items() if not key.upper().startswith(("NATS_URL", "AIQUEUE_"))}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    with subprocess.Popen(
        [sys.executable, "-c", FORKS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=env,
        text=True,
        start_new_session=True,
    ) as forks:
        assert forks.stdin is not None
        assert forks.stdout is not None
        stdin, stdout = forks.stdin, forks.stdout

        def run(directory: Path, more: dict[str, str]) -> int:
            stdin.write(json.dumps([str(directory), env | more]) + "\n")
            stdin.flush()
            try:
                return int(stdout.readline())
            except BaseException:  # the block takes too long
                os.killpg(forks.pid, signal.SIGKILL)
                raise

        yield run
        stdin.close()


@pytest.mark.timeout(BLOCK_S)
@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"{name_of(block.page)}:{block.line}")
def test_python_blocks_run_as_they_stand(
    block: Block,
    places: Callable[[Path], Path],
    server_of: Callable[[Path], EmbeddedServer],
    run_block: Callable[[Path, dict[str, str]], int],
) -> None:
    place = places(block.page)
    server = server_of(place)
    more = {}
    if "NATS_URL" in block.text:  # for plain clients: a server with credentials in its address, its streams applied
        more["NATS_URL"] = f"nats://{server.user}:{server.password}@127.0.0.1:{server.port}"
        asyncio.run(_declare(place / DIRECTORY))
    directory = place / f"line-{block.line}"  # finds the server by the .aiqueue above it
    directory.mkdir()
    (directory / "block.py").write_text(block.text)
    assert run_block(directory, more) == 0, f"{name_of(block.page)}:{block.line}\n{(directory / 'output').read_text()}"


async def _declare(directory: Path) -> None:
    async with aiqueue.Client(Settings(directory=directory).model_copy(update={"url": None, "context": None})):
        pass


def test_no_python_block_is_passed_over_silently() -> None:
    for block in blocks():
        where = f"{name_of(block.page)}:{block.line}"
        assert block.info, f"{where}: say what it is: python, sh, toml, text"
        if "py" in block.info:
            assert block.info in ("python", "python fragment"), f"{where}: python, or python fragment"
        if block.info == "python fragment":
            compile(block.text, where, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        if block.info == "toml":
            tomllib.loads(block.text)
    assert PYTHON


def test_the_readmes_example_is_that_of_the_first_job() -> None:
    first = {
        page: next(block.text for block in PYTHON if name_of(block.page) == page)
        for page in ("README.md", "docs/get-started/first-job.md")
    }
    assert first["README.md"] == first["docs/get-started/first-job.md"]


def commands() -> list[Command]:
    lines = [(page, span) for page in PAGES for span in _SPAN.findall(prose(page))]
    lines += [
        (block.page, line) for block in blocks() if block.info in ("sh", "text") for line in block.text.splitlines()
    ]
    found = set()
    for page, line in lines:
        words = line.removeprefix("$ ").partition("#")[0].split()
        if words[:1] != ["aiqueue"] or len(words) == 1 or not re.fullmatch(r"[a-z-]+", words[1]):
            continue
        depth = 4 if words[1:3] in NESTED else 3 if words[1] in GROUPS else 2
        verbs = words[1:depth]
        plain = tuple(word for word in verbs if re.fullmatch(r"[a-z]+(-[a-z]+)*", word))
        options = tuple(word.partition("=")[0] for word in words if word.startswith("--"))
        found.add(Command(page, plain, options))
    return sorted(found)


@cache
def help_of(*verb: str) -> str:
    done = CliRunner().invoke(app, [*verb, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert done.exit_code == 0, f"aiqueue {' '.join(verb)}: {done.output}"
    return done.stdout


def test_commands_in_the_pages_exist() -> None:
    found = commands()
    assert len({command.verb for command in found}) > 5
    for page, verb, options in found:
        text = help_of(*verb)
        for option in options:
            assert re.search(rf"{option}(?![\w-])", text), f"{name_of(page)}: aiqueue {' '.join(verb)} has no {option}"


def test_no_help_has_a_word_in_brackets_which_a_terminal_does_not_show() -> None:
    found, commands_left = [], [typer.main.get_command(app)]
    while commands_left:
        command = commands_left.pop()
        commands_left += getattr(command, "commands", {}).values()
        found += [command.help or "", *(getattr(each, "help", None) or "" for each in command.params)]
    assert len(found) > 500
    assert [text for text in found if re.search(r"\[[a-z]+\]", text)] == []


def test_every_verb_is_on_the_page_of_commands() -> None:
    page = (ROOT / "docs/reference/commands.md").read_text()
    verbs = re.findall(r"^\W*([a-z-]+)\s{2,}[A-Z]", help_of().partition("Commands")[2], re.MULTILINE)
    verbs += [
        f"{group} {verb}"
        for group in GROUPS
        for verb in re.findall(r"^\W*([a-z-]+)\s{2,}[A-Z]", help_of(group).partition("Commands")[2], re.MULTILINE)
    ]
    assert {"apply", "work", "dead ls"} <= set(verbs)
    assert [verb for verb in verbs if not re.search(rf"aiqueue {verb}\b", page)] == []


def anchors(page: Path) -> set[str]:
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in _HEADING.findall(prose(page))
    }


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{name_of(page)}: {target}"
        assert not anchor or anchor in anchors(found), f"{name_of(page)}: {target}: no such heading"


_FILE = re.compile(r"(?:[\w.-]+/)+[\w-]+\.(?:py|toml|md|mjs)")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_of_the_package_and_the_tests_exist(page: Path) -> None:
    roots = (ROOT, ROOT / "aiqueue", page.parent)
    named = [span for span in _SPAN.findall(prose(page)) if _FILE.fullmatch(span)]
    missing = [span for span in named if not any((root / span).exists() for root in roots)]
    assert not missing


def test_pages_that_the_code_names_exist() -> None:
    named = re.findall(r"docs/[\w/-]+\.md", "".join(file.read_text() for file in (ROOT / "aiqueue").rglob("*.py")))
    assert named
    assert not [page for page in named if not (ROOT / page).is_file()]


def troubles() -> dict[str, list[str]]:
    """The rows of the tables of docs/operations/findings.md by the code, or setting, in the first column."""
    rows = re.findall(r"^\| `([\w-]+)` \|(.+)\|$", (ROOT / "docs/operations/findings.md").read_text(), re.MULTILINE)
    assert len({code for code, _ in rows}) == len(rows)
    return {code: [cell.strip() for cell in rest.split(" | ")] for code, rest in rows}


def test_every_finding_of_doctor_is_on_the_page_of_findings() -> None:
    settings = {each.key for each in FATAL_SETTINGS}
    assert set(troubles()) == set(REMEDIES) | settings
    assert all(len(cells) == 2 and all(cells) for cells in troubles().values())
    for code in REMEDIES:
        assert re.search(r"`(aiqueue|nats|nats-server|timedatectl) .+?`", troubles()[code][1]), f"{code}: no command"


def test_every_remedy_of_doctor_contains_a_command() -> None:
    remedies = {**REMEDIES, **{f"stream-full {role}": advice for role, advice in WHEN_FULL.items()}}
    del remedies["stream-full"]  # one for each role
    command = re.compile(r"`(aiqueue|nats|nats-server|timedatectl) .+?`")
    assert not [code for code, remedy in remedies.items() if not command.search(remedy)]
    for remedy in remedies.values():
        for words in re.findall(r"`aiqueue ([^`]+)`", remedy):
            verb = words.split()[:2] if words.split()[0] in GROUPS else words.split()[:1]
            assert all(option in help_of(*verb) for option in words.split() if option.startswith("--")), words


def test_the_codes_of_doctor_are_those_that_the_checks_use() -> None:
    source = "".join(file.read_text() for file in (ROOT / "aiqueue/inspect").glob("*.py"))
    source += (ROOT / "aiqueue/topology/problems.py").read_text().partition("REMEDIES: ")[2]
    used = [code for code in REMEDIES if len(re.findall(rf'"{code}"', source)) > 1 or f'f"{code}' in source]
    assert set(REMEDIES) - set(used) <= {"foreign-mirror", "foreign-source"}  # these two are made of their kind


async def test_the_program_that_copies_messages_moves_jobs_of_an_invalid_tenant_so_that_they_run(
    account: Account, tmp_path: Path
) -> None:
    class Ping(aiqueue.Message, kind="ping"):
        n: int

    program = next(block for block in PYTHON if name_of(block.page) == "docs/operations/copy-messages.md")
    (tmp_path / "rescue.py").write_text(program.text)
    url = account.url.replace("//", f"//{account.user}:{account.password}@")

    def run(step: str) -> None:
        command = [sys.executable, "rescue.py", step]
        env = os.environ | {"NATS_URL": url}
        subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=BLOCK_S)

    worker = aiqueue.Worker()
    worker.handle(Ping)(lambda job: (job.tenant, job.message.n))
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await provision.apply(client.connection, client.topology)
        extra = {
            "Nats-Msg-Id": "one",
            headers.KIND: "ping",
            headers.JOB_ID: "j-1",
            headers.CONTENT_TYPE: "application/json",
        }
        await client.connection.store("ai.agent.tasks.a@b", b'{"n": 7}', extra)
        await asyncio.to_thread(run, "save")
        purge = {"filter": "ai.agent.tasks.a@b.normal"}
        await client.connection.api("STREAM.PURGE.AI_AGENT_TASKS", purge)
        await asyncio.to_thread(run, "publish")
        async with worker.running(client):
            handle = await client.job("j-1", family="agent.tasks", tenant="a-b")
            assert await handle.result(25) == ["a-b", 7]


def test_every_decision_is_in_the_index() -> None:
    index = ROOT / "docs/decisions/README.md"
    assert set(_LINK.findall(index.read_text())) == {page.name for page in index.parent.glob("*.md")} - {index.name}


def test_every_public_name_has_a_docstring() -> None:
    for name in set(aiqueue.__all__) - {"JobState"}:  # a Literal has none: the next test
        assert (getattr(aiqueue, name).__doc__ or "").strip(), name


def test_the_table_of_states_has_each_of_job_state() -> None:
    section = (
        (ROOT / "docs/concepts/job-lifecycle.md").read_text().partition("## States of a job")[2].partition("```")[0]
    )
    assert sorted(re.findall(r"^\| (\w+) \| .{20}", section, re.MULTILINE)) == sorted(get_args(aiqueue.JobState))


def test_the_glossary_is_in_order_and_defines_each_term_once() -> None:
    words = re.findall(r"^\| \*\*(.+?)\*\*", (ROOT / "docs/reference/glossary.md").read_text(), re.MULTILINE)
    assert words == sorted(set(words), key=str.lower)


def test_the_rooms_are_those_that_are_enforced() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    enforced = [{name.strip() for name in layer.split("|")} for layer in contract["layers"]]
    rows = re.findall(r"^\| (\d+) \| `(\w+)/?` \|", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE)
    levels = [{room for level, room in rows if level == each} for each in dict.fromkeys(level for level, _ in rows)]
    assert levels == enforced


def test_the_wire_contract_has_all_headers_subjects_and_streams() -> None:
    pages = [ROOT / "docs/reference/wire-contract.md", *ROOT.glob("docs/reference/wire/*.md")]
    text = "".join(each.read_text() for each in pages)
    names = [value for name, value in vars(headers).items() if name.isupper() and isinstance(value, str)]
    topology = Topology.load()
    subjects = [f"ai.{family}.{{tenant}}" for family in topology.families]
    journals = [f"{family.journal}.{{tenant}}" for family in topology.families.values() if family.journal]
    streams = [topology.journal_stream.name, topology.dead_stream.name, topology.documents_stream.name]
    missing = [each for each in [*names, *subjects, *journals, *streams] if each not in text]
    assert not missing


def test_the_changelog_has_the_version() -> None:
    assert f"## {aiqueue.__version__}" in (ROOT / "CHANGELOG.md").read_text()
