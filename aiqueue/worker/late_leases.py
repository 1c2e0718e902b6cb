"""Lease renewal that begins a moment after its worker: a worker that ends sooner makes no second connection."""

from __future__ import annotations

import threading

from ..lanes import Leases

AFTER_S = 0.1  # the first heartbeat of the shortest lease, 1 s, is due after 0.33 s


class LateLeases(Leases):
    """Starts the thread after AFTER_S. Until then a timer waits, which a handler that blocks the loop does not stop."""

    _timer: threading.Timer | None = None

    def start(self) -> None:
        """Start the thread, and its connection, after AFTER_S."""
        self._timer = threading.Timer(AFTER_S, super().start)
        self._timer.name, self._timer.daemon = "aiqueue-leases-start", True
        self._timer.start()

    async def stop(self) -> None:
        """Stop the thread and wait for its end. Safe twice and unstarted."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
            timer.join()  # a moment: the timer waits, or starts the thread
        await super().stop()
