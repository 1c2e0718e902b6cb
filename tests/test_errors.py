"""The error tree."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import re

import pytest

from aiqueue import errors
from aiqueue.errors import AIQueueError

CLASSES = [
    each for _, each in inspect.getmembers(errors, inspect.isclass)
    if issubclass(each, AIQueueError) and each.__module__ == errors.__name__
]  # fmt: skip
EXAMPLES: dict[str, AIQueueError] = {
    "InvalidToken": errors.InvalidToken("tenant", "a\nb"),
    "DecodeError": errors.DecodeError("not CBOR"),
    "TooLarge": errors.TooLarge(2000, 1000),
    "UnknownFamily": errors.UnknownFamily("x.y", ("a.b",)),
    "TopologyError": errors.TopologyError("x.toml", "stream.name", "is missing"),
    "AboveLimit": errors.AboveLimit("cost", 12_000, 10_000, "agent.tasks: cost 10,000 in 1m", "gpt\n4"),
    "Unavailable": errors.Unavailable("no server", maybe_stored=True),
    "QueueFull": errors.QueueFull("agent.tasks acme/high", "too\nmany", limit=1000, retry_after_s=2.5),
    **{
        kind.__name__: kind("agent.tasks acme/high", "too\nmany", limit=1000)
        for kind in (errors.LaneFull, errors.StreamFull, errors.AccountFull, errors.DiskFull)
    },
    "EmbedderChanged": errors.EmbedderChanged(
        "acme", stored="wordllama-256", stored_dimensions=256, wanted="x\ny", wanted_dimensions=384
    ),
    "DataLossRefused": errors.DataLossRefused(("one", "two")),
    "Stale": errors.Stale("taken over", ended=False),
    "DuplicateJob": errors.DuplicateJob("j1", "agent.tasks acme/high"),
    "NotParked": errors.NotParked("j1", "in_flight"),
    "JobFailed": errors.JobFailed("j1", reason="rejected", error="bad\ninput", attempt=2),
    "JobCancelled": errors.JobCancelled("j1", reason="cancelled", error="cancelled\nbetween attempts", attempt=2),
    "ResultInvalid": errors.ResultInvalid("j1", expected="Summary", reason="title: Field required", data={"a": 1}),
    "ChildFailed": errors.ChildFailed("j1", name="page-1", reason="rejected", error="bad\ninput", attempt=2),
    "ChildCancelled": errors.ChildCancelled("j1", name="page-1", reason="cancelled", error="cancelled\nx", attempt=2),
    "ChildLost": errors.ChildLost("j1", name="page-1", error="it is stored\nnowhere"),
    "ResponderError": errors.ResponderError("j1", error="ValueError: odd", code=500),
    "ServerError": errors.ServerError("odd\nthing", code=500, err_code=10999),
    "MailBounced": errors.MailBounced("m-1", to="bob", reason="expired", error="too late"),
}


def example(kind: type[AIQueueError]) -> AIQueueError:
    return EXAMPLES.get(kind.__name__) or kind("line one\n  line two")


def drawn() -> list[tuple[int, str]]:
    """The tree in the docstring: depth and name of each class."""
    found = re.findall(r"(?m)^([ │├└─]{4,})([A-Z]\w+)(?:\s|$)", errors.__doc__ or "")
    return [(len(lead) // 4 - 1, name) for lead, name in found]


def real(kind: type[AIQueueError] = AIQueueError, depth: int = 0) -> set[tuple[int, str, str]]:
    found = {(depth, kind.__name__, kind.__bases__[0].__name__)}
    for child in CLASSES:
        if child.__bases__[0] is kind:
            found |= real(child, depth + 1)
    return found


def test_the_tree_that_the_docstring_draws_is_the_real_one() -> None:
    path: list[str] = []
    shown = set()
    for depth, name in drawn():
        path[depth:] = [name]
        shown.add((depth, name, path[depth - 1] if depth else "Exception"))
    assert shown == real()
    assert len(shown) == len(CLASSES)


def test_the_example_table_names_only_errors_that_exist() -> None:
    assert set(EXAMPLES) <= {each.__name__ for each in CLASSES}


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_survives_pickling_and_copying_with_its_data(kind: type[AIQueueError]) -> None:
    error = example(kind)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is kind
        assert str(again) == str(error)
        assert vars(again) == vars(error)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_is_one_line(kind: type[AIQueueError]) -> None:
    text = str(example(kind))
    assert text.strip()
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_says_what_it_is_for(kind: type[AIQueueError]) -> None:
    assert (kind.__doc__ or "").strip()


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_has_a_form_in_json_with_its_class_and_data(kind: type[AIQueueError]) -> None:
    error = example(kind)
    data = json.loads(json.dumps(errors.details(error)))
    assert data["error"] == kind.__name__
    assert data["message"] == str(error)
    assert data["retryable"] is error.retryable
    assert len(data) == 3 + sum(not name.startswith("_") for name in vars(error))


def test_the_details_of_a_failed_job_keep_its_cause_beside_the_class() -> None:
    data = errors.details(EXAMPLES["JobFailed"])
    assert (data["error"], data["cause"], data["attempt"]) == ("JobFailed", "bad\ninput", 2)


def test_the_details_of_an_invalid_result_leave_its_data_out_because_there_may_be_secrets_in_it() -> None:
    error = errors.ResultInvalid("j1", expected="Login", reason="user: Field required", data={"password": "hunter2"})
    assert error.data == {"password": "hunter2"}
    assert "hunter2" not in str(errors.details(error))


def test_details_tell_what_json_cannot_hold_by_its_repr() -> None:
    data = errors.details(errors.InvalidToken("tenant", b"\xff"))
    assert data["value"] == repr(b"\xff")


def test_only_what_another_try_can_mend_is_retryable() -> None:
    assert {each.__name__ for each in CLASSES if each.retryable} == {
        "Unavailable", "QueueFull", "LaneFull", "StreamFull", "AccountFull", "DiskFull", "ResultTimeout",
        "InboxFull", "ReplyTimeout",
    }  # fmt: skip


def test_a_result_that_came_too_late_is_also_pythons_timeout() -> None:
    with pytest.raises(TimeoutError):
        raise errors.ResultTimeout("no result")
