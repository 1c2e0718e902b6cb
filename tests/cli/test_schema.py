"""`aiqueue schema`: what it prints, what it refuses, and that it neither asks a server nor shows what it must not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pydantic
import pytest
from typer.testing import CliRunner, Result

import aiqueue
from aiqueue import __version__
from aiqueue.cli.app import app
from aiqueue.schema import ASYNCAPI

from .test_hostile import HOSTILE, MEGABYTE, SECRET, raw

HERE = "tests.cli.test_schema"


class Ask(aiqueue.Message[int], kind="ask"):
    text: str


class Other(aiqueue.Message, kind="ask"):
    number: int


class Query(aiqueue.Message, kind="rag.query", family="rag.queries"):
    question: str


class Foreign(aiqueue.Message, kind="foreign", family="no.family"):
    pass


class Hostile(aiqueue.Message, kind="hostile"):
    __doc__ = "".join(HOSTILE)
    fields: Annotated[dict[str, Any], pydantic.Field(description="\n".join(HOSTILE), examples=[HOSTILE])] = (
        pydantic.Field({each: each for each in HOSTILE})
    )
    key: pydantic.SecretStr = pydantic.Field(pydantic.SecretStr(SECRET), title="".join(HOSTILE[:5]))


class Broken(aiqueue.Message, kind="broken"):
    @classmethod
    def __get_pydantic_json_schema__(cls, *_: Any) -> Any:
        raise RuntimeError("\x1b[2J no\nschema")


def serve(*messages: type[Any], **options: Any) -> aiqueue.Worker:
    made = aiqueue.Worker(**options)
    for each in messages:
        made.handle(each)(lambda job: None)
    return made


worker, other, hostile, foreign = serve(Ask, Query), serve(Other), serve(Hostile), serve(Foreign)
broken, empty, narrow = serve(Broken, Ask), serve(), serve(Ask, Query, families=["rag.queries"])
number = 1


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(app, ["schema", *arguments], env=environment)


def printed(*arguments: str) -> Any:
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_it_prints_asyncapi_unless_another_format_is_named() -> None:
    document = printed(f"{HERE}:worker")
    assert document["asyncapi"] == "3.0.0"
    assert document["info"]["title"] == f"{HERE}:worker"
    assert document["info"]["version"] == "unversioned"
    assert document["x-aiqueue"] == {"version": __version__}
    bundle = printed(f"{HERE}:worker", "--format", "json-schema")
    assert bundle["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert __version__ in bundle["$comment"]
    assert set(bundle["$defs"]) == {
        "Ask", "Query", "message.agent.tasks.ask", "result.agent.tasks.ask", "message.rag.queries.rag.query",
    }  # fmt: skip


def test_title_and_version_can_be_given() -> None:
    info = printed("--title", "Shop", "--api-version", "2.1")["info"]
    assert (info["title"], info["version"]) == ("Shop", "2.1")


def test_without_a_program_it_describes_the_families_alone() -> None:
    document = printed()
    assert {"agent.tasks", "gateway.requests", "agent.message"} <= set(document["channels"])
    assert "send.agent.tasks.any" in document["operations"]


def test_families_and_kinds_are_selected() -> None:
    families = {name for name in printed("--family", "rag.queries")["channels"] if name.count(".") == 1}
    assert families == {"rag.queries"}
    for options in (("--kind", "ask"), ("--family", "agent.tasks"), ("--family", "agent.tasks", "--kind", "ask")):
        found = printed(f"{HERE}:worker", "--format", "json-schema", *options)
        assert [each["$ref"] for each in found["anyOf"]] == ["#/$defs/message.agent.tasks.ask"]
    both = printed(f"{HERE}:worker", "--format", "json-schema", "--kind", "ask,rag.query")
    assert len(both["anyOf"]) == 2
    narrowed = printed(f"{HERE}:narrow", "--format", "json-schema")
    assert [each["$ref"] for each in narrowed["anyOf"]] == ["#/$defs/message.rag.queries.rag.query"]


def test_several_programs_are_one_document_and_one_named_twice_counts_once() -> None:
    found = printed(f"{HERE}:worker", f"{HERE}:hostile", f"{HERE}:worker", "--format", "json-schema")
    assert len(found["anyOf"]) == 3


def test_what_is_not_selected_refuses_nothing() -> None:
    programs = f"{HERE}:worker", f"{HERE}:other", f"{HERE}:foreign"
    found = printed(*programs, "--format", "json-schema", "--kind", "rag.query")
    assert len(found["anyOf"]) == 1


def test_a_kind_that_cannot_be_described_does_not_keep_others_from_it() -> None:
    found = printed(f"{HERE}:broken", "--format", "json-schema", "--kind", "ask")
    assert len(found["anyOf"]) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([f"{HERE}:missing"], "has no attribute 'missing'; the module has broken"),
        ([f"{HERE}:number"], "is of type int, not an aiqueue.Worker or Agent"),
        (["app"], "is not MODULE:ATTRIBUTE; for `worker = aiqueue.Worker()` in app.py, give app:worker"),
        (["no_module:worker"], "no module 'no_module'"),
        ([f"{HERE}:empty"], "has no handlers: register one with @worker.handle(YourMessage)"),
        ([f"{HERE}:foreign"], "unknown family 'no.family'; declared families: "),
        ([f"{HERE}:worker", f"{HERE}:other"], f"kind 'ask' of agent.tasks is two classes, {HERE}.Ask in {HERE}:worker"),
        ([f"{HERE}:broken"], f"no JSON Schema can be made of class {HERE}.Broken"),
        ([f"{HERE}:worker", "--kind", "answer"], "has no handler for kind answer: it has ask, rag.query"),
        (
            [f"{HERE}:worker", "--family", "rag.ingest"],
            "handles nothing of rag.ingest, but of agent.tasks, rag.queries",
        ),
        ([f"{HERE}:worker", "--family", "rag.queries", "--kind", "ask"], "ask is no kind of rag.queries"),
        ([f"{HERE}:worker", "--kind", ""], "--kind is empty: name at least one"),
        ([f"{HERE}:worker", "--family", ","], "--family is empty: name at least one"),
        (["--family", "no.family"], "unknown family 'no.family'; declared families: "),
        (["--kind", "ask"], "kinds are known from code: name the program of ask, such as app:worker"),
        (["--format", "json-schema"], "there is no class of a message to describe: name a program"),
        (["--streams", "/nowhere"], "/nowhere"),
        (["--url", "http://user:s3cret@host"], "not an address of NATS (http://): use nats://"),
    ],
)
def test_wrong_input_is_one_line_that_says_what_to_do(arguments: list[str], says: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert raw(done.stderr) == set()
    assert "s3cret" not in done.stderr


def test_an_unknown_format_is_refused() -> None:
    done = run("--format", "yaml")
    assert done.exit_code == 2
    assert "asyncapi" in done.output


@pytest.mark.parametrize("form", ["asyncapi", "json-schema"])
def test_hostile_texts_reach_no_terminal_and_no_secret_is_shown(form: str) -> None:
    done = run(f"{HERE}:hostile", "--format", form, "--title", "\x1b[2J\u202e", COLUMNS="80")
    assert done.exit_code == 0, done.stderr
    assert raw(done.stdout) == set()
    assert SECRET not in done.stdout
    assert MEGABYTE in done.stdout  # a class is one's own code: it is described whole
    assert "\\u001b" in done.stdout


def test_credentials_of_the_settings_are_not_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "aiqueue.toml").write_text('url = "nats://me:s3cret@nats.example:4222"\n')
    for name in ("NATS_URL", "AIQUEUE_URL"):
        monkeypatch.delenv(name, raising=False)
    done = run(f"{HERE}:worker")
    assert json.loads(done.stdout)["servers"]["server"]["host"] == "nats.example:4222"
    assert "s3cret" not in done.stdout
    assert "me:" not in done.stdout


def test_it_asks_no_server_starts_none_and_prints_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "import aiqueue\nprint('imported')\nclass Ask(aiqueue.Message, kind='ask'):\n    text: str\n"
        "worker = aiqueue.Worker()\n@worker.handle(Ask)\nasync def ask(job): ...\n"
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith(("NATS_", "AIQUEUE_"))}
    command = [sys.executable, "-m", "aiqueue", "schema", "app:worker"]
    root = Path(__file__).parents[2]
    for more in ({}, {"NATS_URL": "nats://127.0.0.1:1"}):
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=env | {"PYTHONPATH": str(root)} | more,
            capture_output=True,
            timeout=60,
            check=True,
        )
        assert json.loads(done.stdout)["asyncapi"]
        assert done.stderr == b"imported\n"
    assert sorted(each.name for each in tmp_path.iterdir() if each.name != "__pycache__") == ["app.py"]


def test_the_help_names_the_versions() -> None:
    text = run("--help", COLUMNS="200").output
    assert ASYNCAPI in text
    assert "2020-12" in text
