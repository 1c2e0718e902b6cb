"""What the models of gateway.toml cost: the price that the file gives, else that of litellm's price map."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from .config import ModelConfig
from .prices import PLAIN_TIERS, Price, PriceMap

_OPENAI_HOST: Final = "api.openai.com"
_TIERS: Final = (*PLAIN_TIERS, "priority", "flex")


class ModelPrices:
    """The prices of these models. The map is read if a model needs it, and not kept."""

    def __init__(self, models: Iterable[ModelConfig], price_map: PriceMap | None = None) -> None:
        self._prices: dict[tuple[str, str | None, bool], Price] = {}
        unpriced = [each for each in models if each.price is None]
        if not unpriced:
            return
        known = PriceMap.load() if price_map is None else price_map
        for model in unpriced:
            is_known, provider = _served_by(model)
            for tier in _TIERS if is_known else ():
                for audio in (False, True):
                    price = known.find(model.upstream, provider, service_tier=tier, audio=audio).price
                    if price is not None:
                        self._prices[model.name, tier, audio] = price

    def find(self, model: ModelConfig, body: Mapping[str, Any], *, audio: bool = False) -> Price | None:
        """Return the price of a call with this body. None: it is unknown. A price of gateway.toml is that of the
        plain service tiers.
        """
        tier = body.get("service_tier")
        if tier is not None and not isinstance(tier, str):
            return None
        price = self._prices.get((model.name, tier, audio))
        if model.price is not None:
            price = model.price if tier in PLAIN_TIERS else None
        if price is None or price.bounds_cache_writes or not _writes_cache(body):
            return price
        return price.bounding_cache_writes()


def _writes_cache(body: Mapping[str, Any]) -> bool:
    """Return whether a request asks the provider to put parts of its prompt into the cache, wherever it says so."""
    left: list[Any] = [body.get("messages"), body.get("tools")]
    while left:
        each = left.pop()
        if isinstance(each, dict):
            if each.get("cache_control"):
                return True
            left += each.values()
        elif isinstance(each, list):
            left += each
    return False


def _served_by(model: ModelConfig) -> tuple[bool, str | None]:
    """Return whether the map may have the model's price, and the map's name of its provider, if that is known.

    Of endpoints that speak OpenAI's protocol, it knows OpenAI's own one.
    """
    if model.provider.kind == "litellm":
        return True, None
    return urlsplit(model.provider.base_url or "").hostname == _OPENAI_HOST, "openai"
