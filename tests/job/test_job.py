"""Messages, jobs and outcomes."""

from __future__ import annotations

import pickle
import re
from typing import Any, Generic, TypeVar

import pydantic
import pytest

from aiqueue.errors import BadInput, DecodeError, Stale
from aiqueue.job import Job, Message, Reject, Retry, untyped
from aiqueue.payload import parse_message


class Summarise(Message, kind="summarise"):
    text: str
    tags: tuple[int, ...] = ()


class Ask(Message, family="gateway.requests"):
    prompt: str


class Base(Message, kind="base", family="rag.ingest"):
    pass


class Derived(Base):
    pass


T = TypeVar("T")


class Page(Message, Generic[T]):
    items: list[T]


def test_a_message_has_the_kind_it_is_given_and_the_default_family() -> None:
    assert (Summarise.aiq_kind, Summarise.aiq_family) == ("summarise", "agent.tasks")


def test_without_a_kind_it_is_the_classes_name() -> None:
    assert (Ask.aiq_kind, Ask.aiq_family) == ("Ask", "gateway.requests")


def test_a_subclass_inherits_the_family_and_has_a_kind_of_its_own() -> None:
    assert (Derived.aiq_kind, Derived.aiq_family) == ("Derived", "rag.ingest")


def test_a_generic_message_can_be_made_of_a_type() -> None:
    assert Page[int](items=[1]).items == [1]
    assert Page[int].aiq_kind == "Page"


@pytest.mark.parametrize("kind", ["", "a b", "a\n", "é", "x" * 129, "a/b", "*", ">"])
def test_a_kind_that_cannot_travel_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="kind"):
        untyped(kind, "agent.tasks")


@pytest.mark.parametrize("kind", ["a", "gateway.request", "A:b-c_d", "x" * 128])
def test_a_kind_that_can_travel_is_taken(kind: str) -> None:
    assert untyped(kind, "agent.tasks").aiq_kind == kind


@pytest.mark.parametrize(
    "family", ["", "a", "a.b.c", "A.b", "a.*", "a.>", "a b.c", ".b", "a.", "x" * 33 + ".b", "a.b\n"]
)
def test_a_family_that_cannot_be_part_of_a_subject_is_refused(family: str) -> None:
    with pytest.raises(ValueError, match="family"):
        untyped("kind", family)


def test_a_misspelt_option_of_a_message_is_refused_with_those_that_there_are() -> None:
    problem = "Task: a message has no option queue: it has kind, family, and those of pydantic.ConfigDict"
    with pytest.raises(TypeError, match=f"^{re.escape(problem)}$"):

        class Task(Message, kind="task", queue="mails", frozen=True):  # type: ignore[call-arg]
            pass


def test_a_message_may_have_fields_named_kind_and_family() -> None:
    class Animal(Message):
        kind: str
        family: str

    assert Animal(kind="cat", family="felidae").kind == "cat"


def test_a_message_is_frozen() -> None:
    message = Summarise(text="x")
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        message.text = "y"  # type: ignore[misc]


def test_fields_that_the_model_does_not_know_are_ignored() -> None:
    assert parse_message(Summarise, {"text": "x", "new_in_v2": 1}) == Summarise(text="x")


def test_an_untyped_message_keeps_all_fields() -> None:
    message = parse_message(untyped("any", "agent.tasks"), {"a": 1, "b": [2]})
    assert message.model_dump() == {"a": 1, "b": [2]}


def test_a_model_that_reads_its_fields_in_its_own_way_is_asked_to() -> None:
    class Old(Message, kind="old"):
        text: str

        @classmethod
        def model_validate(cls, data: Any, **options: Any) -> Old:
            return super().model_validate({"text": data["body"]}, **options)

    assert parse_message(Old, {"body": "x"}) == Old(text="x")


@pytest.mark.parametrize(
    ("data", "problem"),
    [({}, "text: Field required"), ({"text": 5}, "text: "), ({"text": "x", "tags": [1, "y"]}, r"tags\.1: "),
     ({"text": 1, "tags": 2}, r"\(and 1 more\)")],
)  # fmt: skip
def test_a_body_that_does_not_fit_is_refused_naming_kind_and_field(data: dict[str, Any], problem: str) -> None:
    with pytest.raises(DecodeError, match=problem) as caught:
        parse_message(Summarise, data)
    assert caught.value.reason.startswith("not a summarise: ")


def test_a_refusal_never_repeats_the_payload() -> None:
    with pytest.raises(DecodeError) as caught:
        parse_message(Summarise, {"text": ["sekret"]})
    assert "sekret" not in str(caught.value)


