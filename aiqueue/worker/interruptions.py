"""Which handlers of one worker were stopped by the worker itself: their jobs return to the queue."""

from __future__ import annotations

from collections.abc import Callable

from ..attempt import Cancellations
from ..lanes import Delivery
from .context import JobContext


class Interruptions:
    """Tells a cancellation by the worker from one by the handler itself."""

    def __init__(self, cancellations: Cancellations) -> None:
        self._cancellations = cancellations
        self._interrupted: set[Delivery] = set()

    def note(self, delivery: Delivery) -> None:
        """The worker is about to stop a delivery."""
        self._interrupted.add(delivery)

    def concern(self, delivery: Delivery) -> bool:
        """Return whether the worker leaves, or its event loop ends: a cancellation is not the handler's own then."""
        return delivery in self._interrupted or self._cancellations.loop_ends

    def stop_handlers(self, is_meant: Callable[[JobContext], bool]) -> int:
        """Stop running handlers as a drain does: their jobs return to the queue. Return how many.

        What a handler has returned already is kept.
        """
        running = [each for each in self._cancellations.watched if isinstance(each, JobContext)]
        self._interrupted &= {each.delivery for each in running}
        stopped = [each.delivery for each in running if is_meant(each) and each.delivery not in self._interrupted]
        for delivery in stopped:
            self._interrupted.add(delivery)
            if delivery.task is not None:
                delivery.task.cancel()
        return len(stopped)
