"""The servers of the peers: fresh ones on loopback, with their data in a directory of the run, never a system's own."""

from __future__ import annotations

import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from aiqueue.errors import AIQueueError
from aiqueue.server import supervisor
from aiqueue.server.embedded import find_binary

from ..chaos.servers import NatsProcess
from .processes import POLL_S, Child, Failed, last_words

READY_S = 60.0
ASK_S = 2.0
SETUP_S = 60.0
STOP_S = 5.0
HOST = supervisor.HOST


class Server:
    """A server with empty data. `durability` says what a job that was accepted has gone through."""

    kind: str
    durability: str
    quit = signal.SIGKILL  # its data goes at once: there is nothing to save

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self.directory = directory
        self.log = directory / "output.log"
        self.port = supervisor.free_port()
        self._children: list[Child] = []

    @classmethod
    def missing(cls) -> str:
        """Why it cannot be started here; empty where it can."""
        raise NotImplementedError

    @classmethod
    def version(cls) -> str:
        raise NotImplementedError

    @property
    def address(self) -> str:
        raise NotImplementedError

    @property
    def pids(self) -> list[int]:
        return [child.pid for child in self._children]

    def start(self) -> None:
        """Start it and wait until it answers. Raises Failed; `end` is needed then, too."""
        raise NotImplementedError

    def end(self) -> None:
        """End it and remove its data. Safe twice."""
        while self._children:
            self._children.pop().end(STOP_S, by=self.quit)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _await(self, answers: Callable[[], bool]) -> None:
        deadline = time.monotonic() + READY_S
        while True:
            try:
                if answers():
                    return
            except OSError:
                pass  # it does not listen yet
            if any(child.code is not None for child in self._children):
                raise Failed(f"{self.kind} does not start: {last_words(self.log)}")
            if time.monotonic() > deadline:
                raise Failed(f"{self.kind} is not ready within {READY_S:g} s")
            time.sleep(POLL_S)

    def _greeting(self, hello: bytes, size: int) -> bytes:
        with socket.create_connection((HOST, self.port), timeout=ASK_S) as link:
            link.sendall(hello)
            return link.recv(size)


class Nats(Server):
    kind = "nats-server"
    durability = "file storage, one replica, sync_interval as it comes (2 min)"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._server = NatsProcess(directory / "nats")

    @classmethod
    def missing(cls) -> str:
        try:
            find_binary()
        except AIQueueError as error:
            return str(error)
        return ""

    @classmethod
    def version(cls) -> str:
        return _version(str(find_binary()), "--version")

    @property
    def address(self) -> str:
        return f"nats://{self._server.user}:{self._server.password}@{self._server.host}:{self._server.port}"

    @property
    def pids(self) -> list[int]:
        return [self._server.pid] if self._server.pid else []

    def start(self) -> None:
        try:
            self._server.start()
        except supervisor.LaunchError as error:
            raise Failed(f"{self.kind} does not start: {error}") from error

    def end(self) -> None:
        self._server.kill()
        super().end()


