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
        ("-m", "faststream", "run", "--log-level", "warning", "peer_faststream:app"),
        "JStream WORK_QUEUE, PullSub(batch_size=100); publish with stream= (awaits the PubAck), 100 at once; uvloop",
    ),
)  # fmt: skip
