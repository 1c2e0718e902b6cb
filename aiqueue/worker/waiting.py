"""The deliveries of one worker that have no slot yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ..lanes import Delivery, LanePull, Leases
from .returns import Returns


class WaitingDeliveries(deque[Delivery]):
    """In the order in which they arrived. Each delivery counts in its lane's `waiting`. `returns` takes those that go
    back to the queue.
    """

    def __init__(self, returns: Returns, leases: Leases) -> None:
        super().__init__()
        self._returns = returns
        self._leases = leases

    def add(self, delivery: Delivery) -> None:
        """Let a delivery wait for a slot."""
        delivery.lane.waiting += 1
        self.append(delivery)

    def take(self) -> Delivery:
        """Remove and return the delivery that has waited longest."""
        delivery = self.popleft()
        delivery.lane.waiting -= 1
        return delivery

    def return_all(self) -> None:
        """Return all to the queue."""
        while self:
            self._returns.spawn(self.take())

    def return_before(self, arrived_at: float) -> None:
        """Return those to the queue that arrived before this time, monotonic seconds."""
        while self and self[0].arrived_at < arrived_at:
            self._returns.spawn(self.take())

    def return_paused(self) -> None:
        """Return those of paused lanes to the queue."""
        for delivery in self._remove(lambda each: each.lane.paused):
            delivery.lane.waiting -= 1
            self._returns.spawn(delivery)

    def drop_lane(self, lane: LanePull) -> None:
        """Forget those of a lane whose consumer was deleted: the recreated consumer delivers them again."""
        for delivery in self._remove(lambda each: each.lane is lane):
            delivery.give_back_credit()
            self._leases.drop_lease(delivery.reply)
        lane.waiting = 0

    def _remove(self, is_meant: Callable[[Delivery], bool]) -> list[Delivery]:
        found = [each for each in self if is_meant(each)]
        for each in found:
            self.remove(each)
        return found
