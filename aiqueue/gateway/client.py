"""Enqueue requests to the gateway: what can never be answered is refused before it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import BadInput
from .api_key_store import ApiKey
from .config import GatewayConfig
from .config_file import load
from .key_budgets import API_KEY
from .model_prices import ModelPrices
from .prices import PriceUnknown
from .runtime import Request, plan_call
from .token_bound import tokens_at_most

if TYPE_CHECKING:
    from ..client import Client, Handle


class Gateway:
    """The gateway as its callers see it, on an open client::

        gateway = Gateway(client)
        request = GatewayRequest(model="small", messages=[{"role": "user", "content": "Hello"}])
        handle = await gateway.enqueue(request, tenant="acme")
        answer = await handle.result()

    `config`: None: that of gateway.toml, which a worker on this client has too, see `load`. It is read once.
    `needs_keys`: whether to refuse models whose provider's key is missing; False where only the workers have the keys.
    """

    def __init__(self, client: Client, config: GatewayConfig | None = None, *, needs_keys: bool = True) -> None:
        """Raises TopologyError, in one line with file and key."""
        self._client = client
        self._config = load(settings=client.settings) if config is None else config
        self._prices = ModelPrices(self._config.models.values())
        self._needs_keys = needs_keys

    def check(self, request: Request, *, tenant: str, api_key: ApiKey | None = None) -> None:
        """Raise BadInput, in one line, if the gateway would refuse this request: for its model, options or limits, for
        a missing key, because there is a budget and the price is unknown, or by what `api_key` may ask for.
        """
        if api_key is not None and api_key.tenant != tenant:
            raise BadInput(f"API key {api_key.id} is of tenant {api_key.tenant}, not of {tenant!r:.80}")
        if api_key is not None and not api_key.allows(request.model):
            may = ", ".join(api_key.models or ())
            raise BadInput(f"API key {api_key.id} may not use model {request.model[:80]!r}, but {may}")
        plan = plan_call(request, request.model, tenant, self._config, self._prices)
        if api_key is not None and api_key.budget is not None and plan.price is None:
            raise PriceUnknown(tenant, plan.model.name)
        if self._needs_keys:
            plan.model.provider.read_key()

    def tokens_at_most(self, request: Request) -> float:
        """Return how many tokens a request can use at most. Raises BadInput for an unknown model."""
        return tokens_at_most(request, self._config.find_model(request.model))

    async def enqueue(
        self,
        request: Request,
        *,
        tenant: str,
        priority: str = "normal",
        share: bool = False,
        api_key: ApiKey | None = None,
        headers: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Handle[dict[str, Any]]:
        """Enqueue a request that passes `check`, and return its handle: as `Client.enqueue`, whose other options it
        takes.

        `share`: requests of the tenant that ask the same share one call, and its answer as long as that is kept (a
        day). The request has no `request_id` then: its id is a hash of what it asks. If the call has failed, the next
        such request makes another one.

        `api_key`: who asks. What it may ask for is checked, and its calls are charged to its budget, besides that of
        the tenant. Its limits a minute are not checked here, see `ApiKeys.admit`.

        Raises BadInput for what can never be answered, and what `Client.enqueue` raises.
        """
        self.check(request, tenant=tenant, api_key=api_key)
        if api_key is not None:
            if not api_key.allows_priority(priority):
                may = ", ".join(api_key.priorities or ())
                raise BadInput(f"API key {api_key.id} may not use priority {priority[:40]!r}, but {may}")
            headers = {**(headers or {}), API_KEY: api_key.id}
        if share:
            if request.request_id is not None or {"unique", "on_duplicate"} & options.keys():
                raise BadInput("share=True makes the id itself: leave out request_id, unique and on_duplicate")
            form = getattr(request, "reply_form", "openai")  # an answer has one form
            options |= {"unique": f"shared-{form}-{request.fingerprint()}", "on_duplicate": "rerun_failed"}
        return await self._client.enqueue(request, tenant=tenant, priority=priority, headers=headers, **options)
