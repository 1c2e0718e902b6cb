"""A cluster in which one server can be kept behind the leader of a stream: it gets all but that stream's changes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from pathlib import Path
from typing import Self

from aiqueue.server import supervisor

from .support import Cluster

_WITH_PAYLOAD = (b"RMSG", b"HMSG", b"LMSG")


class LaggingCluster(Cluster):
    """The routes between its nodes lead through relays, which can leave out what the raft group of a stream says."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._held = ("", b"")
        self._ports: dict[str, tuple[int, int]] = {}  # by node: of its relay, of its routes
        self._servers: list[asyncio.Server] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._relay, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def hold(self, node: str, stream: str) -> None:
        """From now on, this node gets no changes of a stream, and takes no part in the elections of its leader.

        After 10 s without news of the leader, the node says that there is none.
        """
        group = self.ask(f"STREAM.INFO.{stream}")["cluster"]["raft_group"]
        self._held = node, group.encode()

    def release(self) -> None:
        """The node gets what it has missed."""
        self._held = ("", b"")

    def _relay(self) -> None:
        self._loop.run_forever()
        self._loop.run_until_complete(self._close())
        self._loop.close()

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _choose_routes(self) -> None:
        for node in self.nodes:
            self._ports[node.directory.name] = supervisor.free_port(), supervisor.free_port()
        for name, (relay, port) in self._ports.items():
            asyncio.run_coroutine_threadsafe(self._listen(name, relay, port), self._loop).result(10)
        for node in self.nodes:
            name = node.directory.name
            routes = ", ".join(
                f'"nats://{supervisor.HOST}:{relay}"' for other, (relay, _) in self._ports.items() if other != name
            )
            relay, port = self._ports[name]
            node.extra = (
                f'server_name: "{name}"\ncluster {{ name: "test", listen: "{supervisor.HOST}:{port}", '
                f'advertise: "{supervisor.HOST}:{relay}", routes: [{routes}] }}\n'
            )

    async def _listen(self, name: str, relay: int, port: int) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.closing(writer), contextlib.suppress(OSError):
                there, out = await asyncio.open_connection(supervisor.HOST, port)
                ends = {"to": name, "from": ""}
                with contextlib.closing(out):
                    await asyncio.gather(
                        self._pass_on(reader, out, ends, is_dialer=True), self._pass_on(there, writer, ends)
                    )

        self._servers.append(await asyncio.start_server(serve, supervisor.HOST, relay, limit=2**26))

    async def _pass_on(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        ends: dict[str, str],
        *,
        is_dialer: bool = False,
    ) -> None:
        """Pass frames on. `ends`: the nodes of the connection. The one that has opened it is known by its INFO."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while line := await reader.readline():
                words, payload = line.split(), b""
                if is_dialer and words[:1] == [b"INFO"] and not ends["from"]:  # later ones are of others
                    ends["from"] = json.loads(line[5:])["server_name"]
                if words and words[0] in _WITH_PAYLOAD:
                    payload = await reader.readexactly(int(words[-1]) + 2)
                node, group = self._held
                if payload and group and node in ends.values() and any(group in each for each in words[1:3]):
                    continue
                writer.write(line + payload)
                await writer.drain()
        writer.close()
