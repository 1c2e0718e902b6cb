"""What travels between a worker and its child processes."""

from __future__ import annotations

import pytest

from aiqueue import codec
from aiqueue.errors import AIQueueError, LaneFull, NotFound, Stale, StreamFull, TooLarge, Unavailable
from aiqueue.processes import protocol


class Special(StreamFull):
    """An error of a class that the other end does not know."""


@pytest.mark.parametrize(
    "error",
    [
        LaneFull("agent.tasks acme/normal", "it holds its maximum of jobs", limit=5),
        StreamFull("steps", "maximum bytes exceeded"),
        TooLarge(70_000, 65_536),
        Stale("taken over", ended=False),
        Stale("cancelled", ended=True),
        Unavailable("no answer", maybe_stored=True),
        NotFound("no such stream"),
        Special("steps", "maximum bytes exceeded"),
    ],
)
def test_an_error_of_the_worker_is_raised_in_the_child_with_its_class_and_attributes(error: AIQueueError) -> None:
    """So a handler there can catch what it catches elsewhere, such as a stream of steps that is full."""
    sent = codec.decode(codec.encode(protocol.error_to_plain(error)), codec.CBOR)
    raised = protocol.error_from_plain(sent)
    assert type(raised) is (StreamFull if isinstance(error, Special) else type(error))
    assert (str(raised), vars(raised)) == (str(error), vars(error))
