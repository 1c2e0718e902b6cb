"""Celery, on Redis or RabbitMQ by its address. Celery's own defaults: early acks, a prefetch of four a process."""

from __future__ import annotations

import time

import verbs
from celery import Celery

app = Celery("bench", broker=verbs.address())
app.conf.task_ignore_result = True
app.conf.broker_connection_retry_on_startup = True


@app.task(name="noop")
def noop(i: int, t: float, text: str) -> None:
    verbs.ran(i, t)


class Producer:
    def open(self) -> None:
        app.finalize()
        with app.producer_pool.acquire(block=True) as producer:
            producer.connection.ensure_connection()

    def one(self, i: int, t: float) -> None:
        noop.delay(i, t, verbs.TEXT)

    def many(self, numbers: range) -> None:
        with app.producer_pool.acquire(block=True) as producer:
            for i in numbers:
                noop.apply_async((i, time.monotonic(), verbs.TEXT), producer=producer)


if __name__ == "__main__":
    verbs.main_sync(Producer())
