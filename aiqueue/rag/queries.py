"""Questions: embedded, searched within their deadline, and answered with passages, or in words too."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, Protocol

from ..errors import AIQueueError, Stale
from ..job import Job, Reject, Retry
from ..tracing import names, span
from ..units import Backoff
from .answering import Answerer
from .failures import ATTEMPTS, RETRY, counting_failures, is_waited_for
from .messages import RagQuery, check_tenant
from .types import Mode, Passage, VectorStore

if TYPE_CHECKING:
    from ..client import Client
    from ..gateway import GatewayConfig
    from ..worker import Worker
    from .config import RagConfig
    from .embed_batcher import EmbedBatcher

SEARCH_S: Final = 10.0  # of one question, embedded and searched
_DELAYS: Final = Backoff(attempts=ATTEMPTS, first="200ms", factor=2, cap="5s")  # of a search that fails by itself
PASSAGES_STEP: Final = "passages"
_SLOT_RETRY_S: Final = 1.0

ReadyTenant = Callable[[str], Awaitable[bool]]  # open the tenant's part of the store; False: it has no documents


class HasQueries(Protocol):
    """What `job.state` of a handler of questions has."""

    @property
    def queries(self) -> Queries: ...


class Queries:
    """Answers the questions of one worker.

    `embedder`: shared with the documents, which let questions go first. `ready`: see `ReadyTenant`. `answers_max`: how
    many answers in words are under way at once, each of which holds a slot of the worker; further questions of this
    kind go back to their lane.
    """

    def __init__(
        self,
        client: Client,
        config: RagConfig,
        store: VectorStore,
        *,
        embedder: EmbedBatcher,
        ready: ReadyTenant,
        answerer: Answerer | None = None,
        answers_max: int = 50,
    ) -> None:
        self._client = client
        self._config = config
        self._store = store
        self._embedder = embedder
        self._ready = ready
        self.answerer = answerer or Answerer(client, config.answers)
        self.answers_max = answers_max
        self._answers = 0

    def use(self, config: RagConfig, gateway: GatewayConfig | None) -> None:
        """Take over another configuration. `gateway`: see `Answerer`."""
        self._config = config
        self.answerer = Answerer(self._client, config.answers, gateway)

    async def run(self, job: Job[RagQuery]) -> dict[str, Any]:
        """Return the result of a question, see docs/guides/rag.md. Raises Retry and Reject, and Stale."""
        if not job.message.answer:
            async with counting_failures(job, delays=_DELAYS):
                return await self._find(job)
        if self._answers >= self.answers_max:
            raise Retry(f"{self._answers} answers are under way in this worker", after=_SLOT_RETRY_S)
        self._answers += 1
        try:
            async with counting_failures(job, delays=_DELAYS):
                return await self._answer(job)
        finally:
            self._answers -= 1

    async def _find(self, job: Job[RagQuery]) -> dict[str, Any]:
        started = time.monotonic()
        passages = await self._search_in_time(job)
        return self._result(job, passages, time.monotonic() - started)

    async def _answer(self, job: Job[RagQuery]) -> dict[str, Any]:
        started = time.monotonic()
        passages = await self._keep_passages(job)
        took_s = time.monotonic() - started
        with span(names.RESPONSE):
            found = await self.answerer.answer(job, passages)
        return {**self._result(job, passages, took_s), **found}

    async def _keep_passages(self, job: Job[RagQuery]) -> list[Passage]:
        """Return the passages, the same in each attempt: the numbers that the answer cites are theirs."""

        async def search() -> list[dict[str, Any]]:
            return [asdict(each) for each in await self._search_in_time(job)]

        return [Passage(**each) for each in await job.step(PASSAGES_STEP, search)]

    async def _search_in_time(self, job: Job[RagQuery]) -> list[Passage]:
        left_s = SEARCH_S
        if job.deadline is not None:
            left_s = min(left_s, job.deadline - self._client.connection.clock.now())
            if left_s <= 0:
                raise Reject("its deadline is over")
        check_tenant(job.message, job.tenant)
        try:
            async with asyncio.timeout(left_s):
                return await self._search(job)
        except TimeoutError:
            problem, is_final = f"the search took longer than {left_s:.3g} s", left_s < SEARCH_S
        except Stale:
            raise
        except AIQueueError as error:
            problem, is_final = str(error), not error.retryable
            if is_waited_for(error) and not getattr(error, "passes", False):  # nobody waits for an answer so long
                is_final = True
        raise Reject(problem) if is_final else Retry(problem)

    async def _search(self, job: Job[RagQuery]) -> list[Passage]:
        message = job.message
        if not await self._ready(job.tenant):
            return []
        k = max(message.k, self._config.answers.passages) if message.answer else message.k
        vector = None
        if message.mode != "keyword":
            with span(names.EMBED):
                vector = (await self._embedder.embed([message.query], tenant=job.tenant, urgent=True))[0]
        with span(names.VECTOR_SEARCH):
            return await self._store.search(
                job.tenant, message.query, vector, k, where=message.where, mode=message.mode
            )

    def _result(self, job: Job[RagQuery], passages: Sequence[Passage], took_s: float) -> dict[str, Any]:
        message = job.message
        mode: Mode = message.mode
        return {
            "query_id": job.id,
            "query": message.query,
            "mode": mode,
            "passages": [asdict(each) for each in passages],
            "took_s": round(took_s, 6),
        }


async def answer_query(job: Job[RagQuery]) -> dict[str, Any]:
    """The handler of questions. `job.state` is a `HasQueries`."""
    state: HasQueries = job.state
    return await state.queries.run(job)


def register_queries(worker: Worker) -> None:
    """Have a worker, whose lifespan yields a `HasQueries`, answer questions."""
    # an attempt whose worker has died, or that finds no room among the answers, is no failure: `run` counts these
    worker.handle(RagQuery, retry=RETRY, timeout=None)(answer_query)
