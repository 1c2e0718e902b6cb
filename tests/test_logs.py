"""Log records of jobs, and what `aiqueue work` logs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiqueue
from aiqueue import headers, logs
from aiqueue.agent import Mail


class Hello(aiqueue.Message, kind="hello"):
    name: str = "x"


worker = aiqueue.Worker(concurrency=4)
log = logging.getLogger("shop")


@worker.handle(Hello)
async def hello(job: aiqueue.Job[Hello]) -> None:
    log.warning("hello from the loop")


class Threaded(aiqueue.Message, kind="threaded"):
    pass


@worker.handle(Threaded)
def threaded(job: aiqueue.Job[Threaded]) -> None:
    log.warning("hello from a thread")


class Parent(aiqueue.Message, kind="parent"):
    pass


@worker.handle(Parent)
async def parent(job: aiqueue.Job[Parent]) -> None:
    log.warning("before the child")
    await job.gather([("one", Hello())])


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    found: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record)

    handler = Keep()
    handler.addFilter(logs.JobFilter())
    log.addHandler(handler)
    yield found
    log.removeHandler(handler)


async def test_records_of_handlers_on_the_loop_and_in_threads_have_the_job(
    client: aiqueue.Client, records: list[logging.LogRecord]
) -> None:
    async with worker.running(client):
        ids = []
        for message in (Hello(), Threaded()):
            handle = await client.enqueue(message, tenant="acme")
            await handle.result(20)
            ids.append(handle.id)
    log.warning("outside")
    found = [tuple(getattr(each, name) for name in logs.FIELDS) for each in records]
    assert found == [
        (ids[0], "acme", "hello", 1, None), (ids[1], "acme", "threaded", 1, None), (None, None, None, None, None),
    ]  # fmt: skip


async def test_records_of_a_child_name_its_parent(client: aiqueue.Client, records: list[logging.LogRecord]) -> None:
    async with worker.running(client):
        handle = await client.enqueue(Parent(), tenant="acme")
        await handle.result(20)
    (of_child,) = (each for each in records if vars(each)["kind"] == "hello")
    assert vars(of_child)["parent"] == handle.id
    assert all(vars(each)["parent"] is None for each in records if each is not of_child)


async def test_records_of_a_mail_have_its_id(client: aiqueue.Client, records: list[logging.LogRecord]) -> None:
    agent = aiqueue.Agent("a", tenant="acme")

    @agent.handle(Hello)
    async def got(mail: Mail[Hello]) -> None:
        log.warning("mail")
        await mail.reply(Hello(name="back"))

    other = aiqueue.Agent("b", tenant="acme")
    async with agent.running(client), other.running(client):
        await other.request(Hello(), to="a", reply=Hello, timeout=20)
    (record,) = records
    assert (vars(record)["tenant"], vars(record)["kind"]) == ("acme", "hello")
    assert vars(record)["job_id"]


class RunningJob(NamedTuple):
    id: str = "j-1"
    tenant: str = "acme"
    kind: str = "page"
    attempt: int = 1
    headers: Mapping[str, str] = {}


def test_what_a_record_says_itself_stays() -> None:
    token = logs.running_job.set(RunningJob())
    try:
        record = make(kind="of the application", job_id="")
        assert logs.JobFilter().filter(record)
    finally:
        logs.running_job.reset(token)
    found = {name: vars(record)[name] for name in logs.FIELDS}
    assert found == {"job_id": "", "tenant": "acme", "kind": "of the application", "attempt": 1, "parent": None}


# lines


def make(message: str = "fetched %s", *args: Any, **attributes: Any) -> logging.LogRecord:
    record = logging.LogRecord("shop", logging.INFO, "f.py", 1, message, args or ("x",) if "%" in message else (), None)
    for name, value in attributes.items():
        setattr(record, name, value)
    return record


OF_A_JOB = {"job_id": "j-1", "tenant": "acme", "kind": "page", "attempt": 2, "parent": None}


def test_a_line_of_text_ends_with_the_job() -> None:
    formatter = logs.TextFormatter("%(levelname)s %(name)s: %(message)s")
    assert formatter.format(make(**OF_A_JOB)) == "INFO shop: fetched x job=j-1 tenant=acme kind=page attempt=2"


def test_a_line_of_text_that_names_the_job_names_it_once() -> None:
    formatter = logs.TextFormatter("%(message)s")
    assert formatter.format(make("job j-1 failed", **OF_A_JOB)) == "job j-1 failed"


def test_a_line_of_text_outside_of_jobs_is_plain() -> None:
    assert logs.TextFormatter("%(message)s").format(make()) == "fetched x"


def test_a_line_of_json_has_the_job_and_what_the_call_passed_as_extra() -> None:
    record = make(**OF_A_JOB, page=3, tags=["a"])
    found = json.loads(logs.JsonFormatter().format(record))
    stamp = found.pop("time")
    assert abs(datetime.fromisoformat(stamp).timestamp() - record.created) < 0.002
    assert found == {
        "level": "INFO", "logger": "shop", "message": "fetched x", "process": record.process,
        "job_id": "j-1", "tenant": "acme", "kind": "page", "attempt": 2, "page": 3, "tags": ["a"],
    }  # fmt: skip


def test_a_line_of_json_has_an_exception_and_its_traceback() -> None:
    try:
        int("broken\nline")
    except ValueError as error:
        record = make()
        record.exc_info = (type(error), error, error.__traceback__)
    line = logs.JsonFormatter().format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert found["error"] == "ValueError"
    assert "test_logs.py" in found["traceback"]
    formatted = make()  # by another formatter, or in another process: the exception itself is not there any more
    formatted.exc_text = "Traceback: of another process"
    assert json.loads(logs.JsonFormatter().format(formatted))["traceback"] == "Traceback: of another process"


def test_extra_cannot_replace_what_a_line_of_json_says_of_itself() -> None:
    found = json.loads(logs.JsonFormatter().format(make(level="fake", time="never", logger="other")))
    assert (found["level"], found["logger"]) == ("INFO", "shop")
    assert found["time"] != "never"


class Silent:
    def __str__(self) -> str:
        raise RuntimeError("no text")


CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, {(1, 2): 3}, b"x", Silent(), CYCLE, object(), "\ud800"])
def test_a_line_of_json_has_text_for_what_json_cannot_say(value: object) -> None:
    found = json.loads(logs.JsonFormatter().format(make(value=value)))
    assert "value" in found


class Silent:
    def __str__(self) -> str:
        raise ValueError("no text")


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({(1, 2): 3}, {"(1, 2)": 3}),
        ({"big": 10**5_000}, {"big": "<int: ValueError>"}),
        ({"nan": float("nan"), "big": 2**64}, {"nan": "nan", "big": str(2**64)}),
        ({"silent": Silent()}, {"silent": "<Silent: ValueError>"}),
    ],
)
def test_no_extra_of_an_application_loses_a_line_of_json(extra: dict[Any, Any], said: dict[str, Any]) -> None:
    record = make()
    record.__dict__.update(extra)
    found = json.loads(logs.JsonFormatter().format(record))
    assert {name: found[name] for name in said} == said


@pytest.mark.parametrize(
    ("message", "arguments", "said"),
    [
        ("%d jobs", ("no",), "%d jobs (its arguments do not fit: TypeError: %d format: a real number is required"),
        ("a %s", (Silent(),), "a %s (its arguments do not fit: ValueError: no text)"),
        (Silent(), (), "<Silent: ValueError> (its arguments do not fit: ValueError: no text)"),
    ],
)
def test_a_message_that_cannot_be_formatted_is_a_line_of_json(message: Any, arguments: Any, said: str) -> None:
    record = make()
    record.msg, record.args = message, arguments
    assert json.loads(logs.JsonFormatter().format(record))["message"].startswith(said)


@given(st.text(), st.dictionaries(st.text(), st.none() | st.floats() | st.text() | st.binary() | st.integers()))
def test_any_message_is_one_line_of_json(message: str, extra: dict[str, Any]) -> None:
    record = logging.LogRecord("shop", logging.INFO, "f.py", 1, message, None, None)
    for name, value in extra.items():
        record.__dict__.setdefault(name, value)
    line = logs.JsonFormatter().format(record)
    assert len(line.splitlines()) == 1
    assert json.loads(line)["message"] == message


def test_the_headers_of_a_plain_publisher_make_no_parent() -> None:
    class Fake:
        id, tenant, kind, attempt = "j", "acme", "page", 1
        headers = {headers.PARENT: "a b\nc"}  # noqa: RUF012

    token = logs.running_job.set(Fake())
    try:
        record = make()
        assert logs.JobFilter().filter(record)
        assert vars(record)["parent"] is None
    finally:
        logs.running_job.reset(token)
