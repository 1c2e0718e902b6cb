"""What a provider answers that JSON does not have."""

from __future__ import annotations

import math

from aiqueue.gateway.front.answering import json_response
from aiqueue.starlette import server_events


def test_a_number_that_json_does_not_have_is_null_in_answers_and_events() -> None:
    answer = {"created": math.nan, "logprob": -math.inf}
    assert json_response(answer).body == b'{"created":null,"logprob":null}'
    assert server_events.event(answer) == b'data: {"created":null,"logprob":null}\n\n'
