"""On which host, and in which store, tenants' documents are: noted in a stream, so that no second store is begun."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from .. import headers, subjects
from ..config import Settings
from ..errors import BadInput, ConfigMismatch, Conflict, NotFound
from ..topology import Topology
from .config import RagConfig
from .runtime import open_store, store_path

if TYPE_CHECKING:
    from ..client import Client
    from ..connection import Connection, Stored
    from .types import VectorStore

VERSION = 1
TRIES_MAX = 8


@dataclass(frozen=True, slots=True)
class Binding:
    """Where documents are. `host` and `path` are "" for a store that is bound to no host; `path` also where the
    directory is the default one beside an embedded server.
    """

    kind: str
    host: str = ""
    path: str = ""

    @property
    def place(self) -> str:
        """As `moved_from` names it."""
        return f"{self.host}:{self.path}"

    def __str__(self) -> str:
        if self.kind != "sqlite":
            return self.kind
        return f"on host {self.host}" + (f" in {self.path}" if self.path else "")


OWN: Final = Binding("own")  # a store that a worker was given


def binding_of(config: RagConfig, settings: Settings) -> Binding:
    """Return where this process would keep documents."""
    if config.store.kind != "sqlite":
        return Binding(config.store.kind)
    is_embedded = settings.url is None and settings.context is None
    path = "" if is_embedded and config.store.path is None else str(store_path(config, settings).absolute())
    return Binding("sqlite", config.store.host or socket.gethostname(), path)


async def bind(
    connection: Connection, topology: Topology, mine: Binding, *, tenants: Sequence[str] | None, moved_from: str | None
) -> None:
    """Note where the documents of these tenants (None: all) are, or check that they are there.

    Raises ConfigMismatch, in one line that says what to do, if they are elsewhere; NotFound without the stream.
    """
    stream = topology.rag_stream.name
    wanted = [subjects.rag_store(each) for each in tenants] if tenants is not None else [subjects.rag_store(None)]
    for _ in range(TRIES_MAX):
        known = await _read_all(connection, stream)
        for subject, (binding, _) in known.items():
            concerns = tenants is None or subject in (*wanted, subjects.rag_store(None))
            if concerns and binding != mine and moved_from != binding.place:
                raise ConfigMismatch(_describe(subject, binding, mine))
        stale = [subject for subject in known if known[subject][0] != mine and (tenants is None or subject in wanted)]
        try:
            for subject in dict.fromkeys([*wanted, *stale]):
                if subject not in known or known[subject][0] != mine:
                    await _store(connection, subject, mine, known[subject][1] if subject in known else 0)
        except Conflict:
            continue  # another worker was first: what has it noted?
        return
    raise Conflict(f"other workers wrote to {stream} before each of {TRIES_MAX} tries: start this worker again")


async def check(
    connection: Connection, topology: Topology, mine: Binding, *, tenant: str, moved_from: str | None
) -> None:
    """Raise ConfigMismatch, in one line that says what to do, if a tenant's documents are elsewhere. Notes nothing.

    Raises NotFound without the stream.
    """
    known = await _read_all(connection, topology.rag_stream.name)
    for subject in (subjects.rag_store(tenant), subjects.rag_store(None)):
        found = known[subject][0] if subject in known else mine
        if found != mine and moved_from != found.place:
            raise ConfigMismatch(_describe(subject, found, mine))


async def open_bound_store(client: Client, config: RagConfig, tenant: str) -> VectorStore:
    """Open the store that rag.toml names, to read a tenant's documents. Raises as `check` and `open_store`."""
    mine = binding_of(config, client.settings)
    await check(client.connection, client.topology, mine, tenant=tenant, moved_from=config.store.moved_from)
    return await asyncio.to_thread(open_store, config, client.settings)


def _describe(subject: str, binding: Binding, mine: Binding) -> str:
    *_, last = subject.split(".")
    whose = f"the documents of tenant {last}" if ".tenant." in subject else "the documents"
    if OWN in (binding, mine):
        theirs, here = (
            "in the store that a worker was given" if each == OWN else str(each) for each in (binding, mine)
        )
        return (
            f"{whose} are kept {theirs}, and here they would be {here}: use RagWorker(store=…) everywhere, or nowhere; "
            f'or, to begin anew here, set [store] moved_from = "{binding.place}" in rag.toml'
        )
    if binding.kind != mine.kind:
        theirs = f"in SQLite {binding}" if binding.kind == "sqlite" else f"in {binding}"
        return (
            f'{whose} are kept {theirs}, and here [store] kind is "{mine.kind}": set it to "{binding.kind}" in '
            f'rag.toml; or, to begin anew here, set [store] moved_from = "{binding.place}"'
        )
    here = f"host {mine.host}" + (f", {mine.path}" if mine.path else "")
    return (
        f"{whose} are kept {binding}, and this is {here}: run the worker there; or "
        f'use [store] kind = "pgvector"; or, if the directory has moved here, set [store] moved_from = '
        f'"{binding.place}" in rag.toml'
    )


async def _read_all(connection: Connection, stream: str) -> dict[str, tuple[Binding, int]]:
    found: dict[str, tuple[Binding, int]] = {}
    try:
        async for stored in connection.read(stream, f"{subjects.RAG_STORES}.>"):
            found[stored.subject] = _parse(stream, stored), stored.seq
    except NotFound:
        raise NotFound(f"there is no stream {stream}: run `aiqueue apply` first") from None
    return found


def _parse(stream: str, stored: Stored) -> Binding:
    content: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(stored.data)
    if isinstance(content, dict) and content.get("v") == VERSION:
        values = [content.get(name) for name in ("kind", "host", "path")]
        texts = [each for each in values if isinstance(each, str)]
        if len(texts) == len(values):
            return Binding(*texts)
    cure = f"update aiqueue, or delete it with `nats stream rmm {stream} {stored.seq}`"
    raise ConfigMismatch(
        f"what is stored on {stored.subject} in {stream} is nothing that this aiqueue can read: {cure}"
    )


async def _store(connection: Connection, subject: str, binding: Binding, expected: int) -> None:
    body = json.dumps({"v": VERSION, **asdict(binding)}, separators=(",", ":")).encode()
    told = {headers.MSG_ID: subjects.new_id(), headers.EXPECTED: str(expected)}
    await connection.store(subject, body, told)


def check_tenants(tenants: Sequence[str] | None) -> None:
    """Raise BadInput for an empty list of tenants, which would bind nothing."""
    if tenants is not None and not tenants:
        raise BadInput("tenants is empty: name some, or leave it out for all")
