"""The peers: where their adapters are, how their workers are started, what is to be known about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..report import OURS, RAW


@dataclass(frozen=True)
class Peer:
    """A queue as its users would run it.

    `key` is its name on the command line, `name` the one in the results, `adapter` its script in ``adapters``, `venv`
    that of its packages (adapters/VENV.txt), `package` the distribution that has its version. `worker` is the worker's
    command behind its Python: ``{bin}`` the venv's programs, ``{number}`` the worker's own. `share` of the jobs makes
    its backlog, so that a slow peer takes no longer than the others.
    """

    key: str
    name: str
    adapter: str
    venv: str
    server: str
    package: str
    worker: tuple[str, ...]
    how: str
    env: Mapping[str, str] = field(default_factory=dict, hash=False)
    share: float = 1.0


TASKIQ = ("-m", "taskiq", "worker", "peer_taskiq:broker", "--workers", "1", "--max-async-tasks", "100",
          "--log-level", "WARNING")  # fmt: skip
CELERY = ("-m", "celery", "-A", "peer_celery", "worker", "--pool", "prefork", "--concurrency", "2", "--loglevel",
          "WARNING", "--hostname", "bench{number}@localhost")  # fmt: skip
ARQ = ("-m", "arq", "peer_arq.Settings", "--custom-log-dict", "peer_arq.QUIET")

PEERS = (
    Peer(
        "aiqueue", OURS, "peer_aiqueue", "aiqueue", "nats-server", "aiqueue",
        ("-m", "aiqueue", "work", "peer_aiqueue:worker"),
        "enqueue; enqueue_many, window 1,000; concurrency 100, result=False, a lane a tenant, uvloop",
    ),
    Peer(
        "raw", RAW, "peer_raw", "aiqueue", "nats-server", "nats-py",
        ("{adapter}", "work"),
        "js.publish and publish_async with the same headers, Msg-Id and CBOR; fetch(100), decode, ack; uvloop",
    ),
    Peer(
        "faststream", "FastStream", "peer_faststream", "faststream", "nats-server", "faststream",
        ("-m", "faststream", "run", "peer_faststream:app"),
        "JStream WORK_QUEUE, PullSub(batch_size=100), no log; publish awaits the PubAck, 100 at once; uvloop",
    ),
    Peer(
        "taskiq", "taskiq-nats", "peer_taskiq", "taskiq", "nats-server", "taskiq-nats",
        TASKIQ, "PullBasedJetStreamBroker as it comes: pulls of 1; kiq, 100 at once; 100 async tasks, uvloop",
    ),
    Peer(
        "taskiq-100", "taskiq-nats, pulls of 100", "peer_taskiq", "taskiq", "nats-server", "taskiq-nats",
        TASKIQ, "pull_consume_batch=100, pull_consume_timeout=5; kiq, 100 at once; 100 async tasks, uvloop",
        env={"BENCH_TASKIQ_BATCH": "100", "BENCH_TASKIQ_TIMEOUT_S": "5"},
    ),
    Peer(
        "celery-redis", "Celery, Redis", "peer_celery", "celery", "redis-server", "celery",
        CELERY, "prefork -c 2, early acks as it comes, ignore_result; apply_async with one producer", share=0.4,
    ),
    Peer(
        "celery-rabbitmq", "Celery, RabbitMQ", "peer_celery", "celery", "rabbitmq-server", "celery",
        CELERY, "prefork -c 2, early acks as it comes, ignore_result; apply_async with one producer",
    ),
    Peer(
        "dramatiq", "dramatiq", "peer_dramatiq", "dramatiq", "redis-server", "dramatiq",
        ("-m", "dramatiq", "peer_dramatiq", "--processes", "1", "--threads", "8"),
        "1 process of 8 threads; send (it has no bulk call)",
    ),
    Peer(
        "arq", "arq", "peer_arq", "arq", "redis-server", "arq",
        ARQ,
        "max_jobs=100, keep_result=0, no log, poll_delay 0.5 s as it comes; enqueue_job, 100 at once; hiredis, uvloop",
        share=0.5,
    ),
    Peer(
        "arq-20ms", "arq, poll_delay 20 ms", "peer_arq", "arq", "redis-server", "arq",
        ARQ,
        "max_jobs=100, keep_result=0, no log, poll_delay 20 ms; enqueue_job, 100 at once; hiredis, uvloop",
        env={"BENCH_ARQ_POLL_S": "0.02"},
    ),
    Peer(
        "saq", "SAQ", "peer_saq", "saq", "redis-server", "saq",
        ("-m", "saq", "peer_saq.settings", "--quiet"),
        "concurrency 100; enqueue, 100 at once; hiredis, uvloop",
    ),
    Peer(
        "huey", "huey", "peer_huey", "huey", "redis-server", "huey",
        ("{bin}/huey_consumer", "peer_huey.huey", "--workers", "8", "--worker-type", "thread", "--quiet"),
        "8 threads, results off, no ack: a crash of the worker loses the job; a call each (it has no bulk call)",
    ),
    Peer(
        "procrastinate", "Procrastinate", "peer_procrastinate", "procrastinate", "PostgreSQL", "procrastinate",
        ("{adapter}", "work"),
        "concurrency 100, delete_jobs=always; batch_defer of 1,000; uvloop", share=0.2,
    ),
)  # fmt: skip
