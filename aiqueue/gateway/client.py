"""Enqueue requests to the gateway: what can never be answered is refused before it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import BadInput
from .config import GatewayConfig
from .config_file import load
from .model_prices import ModelPrices
from .runtime import Request, plan_call

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

    def check(self, request: Request, *, tenant: str) -> None:
        """Raise BadInput, in one line, if the gateway would refuse this request: for its model, options or limits, for
        a missing key, or because the tenant has a budget and the price is unknown.
        """
        plan = plan_call(request, request.model, tenant, self._config, self._prices)
        if self._needs_keys:
            plan.model.provider.read_key()

    async def enqueue(
        self,
        request: Request,
        *,
        tenant: str,
        priority: str = "normal",
        share: bool = False,
        headers: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Handle[dict[str, Any]]:
        """Enqueue a request that passes `check`, and return its handle: as `Client.enqueue`, whose other options it
        takes.

        `share`: requests of the tenant that ask the same share one call, and its answer as long as that is kept (a
        day). The request has no `request_id` then: its id is a hash of what it asks. If the call has failed, the next
        such request makes another one.

        Raises BadInput for what can never be answered, and what `Client.enqueue` raises.
        """
        self.check(request, tenant=tenant)
        if share:
            if request.request_id is not None or {"unique", "on_duplicate"} & options.keys():
                raise BadInput("share=True makes the id itself: leave out request_id, unique and on_duplicate")
            form = getattr(request, "reply_form", "openai")  # an answer has one form
            options |= {"unique": f"shared-{form}-{request.fingerprint()}", "on_duplicate": "rerun_failed"}
        return await self._client.enqueue(request, tenant=tenant, priority=priority, headers=headers, **options)
