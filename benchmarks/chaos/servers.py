"""Real nats-servers as child processes: one, or a cluster of three. Tests and benchmarks share them."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from aiqueue.server import supervisor
from aiqueue.server.embedded import find_binary
from aiqueue.testing import ServerAccount

T = TypeVar("T")
Account = ServerAccount

POLL_S, POLL_MAX_S = 0.02, 0.1


def poll_s(began: float) -> float:
    """How long to wait before the next look at what has been waited for since `began`: a twentieth of that, so that
    many tests at a time do not mostly look.
    """
    return min(max(POLL_S, (time.monotonic() - began) / 20), POLL_MAX_S)


def wait_until(fn: Callable[[], T], within: float = 40.0) -> T:
    """The first true value of `fn`, which must come within so many seconds. For tests without a loop."""
    began = time.monotonic()
    while not (value := fn()):
        assert time.monotonic() < began + within, f"not true within {within:g} s: {fn!r}"
        time.sleep(poll_s(began))
    return value


class NatsProcess:
    """A nats-server of one's own, on a port of its own that it keeps over restarts; one user, JetStream on.

    `extra` is config text behind the default one and overrides it: max_payload, tls, authorization… `storage` goes
    into the jetstream block, which a second one would replace, its directory too. Call `start` from the main thread:
    the kernel kills the server when the thread that started it ends (see `launch`).
    """

    def __init__(
        self, directory: Path, extra: str = "", *, storage: str = "", config: Callable[[], str] | None = None
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.port = 0
        self.user = "test"
        self.password = secrets.token_hex(8)
        self.log = directory / "server.log"
        self.host = supervisor.HOST
        self.paused = False
        self.extra = extra
        self._storage = storage
        self._more = config or self._one_user
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://{self.host}:{self.port}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def account(self) -> Account:
        return Account(self.url, self.user, self.password)

    @property
    def address(self) -> tuple[str, int]:
        return self.host, self.port

    def ask(self, subject: str, *, within_s: float = 2.0) -> dict[str, Any]:
        """The answer to an empty JetStream request. Raises OSError, and ValueError for one that is no JSON."""
        return supervisor.ask(self.address, self.user, self.password, f"$JS.API.{subject}", within_s=within_s)

    def start(self) -> None:
        """Start it, if it does not run, and wait until it is ready (30 s, for loaded machines)."""
        if self._process is not None:
            return
        known = self.port
        for attempt in range(5):
            self.port = known or supervisor.free_port()
            self.write_config()
            try:
                self._process = supervisor.launch(find_binary(), self._config, self.log, within_s=30)
            except supervisor.LaunchError as error:
                if known or not error.port_taken or attempt == 4:
                    raise
            else:
                return

    def stop(self) -> None:
        """End it cleanly, if it runs."""
        self._end(supervisor.STOP_S)

    def kill(self) -> None:
        """SIGKILL, if it runs."""
        self._end(0)

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nobody answers. All its threads have stopped when this returns."""
        self._signal(signal.SIGSTOP)
        assert self._process is not None
        os.waitpid(self._process.pid, os.WUNTRACED)
        self.paused = True

    def resume(self) -> None:
        self._signal(signal.SIGCONT)
        self.paused = False

    def reload(self) -> None:
        """Have it read its config again, which takes effect some time later."""
        self.write_config()
        self._signal(signal.SIGHUP)

    def write_config(self) -> None:
        self._config.write_text(
            f'listen: "{self.host}:{self.port}"\n'
            # Far above any disk: what streams reserve by max_bytes must not run out over a test run.
            f'jetstream {{ store_dir: ".", max_file_store: {2**50}, max_memory_store: {2**40}\n{self._storage}\n}}\n'
            f'log_file: "{self.log.name}"\n{self._more()}\n{self.extra}\n'
        )

    @property
    def _config(self) -> Path:
        return self.directory / "server.conf"

    def _one_user(self) -> str:
        return f'authorization {{ user: "{self.user}", password: "{self.password}" }}'

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "the server does not run"
        self._process.send_signal(number)

    def _end(self, within_s: float) -> None:
        process, self._process = self._process, None
        self.paused = False
        if process is not None:
            process.send_signal(signal.SIGCONT)
            supervisor.stop(process, within_s)


