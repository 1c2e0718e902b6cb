"""The worker of retrieval: ``aiqueue work aiqueue.rag:worker``."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

from ..client import Client, check_client
from ..errors import AIQueueError, BadInput
from ..units import Backoff
from ..worker import Responder, Session, Worker
from . import bindings, config_file, status
from .config import RagConfig
from .ingest import delete, ingest
from .messages import RagDelete, RagDocument, RagReindex
from .queries import register_queries
from .reindex import reindex
from .runtime import RagRuntime, load_gateway, open_embedder, open_store
from .types import Embedder, VectorStore

log = logging.getLogger(__name__)

QUERIES: Final = "rag.queries"
# Documents are parsed in children of their own, so what is delivered again is a killed worker's, and no suspect. Trials
# are in the worker, since no child has its store: whoever kills that worker three times would convict the document.
SUSPECT_AFTER: Final = 100


class RagWorker(Worker):
    """Ingests documents, and answers questions and requests for the status of documents. Reads rag.toml when it starts,
    and tenants, limits and answers again on SIGHUP, and gateway.toml.

    `config`: the path of the file. None: see `load`. `embedder`, `store`: in place of those that rag.toml names; the
    worker closes them. Commands such as `aiqueue rag ls` cannot read a `store` of your own. The other options are those
    of `Worker`. `tenants` also bounds what is answered.
    """

    def __init__(
        self,
        config: Path | None = None,
        *,
        embedder: Embedder | None = None,
        store: VectorStore | None = None,
        concurrency: int = 64,
        drain_timeout: float | str = "30s",
        **options: Any,
    ) -> None:
        super().__init__(
            concurrency=concurrency,
            drain_timeout=drain_timeout,
            lifespan=self._lend_runtime,
            suspect_after=SUSPECT_AFTER,
            **options,
        )
        self._path = config
        self._embedder = embedder
        self._store = store
        self._runtime: RagRuntime | None = None
        # the handlers count what has failed by itself: a document whose worker has died has used no attempt
        retry = Backoff(attempts=10_000)
        self.handle(RagDocument, retry=retry, timeout=None)(ingest)
        self.handle(RagDelete, retry=retry)(delete)
        self.handle(RagReindex, retry=retry, timeout=None)(reindex)
        register_queries(self)

    @asynccontextmanager
    async def running(self, client: Client) -> AsyncIterator[Session]:
        """See `Worker.running`. Raises TopologyError for a wrong rag.toml, BadInput for a missing package, and
        ConfigMismatch if the documents are kept elsewhere.
        """
        check_client(client)
        if self._runtime is not None:
            raise BadInput("this retrieval worker runs already: make another one for a second client")
        config = await asyncio.to_thread(self._load, client)
        bindings.check_tenants(self.tenants)
        mine = bindings.OWN if self._store is not None else bindings.binding_of(config, client.settings)
        await bindings.bind(
            client.connection, client.topology, mine, tenants=self.tenants, moved_from=config.store.moved_from
        )
        self._runtime = runtime = await self._open(client, config)
        try:
            async with AsyncExitStack() as stack:
                await stack.enter_async_context(status.serving(client, runtime.store, self.tenants))
                responder = Responder(families=[QUERIES], tenants=self.tenants)
                await stack.enter_async_context(responder.running(client))
                yield await stack.enter_async_context(super().running(client))
        finally:
            self._runtime = None
            await runtime.close()

    async def reload(self, client: Client) -> None:
        """Read rag.toml again; `aiqueue work` does so on SIGHUP. A wrong file is logged, and the former one stays.
        Another store, embedder or way of parsing needs a restart.
        """
        try:
            config = await asyncio.to_thread(self._load, client)
        except AIQueueError as error:
            log.error("rag.toml is not reloaded, and the former one stays: %s", error)  # noqa: TRY400
            return
        runtime = self._runtime
        if runtime is None:
            return
        former = runtime.config
        if (config.store, config.embedder, config.parsing) != (former.store, former.embedder, former.parsing):
            log.warning("%s: [store], [embedder] and [parsing] stay as they were: restart the worker", config.file)
        runtime.use(config, await asyncio.to_thread(load_gateway, client.settings))
        log.info("%s is reloaded: %d tenants", config.file or "rag.toml", len(config.tenants))

    def _load(self, client: Client) -> RagConfig:
        return config_file.load(self._path, streams=client.settings.streams)

    async def _open(self, client: Client, config: RagConfig) -> RagRuntime:
        store = self._store
        if store is None:
            store = await asyncio.to_thread(open_store, config, client.settings)
        try:
            runtime = RagRuntime(client, config, store, self._embedder or open_embedder(client, config))
        except BaseException:
            await store.close()
            raise
        runtime.use(config, await asyncio.to_thread(load_gateway, client.settings))
        runtime.queries.answers_max = max(1, self.concurrency // 2)
        return runtime

    @asynccontextmanager
    async def _lend_runtime(self) -> AsyncIterator[RagRuntime | None]:
        yield self._runtime


worker = RagWorker()
