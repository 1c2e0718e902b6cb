"""Errors of retrieval keep to what `aiqueue.errors` promises of its own."""

from __future__ import annotations

import copy
import pickle

import pytest

from aiqueue.errors import AIQueueError, details
from aiqueue.rag import FetchFailed, FetchRefused, ParseFailed

EXAMPLES: list[AIQueueError] = [
    ParseFailed("it is\nempty"),
    FetchRefused("/etc/x\ny", "it is outside\nof the roots"),
    FetchFailed("http://x/", "its server\nanswers 503", retry_after_s=2.0),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda each: type(each).__name__)
def test_an_error_is_one_line_and_survives_pickling_and_copying_with_its_data(error: AIQueueError) -> None:
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is type(error)
        assert (str(again), vars(again)) == (str(error), vars(error))
    assert len(str(error).splitlines()) == 1
    assert details(error)["retryable"] is isinstance(error, FetchFailed)
