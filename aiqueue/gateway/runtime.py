"""What the attempts of one worker share: the configuration, the providers, the ledger and the budgets."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ..errors import AIQueueError, BadInput
from ..lanes import WarnOnce
from .budgets import Budgets
from .config import GatewayConfig, ModelConfig, ProviderConfig
from .key_budgets import KnownApiKeys
from .ledger import UsageLedger
from .model_prices import ModelPrices
from .opening import open_provider
from .prices import Price, PriceUnknown
from .providers import Provider, upstream_body
from .requests import EmbeddingRequest, GatewayRequest, check_tenant
from .token_bound import bound_tokens, tokens_at_most
from .usage_store import UsageStore

if TYPE_CHECKING:
    from ..client import Client

log = logging.getLogger(__name__)

CLOSE_S: Final = 10.0  # how long what is still written for ended calls may take when the worker stops

Request = GatewayRequest | EmbeddingRequest


@dataclass(frozen=True, slots=True)
class CallPlan:
    """A call that may be made: of which model, with which body, and what it takes at most.

    `price`, `bound_micros`: None: the price is not known.
    """

    model: ModelConfig
    body: dict[str, Any]
    prompt_tokens_max: int
    completion_tokens_max: int
    price: Price | None

    @property
    def bound_micros(self) -> int | None:
        if self.price is None:
            return None
        return self.price.bound_micros(self.prompt_tokens_max, self.completion_tokens_max)


def plan_call(request: Request, name: str, tenant: str, config: GatewayConfig, prices: ModelPrices) -> CallPlan:
    """Return the call of the model `name` that a request asks for. Raises BadInput, in one line; PriceUnknown if the
    tenant has a budget, and the price is unknown.
    """
    check_tenant(request, tenant)
    is_chat = isinstance(request, GatewayRequest)
    model = config.find_model(name, "chat" if is_chat else "embedding")
    bound = bound_tokens(request, model)
    body = upstream_body(request, model, bound.limit)
    audio = isinstance(request, GatewayRequest) and request.has_media
    price = prices.find(model, body, audio=audio)
    if price is None and config.budget_of(tenant) is not None:
        raise PriceUnknown(tenant, model.name, str(body["service_tier"]) if model.price is not None else "")
    return CallPlan(model, body, bound.prompt, bound.completion, price)


class Runtime:
    """From `open` to `close`, on an open client. `use` replaces the configuration while calls are under way."""

    def __init__(self, client: Client, config: GatewayConfig, prices: ModelPrices) -> None:
        self.client = client
        self._store = UsageStore(client.connection, client.topology)
        self.ledger = UsageLedger(self._store)
        self.budgets = Budgets(self._store, self.ledger)
        self.api_keys = KnownApiKeys(client)
        self.warn_once = WarnOnce(log)
        self._opened: dict[str, _Opened] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.use(config, prices)

    def use(self, config: GatewayConfig, prices: ModelPrices) -> None:
        """Use this configuration from the next call on. Keys are read anew."""
        self.config, self._prices = config, prices
        self.budgets.use_budgets(config.budgets.values())
        opened, self._opened = self._opened, {}
        for each in opened.values():
            each.is_retired = True
            if not each.users:
                self.finish(each.provider.close())

    async def open(self) -> None:
        """Open the providers that have models, and say which have no key. Raises BadInput for a missing package, and
        NotFound without a stream of usage.
        """
        await self.ledger.find("gateway", "none")  # whether there is a stream
        names = {model.provider.name for model in self.config.models.values()}
        for name in sorted(names):
            config = self.config.providers[name]
            try:
                config.read_key()
            except BadInput as error:
                log.warning("its models are not called here, only their fallbacks: %s", error)
                continue
            warm_up = getattr(self._open(config).provider, "warm_up", None)
            if warm_up is not None:  # litellm takes seconds to import
                await warm_up()

    async def close(self) -> None:
        """Write what is left of ended calls, then close all connections."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_S)
        for task in [*self._tasks]:
            task.cancel()
        for each in self._opened.values():
            await each.provider.close()
        self._opened.clear()
        await self.budgets.close()

    async def now(self) -> float:
        """Return the server's time, in seconds since the epoch."""
        return await self._store.now()

    def together(self) -> AbstractContextManager[None]:
        """See `UsageStore.together`."""
        return self._store.together()

    def plan(self, request: Request, name: str, tenant: str) -> CallPlan:
        """See `plan_call`."""
        return plan_call(request, name, tenant, self.config, self._prices)

    def tokens_at_most(self, request: Request) -> float:
        """Return what a request costs of the limits of its model at most, in tokens; 0 for one that is refused."""
        try:
            return tokens_at_most(request, self.config.find_model(request.model))
        except BadInput:
            return 0.0

    @asynccontextmanager
    async def provider(self, config: ProviderConfig) -> AsyncIterator[Provider]:
        """Lend what calls a provider; it stays open meanwhile. Raises BadInput if it has no key."""
        opened = self._opened.get(config.name)
        if opened is None or opened.config != config:  # not equal: the configuration was replaced just now
            opened = self._open(config)
        opened.users += 1
        try:
            yield opened.provider
        finally:
            opened.users -= 1
            if opened.is_retired and not opened.users:
                self.finish(opened.provider.close())

    def check(self, config: ProviderConfig) -> None:
        """Raise BadInput if this provider cannot be called, because it has no key."""
        known = self._opened.get(config.name)
        if known is None or known.config != config:
            self._open(config)

    def _open(self, config: ProviderConfig) -> _Opened:
        opened = _Opened(config, open_provider(config))
        if self.config.providers.get(config.name) == config:
            self._opened[config.name] = opened
        else:
            opened.is_retired = True
        return opened

    def finish(self, work: Coroutine[Any, Any, Any], problem: str = "") -> asyncio.Task[None]:
        """Do what a call has left to do, whatever becomes of its handler. Failures are logged as `problem`."""
        task = asyncio.create_task(_log_failure(work, problem))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


@dataclass(slots=True, eq=False)
class _Opened:
    """A provider that is open, and for how many calls. `is_retired`: it closes when they have ended."""

    config: ProviderConfig
    provider: Provider
    users: int = 0
    is_retired: bool = False


async def _log_failure(work: Coroutine[Any, Any, Any], problem: str) -> None:
    try:
        await work
    except AIQueueError as error:
        log.warning("%s: %s", problem or "a call's end is not written", error)
