"""The LLM gateway: calls of models as jobs, which are durable, held to limits and budgets, and paid for once.

A product: it uses the queue as any user does, by the public face. Only `usage_store` knows the connection and the
stream of usage. Neither litellm nor aiohttp is imported until a provider is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .answers import Bill, Completion, answer_of, from_chunks, text_of, usage_of
from .api_key_store import ApiKey
from .api_keys import ApiKeys, KeyCredit, KeyLimited, KeyRevoked
from .batches import (
    BATCH_ENDPOINTS,
    BatchEnded,
    Batches,
    BatchFile,
    BatchQuota,
    BatchQuotas,
    GatewayBatch,
    RequestBatch,
)
from .budgets import Budget, Budgets, BudgetSpent, BudgetStats, Reservation
from .client import Gateway
from .config import GatewayConfig, ModelConfig, ProviderConfig
from .config_file import load
from .ledger import UsageLedger, UsageRecord, month_of
from .opening import open_provider
from .prices import Price, PriceMap, PriceUnknown, format_usd, parse_usd, to_micros
from .provider_errors import ProviderError
from .providers import Provider, ProviderCall, Reply, Usage, upstream_body
from .requests import EmbeddingRequest, GatewayRequest, check_tenant
from .token_bound import TokenBound, bound_tokens, prompt_tokens_at_most, tokens_at_most
from .usage_store import NoUsageStream, UsageStore
from .usage_view import Sums, UsageTotal, UsageView

if TYPE_CHECKING:
    from . import front, standin  # they need starlette and aiohttp
    from .gateway_worker import GatewayWorker, worker

__all__ = [
    "BATCH_ENDPOINTS",
    "ApiKey",
    "ApiKeys",
    "BatchEnded",
    "BatchFile",
    "BatchQuota",
    "BatchQuotas",
    "Batches",
    "Bill",
    "Budget",
    "BudgetSpent",
    "BudgetStats",
    "Budgets",
    "Completion",
    "EmbeddingRequest",
    "Gateway",
    "GatewayBatch",
    "GatewayConfig",
    "GatewayRequest",
    "GatewayWorker",
    "KeyCredit",
    "KeyLimited",
    "KeyRevoked",
    "ModelConfig",
    "NoUsageStream",
    "Price",
    "PriceMap",
    "PriceUnknown",
    "Provider",
    "ProviderCall",
    "ProviderConfig",
    "ProviderError",
    "Reply",
    "RequestBatch",
    "Reservation",
    "Sums",
    "TokenBound",
    "Usage",
    "UsageLedger",
    "UsageRecord",
    "UsageStore",
    "UsageTotal",
    "UsageView",
    "answer_of",
    "bound_tokens",
    "check_tenant",
    "format_usd",
    "from_chunks",
    "front",
    "load",
    "month_of",
    "open_provider",
    "parse_usd",
    "prompt_tokens_at_most",
    "standin",
    "text_of",
    "to_micros",
    "tokens_at_most",
    "upstream_body",
    "usage_of",
    "worker",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import the worker on first use: with the queue's worker it imports the client of NATS."""
    if name not in ("GatewayWorker", "worker"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import gateway_worker  # noqa: PLC0415

    return getattr(gateway_worker, name)
