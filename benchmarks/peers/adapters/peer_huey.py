"""huey on Redis: results off. A worker takes a job off the list before it runs, without an ack."""

from __future__ import annotations

import time

import verbs
from huey import RedisHuey

huey = RedisHuey("bench", url=verbs.address(), results=False)


def noop(i: int, t: float, text: str) -> None:
    verbs.ran(i, t)


noop.__module__ = "peer_huey"  # huey calls a task after its module, which would be another one in a producer
task = huey.task()(noop)


class Producer:
    def open(self) -> None:
        huey.storage.conn.ping()

    def one(self, i: int, t: float) -> None:
        task(i, t, verbs.TEXT)

    def many(self, numbers: range) -> None:
        for i in numbers:
            task(i, time.monotonic(), verbs.TEXT)


if __name__ == "__main__":
    verbs.main_sync(Producer())
