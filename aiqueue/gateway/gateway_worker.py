"""The worker of the gateway: ``aiqueue work aiqueue.gateway:worker``."""

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
from ..worker import Session, Worker, drain_both
from . import config_file
from .batches import BatchQuotas, GatewayBatch
from .batches.engine import run_batch
from .batches.run import BatchState
from .config import GatewayConfig
from .handler import answer_request
from .model_prices import ModelPrices
from .requests import EmbeddingRequest, GatewayRequest
from .runtime import Request, Runtime

log = logging.getLogger(__name__)

# the handler counts its calls itself: a request that is parked until its budget begins anew has used no attempt
_ATTEMPTS = Backoff(attempts=10_000)
_OF_FAULTS = {Exception: Backoff(attempts=5)}
# calls take long, and wait for a network: after the deaths of two workers, a trial of each in turn would take hours
SUSPECT_AFTER: Final = 10
BATCHES: Final = "gateway.batches"
BATCHES_AT_ONCE: Final = 16  # of a worker; each holds some MiB, and waits most of the time
BATCHES_DRAIN: Final = "30s"
BATCH_SUSPECT_AFTER: Final = 1_000  # a batch runs for hours, in which many workers may die


class GatewayWorker(Worker):
    """Answers gateway.requests by calls of models. It starts only with a good gateway.toml, and reads it again on
    SIGHUP: a bad one is logged, and the former one stays.

    `config`: the path of the file. None: see `load`. The other options are those of `Worker`. Batches have 16 slots of
    their own, because they wait for requests. `quotas`: of a batch.
    """

    optional_families = (BATCHES,)

    def __init__(
        self,
        config: Path | None = None,
        *,
        concurrency: int = 100,
        drain_timeout: float | str = "2m",
        quotas: BatchQuotas | None = None,
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
        self._quotas = quotas or BatchQuotas()
        self._runtime: Runtime | None = None
        options_of_attempts: Any = {"retry": _ATTEMPTS, "timeout": None, "on": _OF_FAULTS, "cost": self._tokens_at_most}
        self.handle(GatewayRequest, **options_of_attempts)(answer_request)
        self.handle(EmbeddingRequest, **options_of_attempts)(answer_request)
        _handle_batches(self)

    @asynccontextmanager
    async def running(self, client: Client) -> AsyncIterator[Session]:
        """See `Worker.running`. Raises TopologyError for a wrong gateway.toml, and BadInput for a missing package."""
        check_client(client)
        if self._runtime is not None:
            raise BadInput("this gateway worker runs already: make another one for a second client")
        self._runtime = runtime = Runtime(client, *await asyncio.to_thread(self._load, client))
        try:
            await runtime.open()
            async with AsyncExitStack() as stack:
                state = BatchState(runtime, self._quotas)
                batches = await self._start_batches(stack, client, state)
                session = await stack.enter_async_context(super().running(client))
                try:
                    yield session
                finally:
                    state.stopping.set()
                    if batches is not None:
                        await drain_both(session, batches)
        finally:
            self._runtime = None
            await runtime.close()

    async def reload(self, client: Client) -> None:
        """Read gateway.toml and the keys again; `aiqueue work` does so on SIGHUP. If the file is wrong, that is logged,
        and the former one stays.
        """
        try:
            config, prices = await asyncio.to_thread(self._load, client)
        except AIQueueError as error:
            log.error("gateway.toml is not reloaded, and the former one stays: %s", error)  # noqa: TRY400
            return
        if self._runtime is not None:
            self._runtime.use(config, prices)
            log.info("%s is reloaded: %d models", config.file, len(config.models))

    def _load(self, client: Client) -> tuple[GatewayConfig, ModelPrices]:
        config = config_file.load(self._path, client.settings)
        return config, ModelPrices(config.models.values())

    @asynccontextmanager
    async def _lend_runtime(self) -> AsyncIterator[Runtime | None]:
        yield self._runtime

    def _resolve_families(self, client: Client) -> list[str]:
        """Leave batches out, which have slots of their own."""
        families = [each for each in super()._resolve_families(client) if each != BATCHES]
        if not families:
            raise BadInput("a gateway worker takes requests, too, not only batches: leave `families` out")
        return families

    async def _start_batches(self, stack: AsyncExitStack, client: Client, state: BatchState) -> Session | None:
        """Let batches have slots of their own: they wait for requests. None: this worker takes none."""
        if BATCHES not in super()._resolve_families(client):
            return None

        @asynccontextmanager
        async def lend_state() -> AsyncIterator[BatchState]:
            yield state

        batches = Worker(
            families=[BATCHES],
            tenants=self.tenants,
            concurrency=BATCHES_AT_ONCE,
            lifespan=lend_state,
            drain_timeout=BATCHES_DRAIN,
            name=f"{self.name}-batches",
            suspect_after=BATCH_SUSPECT_AFTER,
        )
        _handle_batches(batches)
        for each in self.arounds:
            batches.around(each.function)
        return await stack.enter_async_context(batches.running(client))

    def _tokens_at_most(self, request: Request) -> float:
        return 0.0 if self._runtime is None else self._runtime.tokens_at_most(request)


def _handle_batches(worker: Worker) -> None:
    worker.handle(GatewayBatch, retry=_ATTEMPTS, timeout=None, on=_OF_FAULTS)(run_batch)


worker = GatewayWorker()
