"""`aiqueue gateway batch` has the lines of a file answered, and saves what becomes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import aiqueue
from aiqueue.gateway import Batches

from ..running import RunCommand, running
from .lines import chat_line, jsonl

ACME = ("--tenant", "acme")


async def test_a_file_is_answered_and_its_answers_are_saved_beside_it(
    client: aiqueue.Client, config: Path, run: RunCommand, tmp_path: Path
) -> None:
    file = tmp_path / "in.jsonl"
    file.write_bytes(b"\n" + jsonl([*map(chat_line, range(3)), chat_line(3, model="none")]))
    async with running(client, config):
        result = await run("batch", file, *ACME)
    assert (result.exit_code, result.stderr) == (1, "")
    first, *places = result.stdout.splitlines()
    assert first.endswith(" completed: 4 lines, 3 answered, 1 failed")
    assert [each.split() for each in places] == [
        ["output", str(tmp_path / "in.output.jsonl")],
        ["errors", str(tmp_path / "in.errors.jsonl")],
    ]
    answers = [json.loads(each) for each in (tmp_path / "in.output.jsonl").read_text().splitlines()]
    assert sorted(each["custom_id"] for each in answers) == ["c0", "c1", "c2"]
    (error,) = [json.loads(each) for each in (tmp_path / "in.errors.jsonl").read_text().splitlines()]
    assert error["custom_id"] == "c3"


async def test_a_batch_is_waited_for_again(
    client: aiqueue.Client, config: Path, run: RunCommand, tmp_path: Path
) -> None:
    file, saved = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_bytes(jsonl(map(chat_line, range(2))))
    begun = await run("batch", file, "--no-wait", "--json", *ACME)
    assert begun.exit_code == 0
    assert begun.stderr == (
        "no gateway worker is running: start `aiqueue work aiqueue.gateway:worker`; the batch waits for one\n"
    )
    batch = json.loads(begun.stdout)
    looked = await run("batch", "--resume", batch["id"], "--no-wait", *ACME)
    assert looked.stdout == f"{batch['id']} validating\n"
    assert looked.stderr.endswith(
        f"\nits answers are saved by `aiqueue gateway batch --resume {batch['id']} --tenant acme`\n"
    )
    assert batch["status"] == "validating"
    async with running(client, config):
        ended = await run("batch", "--resume", batch["id"], "--output", saved, *ACME)
    assert (ended.exit_code, len(saved.read_text().splitlines())) == (0, 2)
    assert ended.stdout.startswith(f"{batch['id']} completed: 2 lines, 2 answered, 0 failed\n")


async def test_a_refused_batch_says_why_in_a_line_for_each_problem(
    client: aiqueue.Client, config: Path, run: RunCommand, tmp_path: Path
) -> None:
    file = tmp_path / "in.jsonl"
    file.write_bytes(jsonl([chat_line(1), chat_line(1)]) + b"{\n")
    async with running(client, config):
        result = await run("batch", file, *ACME)
    assert result.exit_code == 1
    assert "line 2 has the custom_id of an earlier line: c1" in result.stdout
    assert "line 3 is no JSON" in result.stdout


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "No such file or directory"),
        ("", "in.jsonl' is empty: write a request a line"),
        ("\n\n", "in.jsonl' is empty: write a request a line"),
        ("7\n", "its first line must be a JSON object"),
        ('{"url": ["/v1/embeddings"]}\n', "its first line must be a JSON object"),
        (
            '{"url": "/v1/responses"}\n',
            'its first line must be a JSON object whose "url" is one of /v1/chat/completions, ',
        ),
    ],
)
async def test_a_wrong_file_is_an_error_in_one_line(
    client: aiqueue.Client, run: RunCommand, tmp_path: Path, text: str | None, problem: str
) -> None:
    file = tmp_path / "in.jsonl"
    if text is not None:
        file.write_text(text)
    result = await run("batch", file, *ACME)
    assert result.exit_code == 2
    assert problem in result.stderr
    assert len(result.stderr.splitlines()) == 1


async def test_a_new_batch_and_an_earlier_one_are_not_both_named(client: aiqueue.Client, run: RunCommand) -> None:
    neither, both = await run("batch", *ACME), await run("batch", "in.jsonl", "--resume", "batch_1", *ACME)
    assert (neither.exit_code, both.exit_code) == (2, 2)
    assert neither.stderr.startswith("error: neither FILE nor --resume is given: name a FILE")
    assert both.stderr.startswith("error: both FILE and --resume are given: name a FILE")


@pytest.mark.parametrize(
    ("option", "place", "problem"),
    [
        ("--output", ".", "it is not a regular file; choose another --output"),
        ("--errors", "/dev/null", "it is not a regular file; choose another --errors"),
        ("--output", "none/out.jsonl", "there is no such directory; choose another --output"),
        ("--output", "in.jsonl", "must be different files"),
        ("--errors", "in.output.jsonl", "must be different files"),
    ],
)
async def test_a_place_that_cannot_be_written_is_refused_before_a_line_is_paid_for(
    client: aiqueue.Client, run: RunCommand, tmp_path: Path, option: str, place: str, problem: str
) -> None:
    file = tmp_path / "in.jsonl"
    file.write_bytes(body := jsonl([chat_line(1)]))
    result = await run("batch", file, option, tmp_path / place, *ACME)
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert problem in result.stderr
    assert file.read_bytes() == body
    assert await Batches(client).batches("acme") == []


async def test_batches_are_listed_of_one_tenant_or_of_all_the_newest_first(
    client: aiqueue.Client, config: Path, run: RunCommand, tmp_path: Path
) -> None:
    assert (await run("batches")).stdout == "no batches\n"
    file = tmp_path / "in.jsonl"
    file.write_bytes(jsonl([*map(chat_line, range(2)), chat_line(2, model="none")]))
    async with running(client, config):
        await run("batch", file, *ACME)
    await run("batch", file, "--no-wait", "--tenant", "globex")
    listed = json.loads((await run("batches", "--json")).stdout)
    assert {(each["tenant"], each["status"]) for each in listed} == {("acme", "completed"), ("globex", "validating")}
    (batch,) = json.loads((await run("batches", "--json", *ACME)).stdout)
    assert batch["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    shown = await run("batches", *ACME)
    assert f"{batch['id']}  acme    completed    3/3       1" in shown.stdout
    assert (await run("batches", "--limit", "1")).stderr == "1 older batches are not shown: raise --limit\n"
    assert (await run("batches", "--tenant", "initech")).stdout == "no batches of tenant initech\n"
