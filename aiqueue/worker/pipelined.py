"""Results of plain first attempts: sent without waiting for the server, and acknowledged when it has stored them.

The entry is the one that `Writer` would write: the first of its job, and fenced. Whatever the server says instead of a
PubAck, the runner writes the result again through a `Writer`, which knows what was sent here.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

from .. import codec
from ..attempt import Handler, Returned
from ..connection import Connection, PubAck, Publish
from ..errors import AIQueueError
from ..journal import ResultHeaders, Retention
from ..lanes import Delivery
from .context import JobContext
from .opening import OpenedJob

TIMEOUT_S = 30.0  # of `Writer.write`


class SentResult(Publish):
    """A result on its way into its journal. `started_at`: when its run started, monotonic seconds."""

    delivery: Delivery
    opened: OpenedJob
    context: JobContext
    returned: Returned
    started_at: float
    nonce: str
    pipeline: ResultPipeline

    @property
    def is_stored(self) -> bool:
        return type(self.outcome) is PubAck

    def settled(self) -> None:
        self.pipeline.settle(self)


class ResultPipeline:
    """Sends the results of one worker. `on_settled` is called for each that was sent, with what became of it."""

    def __init__(
        self,
        connection: Connection,
        retention: Mapping[str, Retention],
        inline_max: int,
        on_settled: Callable[[SentResult], None],
    ) -> None:
        """`retention`: by family, as of `Writer`. `inline_max`: results above this size in bytes are not sent here."""
        self._connection = connection
        self._inline_max = inline_max
        self._headers = {family: ResultHeaders(each) for family, each in retention.items()}
        self._nonce = secrets.randbits(32)  # counts up: one for each result, as each writer has one
        self._on_settled = on_settled
        self._under_way: dict[Delivery, SentResult] = {}

    def settle(self, sent: SentResult) -> None:
        """Report what became of a result."""
        del self._under_way[sent.delivery]
        self._on_settled(sent)

    def take_back(self, delivery: Delivery) -> SentResult | None:
        """Wait no longer for the server's answer about this delivery's result. It may be stored all the same."""
        sent = self._under_way.pop(delivery, None)
        if sent is not None:
            self._connection.window.abandon([sent])
        return sent

    def try_send(
        self, delivery: Delivery, opened: OpenedJob, handler: Handler | None, context: JobContext, outcome: Any,
        started_at: float,
    ) -> bool:  # fmt: skip
        """Send the result of a plain first attempt that has written nothing yet. False: it must be settled otherwise.

        So are results with secrets, large ones, those that cannot be encoded or sent, and all while the link is down.
        """
        if type(outcome) is not Returned or handler is None or not handler.keeps_result or not opened.plain:
            return False
        if context.has_writer or not context.journaled or delivery.obsolete or not self._connection.connected:
            return False
        try:
            encoded = codec.encode_marked(outcome.value)
            if encoded.secrets or len(encoded.body) > self._inline_max:
                outcome.value = encoded  # not encoded again, and what the handler returned is in memory no more
                return False
            self._nonce = (self._nonce + 1) % (1 << 32)
            nonce = f"{self._nonce:08x}"
            subject, run = context.journal_key
            block = self._headers[opened.family.name].block(
                subject, opened.kind, run, nonce, delivery.enqueued_at, context.started_at
            )
            sent = SentResult(subject, block, encoded.body, fenced=True)
            sent.delivery, sent.opened, sent.context, sent.returned = delivery, opened, context, Returned(encoded)
            sent.started_at, sent.nonce, sent.pipeline = started_at, nonce, self
            delivery.run_ended_at = time.monotonic()
            self._under_way[delivery] = sent
            self._connection.add(sent, TIMEOUT_S)
        except AIQueueError:
            self._under_way.pop(delivery, None)
            return False
        return True
