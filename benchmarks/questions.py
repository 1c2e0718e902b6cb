"""Which questions there are, what each is about, and about how long it takes."""

from __future__ import annotations

from typing import NamedTuple


class Question(NamedTuple):
    """A module with `run(client, *, rounds, jobs)`, which gives rows.

    `about` is its sentence on the page. A run takes about `once_s`, and `round_s` for each round of 10,000 jobs.
    """

    title: str
    about: str
    once_s: float
    round_s: float


ROWS = {
    "targets": Question(
        "The guide's targets",
        "What the integration guide demands, and the numbers of its family, as a user of the guide meets them.",
        5, 65,
    ),
    "guide": Question(
        "The guide's client",
        "What the calls of the integration guide reach: `NATSClient.publish` to the callback of `subscribe`, beside "
        "raw nats-py. The guide demands 10 ms for agent messages, 5 ms for gateway requests (p95), 100 RAG messages a "
        "second; what is demanded here is stricter. Then what these calls cost above the typed ones, in rates and in "
        "percent (the median over the rounds).",
        5, 75,
    ),
    "enqueue": Question("Enqueueing one by one", "One awaited enqueue after another: one round trip each.", 3, 4),
    "many": Question(
        "Enqueueing many", "Many jobs through one window of publishes, and many callers at once.", 3, 4
    ),
    "drain": Question(
        "Draining",
        "A backlog of no-op jobs on a worker: from the first handler to the last. A plain job takes the worker's short "
        "way; one with a deadline takes the full path, as do retries, documents and secrets. In processes of their own "
        "the workers wait at a gate until all are ready, and each handler appends 24 bytes to a file. They get nine "
        "times as many jobs, for in a short run their first moments count.",
        3, 60,
    ),
    "latency": Question(
        "Latency", "From the enqueue call in one process to the handler in another; an open loop, no backlog.", 3, 28
    ),
    "backlog": Question("Depth of the backlog", "Whether jobs that wait make a worker slower.", 30, 120),
    "tenants": Question("Many tenants", "What lanes cost: twice the jobs, of one tenant or up to a thousand.", 30, 100),
    "payload": Question("Size of the body", "Bodies from 200 bytes to a megabyte; large ones become documents.", 5, 40),
    "durability": Question(
        "Durability", "One server or a cluster of three, synced now and then (the default) or at every write.", 30, 90
    ),
    "start": Question("Start of a worker", "From the start of the process to its first handler.", 15, 10),
    "fairness": Question("Fairness", "Whether a tenant with a long backlog holds up the others.", 10, 60),
    "agents": Question(
        "Mail between agents",
        "From one agent to another, in processes of their own; thousands of inboxes; the order of conversations.",
        60, 32,
    ),
    "streaming": Question("Streaming", "From a handler's chunk to its reader, in processes of their own.", 15, 12),
    "limits": Question(
        "Limits",
        "What a limit over all processes costs a call: where it does not bind, and where all wait. The calls' own log "
        "is checked to be never above the limit in any window.",
        3, 60,
    ),
    "steps": Question(
        "Steps", "What `job.step` keeps for later attempts: one stored message a step, behind the one before.", 3, 4
    ),
    "large": Question(
        "Large results",
        "Results and steps above 256 and 64 KiB are stored as documents: beside a put and a get of the same bytes in "
        "the same object store with nats-py, which stores no job and no journal.",
        5, 12,
    ),
}  # fmt: skip
PEERS = Question(
    "Beside other queues",
    "The same no-op job, each queue with its own server, packages and worker; every job is checked to have run.",
    480, 300,
)  # fmt: skip
# they tell theirs as text
TEXTS = ("around", "cancel", "delayed", "documents", "endurance", "failing", "metrics", "operator", "tracing")
# with options of their own
OWN = ("soak", "fuzz", "resume", "requests", "provider", "gateway", "rag", "schedules", "tenancy", "peers")
ALL = {**ROWS, "peers": PEERS}


def expected_s(question: str, *, rounds: int, jobs: int) -> float:
    """About how long a question takes, its server's start included."""
    known = ALL[question]
    return 3 + known.once_s + known.round_s * rounds * max(0.4, jobs / 10_000)