def test_a_validators_own_text_stays_on_one_line() -> None:
    class Picky(Message):
        @pydantic.model_validator(mode="after")
        def check(self) -> Picky:
            raise ValueError("first\nsecond")

    with pytest.raises(DecodeError) as caught:
        parse_message(Picky, {})
    assert "\n" not in caught.value.reason


class RecordedProgress:
    def __init__(self, error: Exception | None = None) -> None:
        self.reports: list[tuple[float, str]] = []
        self.error = error
        self.settled: list[float] = []

    def settle(self, cost: float) -> None:
        self.settled.append(cost)

    async def progress(self, fraction: float, note: str) -> None:
        if self.error:
            raise self.error
        self.reports.append((fraction, note))


def job(recorder: RecordedProgress) -> Job[Summarise]:
    return Job(
        Summarise(text="x"), job_id="j1", lane=("agent.tasks", "acme", "high"), attempt=2, enqueued_at=1.0,
        deadline=None, headers={"model": "m"}, state=None, progress=recorder,
    )  # fmt: skip


def test_a_job_shows_what_it_is_but_not_its_payload() -> None:
    assert repr(job(RecordedProgress())) == "<Job j1 summarise acme/high attempt 2>"


async def test_progress_reaches_the_journals_writer() -> None:
    recorder = RecordedProgress()
    await job(recorder).progress(0.5, "half")
    await job(recorder).progress(1)
    assert recorder.reports == [(0.5, "half"), (1, "")]


@pytest.mark.parametrize("fraction", [-0.01, 1.01, float("nan"), float("inf")])
async def test_progress_outside_0_to_1_is_refused(fraction: float) -> None:
    recorder = RecordedProgress()
    with pytest.raises(ValueError, match="fraction"):
        await job(recorder).progress(fraction)
    assert recorder.reports == []


async def test_a_stale_attempts_progress_tells_it_so() -> None:
    with pytest.raises(Stale):
        await job(RecordedProgress(Stale("taken over", ended=False))).progress(0.5)


@pytest.mark.parametrize("cost", [0, 1, 0.5, 10**15])
def test_what_a_handler_settles_reaches_its_worker_as_a_float(cost: float) -> None:
    recorder = RecordedProgress()
    job(recorder).settle(cost)
    assert recorder.settled == [float(cost)]
    assert type(recorder.settled[0]) is float


@pytest.mark.parametrize("cost", [-0.1, 1.1e15, float("nan"), float("inf"), True, "7", None, [1]])
def test_what_is_no_cost_is_refused_where_it_is_settled(cost: Any) -> None:
    recorder = RecordedProgress()
    with pytest.raises(BadInput, match=r"^cost must be a number from 0 to 1e\+15, not "):
        job(recorder).settle(cost)
    assert recorder.settled == []


@pytest.mark.parametrize(("after", "meant"), [(None, None), (0, 0), (2, 2), ("1m", 60), (0.5, 0.5)])
def test_a_retry_carries_its_delay_in_seconds(after: str | float | None, meant: float | None) -> None:
    assert Retry("busy", after=after).after_s == meant


@pytest.mark.parametrize("after", ["soon", -1, float("nan")])
def test_a_retry_after_nonsense_is_refused_where_it_is_raised(after: Any) -> None:
    with pytest.raises(BadInput, match="duration"):
        Retry(after=after)


@pytest.mark.parametrize("pause", ["family", "", True, 20, ["key"]])
def test_a_retry_pauses_the_key_or_nothing(pause: Any) -> None:
    with pytest.raises(BadInput, match=r'^pause must be "key" or None, not '):
        Retry("429", after=20, pause=pause)
    assert Retry("429", after=20, pause="key").pause == "key"
    assert Retry("429", after=20).pause is None


def test_a_retry_that_pauses_the_key_must_say_for_how_long() -> None:
    with pytest.raises(BadInput, match=r"^pause='key' needs after=, how long to pause the key, such as after=\"20s\"$"):
        Retry("429", pause="key")


@pytest.mark.parametrize(
    "outcome", [Retry("busy", after="1m"), Retry(), Retry("429", after=20, pause="key"), Reject("never")]
)
def test_outcomes_come_out_of_a_child_process_as_they_were(outcome: Retry | Reject) -> None:
    again = pickle.loads(pickle.dumps(outcome))
    assert (type(again), vars(again), str(again)) == (type(outcome), vars(outcome), str(outcome))
