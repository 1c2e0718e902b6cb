"""What a worker replies to the server about a delivery: an ack, or a nak."""

from __future__ import annotations

import contextlib
import logging

from .. import headers
from ..connection import Connection
from ..documents import Documents
from ..errors import AIQueueError
from ..lanes import Delivery

log = logging.getLogger(__name__)

LINK_WAIT_S = 10.0  # how long an ack waits for a lost link, or for the server's confirmation


class Replies:
    """Replies to the server about the deliveries of one worker."""

    def __init__(self, connection: Connection, documents: Documents) -> None:
        self._connection = connection
        self._documents = documents

    async def ack(self, delivery: Delivery) -> None:
        """Acknowledge a job. Without a link, wait up to LINK_WAIT_S: an ack that is lost has the job redelivered."""
        if not self._connection.connected:
            with contextlib.suppress(AIQueueError):
                await self._connection.wait_up(LINK_WAIT_S)
        self.send_ack(delivery)

    def send_ack(self, delivery: Delivery) -> None:
        """Acknowledge a job. Without a link nothing is sent: the lease runs out, and the journal has the outcome."""
        if delivery.obsolete:
            return
        try:
            self._connection.tell_frame(delivery.ack_frame())
        except AIQueueError as error:
            log.info("ack of a job in %s was not sent: %s", delivery.lane.key, error)

    async def ack_and_release(self, delivery: Delivery) -> None:
        """Acknowledge a job. If it holds documents, release them once the server has confirmed the ack.

        Without the confirmation the job may be redelivered and need its body. Then the collector releases them.
        """
        if not holds_documents(delivery):
            await self.ack(delivery)
            return
        if delivery.obsolete:
            return
        try:
            await self._connection.request(delivery.reply, b"+ACK", timeout_s=LINK_WAIT_S)
        except AIQueueError as error:
            log.info("ack of a job in %s is not confirmed: %s", delivery.lane.key, error)
        else:
            await self._documents.end_holds(delivery.tenant, delivery.message.headers)

    def nak(self, delivery: Delivery, delay_s: float) -> None:
        """Have the server redeliver the job after `delay_s` seconds. Without a link it does so when the lease ends."""
        if delivery.obsolete:
            return
        try:
            self._connection.tell(delivery.reply, b'-NAK {"delay": %d}' % max(1, round(delay_s * 1e9)))
        except AIQueueError as error:
            log.info("nak of a job in %s was not sent: %s", delivery.lane.key, error)


def holds_documents(delivery: Delivery) -> bool:
    """Return whether the job names documents, or has its body in one."""
    message_headers = delivery.message.headers
    return headers.DOCUMENT_REF in message_headers or headers.DOCUMENT in message_headers
