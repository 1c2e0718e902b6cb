"""What goes on until somebody mends it is said once."""

from __future__ import annotations

import logging

import pytest

from aiqueue.lanes.warn_once import KNOWN_MAX, WarnOnce


def test_a_problem_is_said_once_and_a_later_one_too_however_many_there_were(caplog: pytest.LogCaptureFixture) -> None:
    warn = WarnOnce(logging.getLogger("aiqueue.lanes"))
    for _ in range(2):
        for number in range(KNOWN_MAX):
            warn(f"problem {number}")
    assert len(caplog.messages) == KNOWN_MAX
    warn("one more")
    assert caplog.messages[-1] == "one more"


def test_of_problems_about_the_same_the_first_is_said(caplog: pytest.LogCaptureFixture) -> None:
    warn = WarnOnce(logging.getLogger("aiqueue.lanes"))
    for text in ("a", "b"):
        warn(text, about="report")
    assert caplog.messages == ["a"]


def test_a_problem_that_comes_back_after_it_was_mended_is_said_again(caplog: pytest.LogCaptureFixture) -> None:
    warn = WarnOnce(logging.getLogger("aiqueue.lanes"))
    for text in ("a", "b"):
        warn(text, about="lane")
        warn.forget("lane")
    assert caplog.messages == ["a", "b"]