class Cluster:
    """Nodes of one JetStream cluster on loopback, whose ports stay theirs over restarts. `nodes` are named n1, n2, n3.

    A node is started, stopped, killed, paused and resumed by itself: ``cluster.leader("S").kill()``. As for
    `NatsProcess`, do so in the main thread.
    """

    def __init__(self, directory: Path, *, size: int = 3, extra: str = "", storage: str = "") -> None:
        self.directory = directory
        self._extra = extra
        self._storage = storage
        self._password = secrets.token_hex(8)
        self.nodes = [self._node(directory / f"n{number + 1}") for number in range(size)]

    @property
    def url(self) -> str:
        return ",".join(node.url for node in self.nodes)

    @property
    def account(self) -> Account:
        return Account(self.url, self.nodes[0].user, self._password)

    @property
    def alive(self) -> list[NatsProcess]:
        """The nodes that run and are not paused."""
        return [node for node in self.nodes if node.pid is not None and not node.paused]

    def start(self) -> None:
        """Start all nodes that do not run, and wait until the cluster answers."""
        for attempt in range(5):
            if all(node.pid is None and not node.port for node in self.nodes):
                self._choose_routes()
            try:
                for node in self.nodes:
                    node.start()
            except supervisor.LaunchError as error:
                self.kill()
                if not error.port_taken or attempt == 4:
                    raise
            else:
                break
        self.wait_ready()

    def kill(self) -> None:
        """SIGKILL to all nodes that run."""
        for node in self.nodes:
            node.kill()

    def end(self) -> None:
        """Kill all nodes and remove what they kept."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def node(self, name: str) -> NatsProcess:
        return next(node for node in self.nodes if node.directory.name == name)

    def ask(self, subject: str, *, within_s: float = 2.0) -> dict[str, Any]:
        """The answer to an empty JetStream request, from the first node that gives one. Raises OSError."""
        problem: Exception = ConnectionError("no node runs")
        for node in self.alive:
            try:
                return node.ask(subject, within_s=within_s)
            except (OSError, ValueError) as error:
                problem = error
        raise ConnectionError(f"{subject}: {problem}")

    def leader_of(self, stream: str, consumer: str = "") -> str:
        """The name of the node that leads a stream, or its consumer; empty while there is none."""
        where = f"CONSUMER.INFO.{stream}.{consumer}" if consumer else f"STREAM.INFO.{stream}"
        try:
            answer = self.ask(where)
        except OSError:
            return ""
        name = str((answer.get("cluster") or {}).get("leader") or "")
        return name if name in {node.directory.name for node in self.alive} else ""

    def leader(self, stream: str, consumer: str = "", *, within_s: float = 30.0) -> NatsProcess:
        """The node that leads a stream, or its consumer, waiting until there is one that runs."""
        return self.node(wait_until(lambda: self.leader_of(stream, consumer), within_s))

    def meta_leader(self) -> NatsProcess:
        """The node that leads the meta group, as the logs say: to ask takes the system account."""

        def says_so(node: NatsProcess) -> bool:
            lines = [line for line in node.log.read_text(errors="replace").splitlines() if "metadata leader" in line]
            return bool(lines) and "Self is new" in lines[-1]

        return wait_until(lambda: [each for each in self.alive if says_so(each)])[0]

    def step_down(self, stream: str, consumer: str = "") -> None:
        """Have the leader of a stream, or of its consumer, give way. Raises OSError."""
        kind = f"CONSUMER.LEADER.STEPDOWN.{stream}.{consumer}" if consumer else f"STREAM.LEADER.STEPDOWN.{stream}"
        answer = self.ask(kind)
        if "error" in answer:
            raise ConnectionError(f"{kind}: {answer['error'].get('description')}")

    def wait_ready(self, streams: Iterable[str] = (), *, current: bool = False, within_s: float = 60.0) -> None:
        """Wait for a meta leader, and for a leader of each of `streams`; `current`: and all of their replicas there
        and up to date.
        """
        wait_until(self._has_meta_leader, within_s)
        for stream in streams:
            wait_until(partial(self.leader_of, stream), within_s)
            if current:
                wait_until(partial(self._current, stream), within_s)

    def _has_meta_leader(self) -> bool:
        try:
            return "error" not in self.ask("STREAM.NAMES")
        except OSError:
            return False

    def _current(self, stream: str) -> bool:
        try:
            cluster = self.ask(f"STREAM.INFO.{stream}").get("cluster") or {}
        except OSError:
            return False
        replicas = cluster.get("replicas") or []
        return bool(cluster.get("leader")) and all(each.get("current") and not each.get("offline") for each in replicas)

    def _node(self, directory: Path) -> NatsProcess:
        node = NatsProcess(directory, storage=self._storage)
        node.password = self._password
        return node

    def _choose_routes(self) -> None:
        ports = [supervisor.free_port() for _ in self.nodes]
        routes = ", ".join(f'"nats://{supervisor.HOST}:{port}"' for port in ports)
        for node, port in zip(self.nodes, ports, strict=True):
            node.extra = (
                f'server_name: "{node.directory.name}"\n'
                f'cluster {{ name: "test", listen: "{supervisor.HOST}:{port}", routes: [{routes}] }}\n{self._extra}'
            )