class Redis(Server):
    kind = "redis-server"
    durability = "appendonly yes, appendfsync everysec, save points as they come"

    @classmethod
    def missing(cls) -> str:
        return _lacking("redis-server")

    @classmethod
    def version(cls) -> str:
        return _version("redis-server", "--version")

    @property
    def address(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    def start(self) -> None:
        options = {"port": str(self.port), "bind": HOST, "dir": str(self.directory), "appendonly": "yes",
                   "appendfsync": "everysec", "daemonize": "no"}  # fmt: skip
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        self._children.append(Child(["redis-server", *arguments], {}, self.log, cwd=self.directory))
        self._await(lambda: self._greeting(b"PING\r\n", 7).startswith(b"+PONG"))


class RabbitMQ(Server):
    """With a port mapper of its own: the one that Erlang starts by itself would be left behind."""

    kind = "rabbitmq-server"
    durability = "durable queue, persistent messages, no publisher confirms (Celery's defaults)"

    @classmethod
    def missing(cls) -> str:
        return "" if _rabbitmq() else _lacking("rabbitmq-server") or _lacking("epmd")

    @classmethod
    def version(cls) -> str:
        script = Path(_rabbitmq()).resolve()
        homes = [str(script), *(each.name for each in script.parent.parent.glob("lib/rabbitmq_server-*"))]
        found = [each for home in homes for each in re.findall(r"rabbitmq_server-([\d.]+)", home)]
        return found[-1] if found else ""

    @property
    def address(self) -> str:
        return f"amqp://guest:guest@{HOST}:{self.port}//"

    def start(self) -> None:
        mapper, peers = supervisor.free_port(), supervisor.free_port()
        self._children.append(Child(["epmd", "-port", str(mapper), "-address", HOST], {}, self.log, cwd=self.directory))
        home = self.directory / "home"
        home.mkdir()
        plugins, config = self.directory / "enabled_plugins", self.directory / "rabbitmq.conf"
        plugins.write_text("[].\n")
        config.write_text(f"listeners.tcp.1 = {HOST}:{self.port}\n")
        env = {
            "HOME": str(home),
            "ERL_EPMD_PORT": str(mapper),
            "ERL_EPMD_ADDRESS": HOST,
            "RABBITMQ_NODENAME": f"bench{self.port}@localhost",
            "RABBITMQ_DIST_PORT": str(peers),
            "RABBITMQ_MNESIA_BASE": str(self.directory / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.directory / "log"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(plugins),
            "RABBITMQ_CONFIG_FILE": str(config),
            "RABBITMQ_CONF_ENV_FILE": str(self.directory / "none"),
        }
        self._children.append(Child([_rabbitmq()], env, self.log, cwd=self.directory))
        self._await(lambda: self._greeting(b"AMQP\x00\x00\x09\x01", 1) == b"\x01")


class Postgres(Server):
    """It refuses to run as root: it gets a user of the system then, who owns its data only."""

    kind = "PostgreSQL"
    durability = "fsync on, synchronous_commit on"
    quit = signal.SIGQUIT  # at once, and it waits for its own children

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._password = secrets.token_hex(8)

    @classmethod
    def missing(cls) -> str:
        if not _postgres("initdb") or not _postgres("postgres"):
            return "there is no PostgreSQL server here (initdb, postgres)"
        return "" if os.geteuid() or _unprivileged() else "PostgreSQL does not run as root, and there is no other user"

    @classmethod
    def version(cls) -> str:
        return _version(_postgres("postgres"), "--version")

    @property
    def address(self) -> str:
        return f"postgresql://bench:{self._password}@{HOST}:{self.port}/postgres"

    def start(self) -> None:
        user = None if os.geteuid() else _unprivileged()
        secret, data = self.directory / "secret", self.directory / "data"
        secret.write_text(self._password)
        if user:
            for place in (self.directory, secret):
                shutil.chown(place, user)
        where: list[str | Path] = ["-D", data]
        setup = [_postgres("initdb"), *where, "-U", "bench", "-A", "scram-sha-256", f"--pwfile={secret}"]
        initdb = Child(setup, {}, self.log, cwd=self.directory, user=user)
        try:
            initdb.wait(SETUP_S)
        finally:
            initdb.end(0)
        options = ["-p", str(self.port), "-h", HOST, "-c", "unix_socket_directories="]
        self._children.append(
            Child([_postgres("postgres"), *where, *options], {}, self.log, cwd=self.directory, user=user)
        )
        # the client's first word asks for TLS; a server that still starts answers it too, so its log must say so
        self._await(
            lambda: (
                b"ready to accept connections" in self.log.read_bytes()
                and self._greeting(b"\x00\x00\x00\x08\x04\xd2\x16\x2f", 1) in (b"N", b"S")
            )
        )


SERVERS: dict[str, type[Server]] = {each.kind: each for each in (Nats, Redis, RabbitMQ, Postgres)}


def _lacking(command: str) -> str:
    return "" if shutil.which(command) else f"there is no {command} here"


def _rabbitmq() -> str:
    """The server's own script: the one on PATH of some systems changes the user and the directory of the data."""
    packaged = "/usr/lib/rabbitmq/bin/rabbitmq-server"
    found = packaged if Path(packaged).exists() else shutil.which("rabbitmq-server")
    return found if found and shutil.which("epmd") else ""


def _postgres(program: str) -> str:
    packaged = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"), key=lambda path: float(path.parts[4]))
    return shutil.which(program) or (str(packaged[-1]) if packaged else "")


def _unprivileged() -> str | None:
    known = {each.pw_name for each in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in known), None)


@cache
def _version(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    return next(iter(re.findall(r"\d+(?:\.\d+)+", done.stdout)), "")
