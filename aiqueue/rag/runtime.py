"""What the jobs of one retrieval worker share: the store, the embedder, the parsers."""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Settings
from ..errors import BadInput, TopologyError
from ..gateway import GatewayConfig, load
from ..server import find_directory
from .byte_budget import ByteBudget
from .config import STORE_DIRECTORY, RagConfig
from .embed_batcher import EmbedBatcher
from .embedding import DIMENSIONS, WordLlamaEmbedder
from .errors import StoreUnavailable
from .fetch_share import FetchShare
from .fetched import FetchLimits
from .job_ends import JobEnd, end_of_job
from .parse_pool import ParseLimits, ParsePool
from .queries import Queries
from .types import Embedder, VectorStore

if TYPE_CHECKING:
    from ..client import Client
    from .store import Upserter

log = logging.getLogger(__name__)

FILE, VARIABLE = "gateway.toml", "AIQUEUE_GATEWAY"
TENANTS_KNOWN_MAX = 10_000
OPEN_BYTES_MAX = 512 * 1024**2  # of larger documents that are open at once
SLOW_FETCHES_MAX = 16  # of a tenant, if the worker does not say


class RagRuntime:
    """The parts of one worker: `store`, `batcher`, `upserter`, `pool`, `fetches`, `queries`. `close` ends all; safe
    twice.
    """

    def __init__(self, client: Client, config: RagConfig, store: VectorStore, embedder: Embedder) -> None:
        from .store import Upserter  # noqa: PLC0415  (numpy is loaded where it is needed)

        self._client = client
        self.config = config
        self.store = store
        self.batcher = EmbedBatcher(embedder)
        self.upserter: Upserter = Upserter(store)
        limits = ParseLimits(
            size_bytes_max=max(config.limits.document_bytes, config.limits.file_bytes),
            chunks_max=config.parsing.chunks_max,
            memory_bytes=config.parsing.memory_bytes,
            cpu_s=math.ceil(config.parsing.time_s),
            timeout_s=config.parsing.time_s,
        )
        processes = config.parsing.processes or os.cpu_count() or 1
        self.pool = ParsePool(size=processes, limits=limits, parsers=config.parsing.parsers)
        self.fetches = FetchShare(SLOW_FETCHES_MAX)
        self.open_bytes = ByteBudget(OPEN_BYTES_MAX)
        self.store_problems: dict[str, str] = {}  # by tenant: why its documents wait for the store
        self._opened: dict[str, asyncio.Task[None]] = {}
        self.queries = Queries(client, config, store, embedder=self.batcher, ready=self.is_ready)

    def now(self) -> float:
        """The server's time, as deadlines are: seconds since the epoch."""
        return self._client.connection.clock.now()

    @property
    def fetch_limits(self) -> FetchLimits:
        """The limits of a document by path or URL."""
        return FetchLimits(size_bytes_max=self.config.limits.file_bytes, total_s=self.config.limits.fetch_s)

    def use(self, config: RagConfig, gateway: GatewayConfig | None) -> None:
        """Take over what may change in a running worker: tenants, limits and answers. `gateway`: see `load_gateway`."""
        self.config = config
        self.queries.use(config, gateway)

    async def open(self, tenant: str) -> None:
        """Make the tenant's part of the store ready, once. Raises EmbedderChanged, Unavailable."""
        task = self._opened.get(tenant)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            if len(self._opened) >= TENANTS_KNOWN_MAX:
                self._opened.clear()
            embedder = self.batcher.embedder
            work = self.store.open(tenant, embedder.name, embedder.dimensions)
            task = self._opened[tenant] = asyncio.create_task(_awaited(work))
        await asyncio.shield(task)

    async def is_ready(self, tenant: str) -> bool:
        """Open the tenant's part of the store for a question. False: it has no documents, and nothing is made of it.

        Raises as `open`.
        """
        task = self._opened.get(tenant)
        if (task is None or not task.done()) and not (await self.store.stats(tenant)).embedder:
            return False
        await self.open(tenant)
        return True

    async def end_of_job(self, tenant: str, job_id: str) -> JobEnd | None:
        """See `job_ends.end_of_job`."""
        return await end_of_job(self._client, tenant, job_id)

    def forget(self, tenant: str) -> None:
        """Open the tenant's part anew before its next use: its vectors are another embedder's now."""
        self._opened.pop(tenant, None)

    async def close(self) -> None:
        """Store what was handed over, and end threads and children. Safe twice."""
        await self.upserter.close()
        await self.batcher.close()
        await self.pool.close()
        await asyncio.gather(*self._opened.values(), return_exceptions=True)
        await self.store.close()


async def _awaited(work: Any) -> None:
    await work


def store_path(config: RagConfig, settings: Settings) -> Path:
    """Return the directory of the SQLite databases."""
    return config.store.path or find_directory_of(settings) / STORE_DIRECTORY


def find_directory_of(settings: Settings) -> Path:
    """Return aiqueue's data directory."""
    return settings.directory or find_directory()


def open_store(config: RagConfig, settings: Settings) -> VectorStore:
    """Return the store that rag.toml names. Raises BadInput for a missing package, connection string or
    directory.
    """
    from . import store  # noqa: PLC0415  (numpy and psycopg are loaded where they are needed)

    if config.store.kind == "sqlite":
        path = store_path(config, settings)
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            why = f"{error.strerror}: let the user of the workers write it, or set store.path of rag.toml"
            raise StoreUnavailable(f"{path}: {why}") from None
        return store.SqliteStore(path)
    dsn = os.environ.get(config.store.dsn_env, "")
    if not dsn:
        raise BadInput(f"{config.store.dsn_env} is not set: set it to PostgreSQL's connection string")
    make: Callable[[str], VectorStore] = store.PgVectorStore
    return make(dsn)


def open_embedder(client: Any, config: RagConfig) -> Embedder:
    """Return the embedder that rag.toml names. `client`: an open client, for one that calls the gateway."""
    if config.embedder.kind == "wordllama":
        return WordLlamaEmbedder(config.embedder.dimensions or DIMENSIONS)
    from .gateway_embedder import GatewayEmbedder  # noqa: PLC0415  (only where it is used)

    path = store_path(config, client.settings)
    return GatewayEmbedder(
        client, config.embedder.model, config.embedder.dimensions or 0,
        cache=path.with_name(f"{path.name}-embeddings"), config=load_gateway(client.settings),
    )  # fmt: skip


def load_gateway(settings: Settings) -> GatewayConfig | None:
    """Return what gateway.toml says, to refuse early what the gateway would refuse; None: it is only where the
    gateway's workers are, or it is wrong, which is logged.
    """
    named = os.environ.get(VARIABLE)
    path = Path(named) if named else settings.streams and settings.streams / FILE
    if not path or not path.exists():
        return None
    try:
        return load(path)
    except TopologyError as error:
        log.warning("answers and embeddings are asked for without a look into gateway.toml: %s", error)
        return None
