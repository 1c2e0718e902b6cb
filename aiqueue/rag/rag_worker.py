"""The retrieval worker: ``aiqueue work aiqueue.rag:worker``."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

from ..client import Client, check_client, connect
from ..config import Settings
from ..errors import AIQueueError, BadInput
from ..processes import find_object, find_reference
from ..worker import Lifespan, Responder, Session, Worker, drain_both
from . import bindings, config_file, status
from .config import RagConfig
from .failures import RETRY
from .ingest import delete, ingest
from .messages import RagDelete, RagDocument, RagReindex
from .queries import register_queries
from .reindex import reindex
from .runtime import RagRuntime, load_gateway, open_embedder, open_store
from .types import Embedder, VectorStore

log = logging.getLogger(__name__)

QUERIES: Final = "rag.queries"
# A suspect is tried in a child that opens the store itself, so that kills of workers convict nobody. One that is in
# flight at a few deaths is most often innocent: documents are embedded and stored together. With less than this, trials
# held up the innocent where a worker was killed every 3 s.
SUSPECT_AFTER: Final = 5


class RagWorker(Worker):
    """Ingests documents, and answers questions and requests for the status of documents. Reads rag.toml when it starts,
    and tenants, limits and answers again on SIGHUP, and gateway.toml.

    `config`: the path of the file. None: see `load`. `embedder`, `store`: in place of those that rag.toml names; the
    worker closes them. Commands such as `aiqueue rag ls` cannot read a `store` of your own. `concurrency` (1 to 10,000,
    default 64): the number of slots for documents, and the same number again for questions, which so never wait behind
    documents. The other options are those of `Worker`. `tenants` also bounds what is answered.
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
        self.handle(RagDocument, retry=RETRY, timeout=None)(ingest)
        self.handle(RagDelete, retry=RETRY)(delete)
        self.handle(RagReindex, retry=RETRY, timeout=None)(reindex)
        register_queries(self)

    @asynccontextmanager
    async def running(self, client: Client) -> AsyncIterator[Session]:
        """See `Worker.running`. Raises TopologyError for a wrong rag.toml, BadInput for a missing package, and
        ConfigMismatch if the documents are kept elsewhere.
        """
        check_client(client)
        if self._runtime is not None:
            raise BadInput("this retrieval worker runs already: make another one for a second client")
        config = await asyncio.to_thread(self.load, client)
        bindings.check_tenants(self.tenants)
        mine = bindings.OWN if self._store is not None else bindings.binding_of(config, client.settings)
        await bindings.bind(
            client.connection, client.topology, mine, tenants=self.tenants, moved_from=config.store.moved_from
        )
        self._runtime = runtime = await self.open_runtime(client, config)
        self.child_lifespan = self._lifespan_of_children(client)
        try:
            async with AsyncExitStack() as stack:
                await stack.enter_async_context(
                    status.serving(client, runtime.store, self.tenants, runtime.store_problems)
                )
                responder = Responder(families=[QUERIES], tenants=self.tenants)
                await stack.enter_async_context(responder.running(client))
                questions = await self._start_questions(stack, client)
                session = await stack.enter_async_context(super().running(client))
                try:
                    yield session
                finally:
                    if questions is not None:
                        await drain_both(session, questions)
        finally:
            self._runtime = None
            await runtime.close()

    async def reload(self, client: Client) -> None:
        """Read rag.toml again; `aiqueue work` does so on SIGHUP. A wrong file is logged, and the former one stays.
        Another store, embedder or way of parsing needs a restart.
        """
        try:
            config = await asyncio.to_thread(self.load, client)
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

    def load(self, client: Client) -> RagConfig:
        """Read rag.toml. Raises TopologyError."""
        config = config_file.load(self._path, streams=client.settings.streams)
        roots = {root for each in config.tenants.values() for root in each.roots}
        for root in sorted(root for root in roots if not root.is_dir()):
            log.warning(
                "%s: roots: %s is not on this host: documents below it wait for a worker that has it", config.file, root
            )
        return config

    async def open_runtime(self, client: Client, config: RagConfig) -> RagRuntime:
        """Open what the jobs share. The caller closes it."""
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
        runtime.fetches.slow_max = max(1, self.concurrency // 4)
        return runtime

    def _resolve_families(self, client: Client) -> list[str]:
        """Leave questions out, which have slots of their own, unless they are all that this worker takes."""
        families = super()._resolve_families(client)
        return [each for each in families if each != QUERIES] or families

    async def _start_questions(self, stack: AsyncExitStack, client: Client) -> Session | None:
        """Let questions have slots of their own, beside those of the documents. None: they need none."""
        if QUERIES in self._resolve_families(client) or QUERIES not in super()._resolve_families(client):
            return None
        questions = Worker(
            families=[QUERIES],
            tenants=self.tenants,
            concurrency=self.concurrency,
            lifespan=self._lend_runtime,
            name=f"{self.name}-questions",
            suspect_after=self.suspect_after,
        )
        questions.drain_timeout_s, questions.child_lifespan = self.drain_timeout_s, self.child_lifespan
        register_queries(questions)
        for each in self.arounds:
            questions.around(each.function)
        return await stack.enter_async_context(questions.running(client))

    @asynccontextmanager
    async def _lend_runtime(self) -> AsyncIterator[RagRuntime | None]:
        yield self._runtime

    def _lifespan_of_children(self, client: Client) -> Lifespan | None:
        """Return how a child opens what its job needs. None: parts of the user's own, and no name to find them by."""
        name = find_reference(self) if self._embedder is not None or self._store is not None else ""
        if (self._embedder is not None or self._store is not None) and not name:
            return None
        path = None if self._path is None else str(self._path.absolute())
        return functools.partial(lend_to_child, client.settings.to_plain(), path, name)


@asynccontextmanager
async def lend_to_child(settings: Mapping[str, Any], path: str | None, name: str) -> AsyncIterator[RagRuntime]:
    """Open in a child process what a worker's jobs share, with a connection and a store of its own.

    `settings`: of the worker's client. `path`: of rag.toml. `name`: ``module:name`` of the worker, if it has an
    embedder or a store of the user's own.
    """
    if name:
        made: RagWorker = find_object(name)
    else:
        made = RagWorker(None if path is None else Path(path), concurrency=1)
    async with connect(settings=Settings.of_plain(settings)) as client:
        runtime = await made.open_runtime(client, await asyncio.to_thread(made.load, client))
        try:
            yield runtime
        finally:
            await runtime.close()


worker = RagWorker()
