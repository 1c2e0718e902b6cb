"""dramatiq on Redis, with the middleware that it comes with."""

from __future__ import annotations

import time

import dramatiq
import verbs
from dramatiq.brokers.redis import RedisBroker

broker = RedisBroker(url=verbs.address())
dramatiq.set_broker(broker)


@dramatiq.actor
def noop(i: int, t: float, text: str) -> None:
    verbs.ran(i, t)


class Producer:
    def open(self) -> None:
        broker.client.ping()

    def one(self, i: int, t: float) -> None:
        noop.send(i, t, verbs.TEXT)

    def many(self, numbers: range) -> None:
        for i in numbers:
            noop.send(i, time.monotonic(), verbs.TEXT)


if __name__ == "__main__":
    verbs.main_sync(Producer())
