"""Each error of aiqueue as an answer over HTTP."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest

from aiqueue import errors
from aiqueue.starlette import problem_of

LANE = "agent.tasks acme/normal"
FAILED = {"error": "boom at /srv/app.py", "attempt": 3}
# Each error with its status, and its Retry-After; a mark: the caller reads the error's own text.
EXPECTED: list[tuple[errors.AIQueueError, int, str | None, bool]] = [
    (errors.BadInput("boom"), 422, None, True),
    (errors.InvalidToken("tenant", "a b"), 422, None, True),
    (errors.EncodeError("boom"), 422, None, True),
    (errors.DecodeError("boom"), 500, None, False),
    (errors.TooLarge(9, 8), 413, None, True),
    (errors.UnknownFamily("f.g", ()), 500, None, False),
    (errors.LoadError("boom"), 500, None, False),
    (errors.SettingsError("boom"), 500, None, False),
    (errors.TopologyError("f", "k", "p"), 500, None, False),
    (errors.IdReused("boom"), 422, None, True),
    (errors.AboveLimit("cost", 9, 8, "8 a minute", "k"), 422, None, True),
    (errors.Unavailable("nats://10.0.0.1:4222 is away", maybe_stored=True), 503, "1", False),
    (errors.AccessDenied("user svc may not"), 500, None, False),
    (errors.QueueFull(LANE, "full", retry_after_s=2.2), 429, "3", True),
    (errors.LaneFull(LANE, "full", limit=3), 429, "1", True),
    (errors.StreamFull(LANE, "full"), 503, "5", False),
    (errors.AccountFull(LANE, "full"), 503, "5", False),
    (errors.DiskFull(LANE, "full"), 503, "5", False),
    (errors.InboxFull("bob"), 429, "1", True),
    (errors.ConfigMismatch("boom"), 500, None, False),
    (errors.EmbedderChanged("t", stored="a", stored_dimensions=1, wanted="b", wanted_dimensions=1), 500, None, False),
    (errors.DataLossRefused(("boom",)), 500, None, False),
    (errors.NotFound("only 9 jobs were searched"), 404, None, False),
    (errors.Corrupt("boom"), 500, None, False),
    (errors.Conflict("boom"), 409, None, True),
    (errors.DuplicateJob("j", LANE), 409, None, True),
    (errors.NotParked("j", "in_flight"), 409, None, True),
    (errors.Stale("boom", ended=False), 500, None, False),
    (errors.JobFailed("j", reason="attempts", **FAILED), 502, None, False),
    (errors.JobFailed("j", reason="deadline", **FAILED), 504, None, True),
    (errors.JobFailed("j", reason="rejected", **FAILED), 422, None, True),
    (errors.JobCancelled("j", reason="cancelled", **FAILED), 410, None, False),
    (errors.ChildFailed("j", name="c", reason="attempts", **FAILED), 502, None, False),
    (errors.ChildCancelled("j", name="c", reason="cancelled", **FAILED), 410, None, False),
    (errors.ResultInvalid("j", expected="int", reason="boom", data={"secret": 1}), 502, None, False),
    (errors.JobGone("j"), 410, None, False),
    (errors.ChildLost("j", name="c", error="boom"), 410, None, False),
    (errors.ResultTimeout("boom"), 504, "1", False),
    (errors.ReplyTimeout("boom"), 504, "1", False),
    (errors.MailBounced("m", to="bob", reason="rejected", error="boom"), 502, None, False),
    (errors.ResultDisabled("boom"), 204, None, False),
    (errors.ResponderError("j", error="boom"), 502, None, False),
    (errors.EmbeddedError("boom"), 500, None, False),
    (errors.BinaryMissing("boom"), 500, None, False),
    (errors.ServerError("boom", code=500), 500, None, False),
]


def kinds_of_errors() -> Iterator[type[errors.AIQueueError]]:
    for _, kind in inspect.getmembers(errors, inspect.isclass):
        if issubclass(kind, errors.AIQueueError) and kind is not errors.AIQueueError:
            yield kind


@pytest.mark.parametrize(("error", "status", "retry_after", "is_told"), EXPECTED, ids=lambda each: type(each).__name__)
def test_an_error_has_its_status(
    error: errors.AIQueueError, status: int, retry_after: str | None, is_told: bool
) -> None:
    problem = problem_of(error)
    assert (problem.status, problem.headers.get("retry-after")) == (status, retry_after)
    if status == 204:
        assert problem.body is None
        return
    assert problem.body is not None
    assert problem.body["status"] == status
    assert problem.body["error"] == type(error).__name__
    own = error.error if isinstance(error, errors.JobFailed) else str(error)
    assert (own in problem.detail) is is_told
    if not is_told:
        assert "boom" not in str(problem.body)


def test_every_error_has_a_status_that_was_decided() -> None:
    assert {type(error) for error, *_ in EXPECTED} == set(kinds_of_errors())
