"""The gateway: calls of models as jobs, which are durable, limited, and paid for once.

A product: it uses the queue as any user does, by the public face. Only `usage_store` knows the connection and the
stream of usage. Neither litellm nor aiohttp is imported until a worker calls a model.
"""

from __future__ import annotations

from .ledger import UsageLedger, UsageRecord, month_of
from .prices import Price, PriceMap, PriceUnknown, format_usd, parse_usd, to_micros
from .usage_store import UsageStore

__all__ = [
    "Price",
    "PriceMap",
    "PriceUnknown",
    "UsageLedger",
    "UsageRecord",
    "UsageStore",
    "format_usd",
    "month_of",
    "parse_usd",
    "to_micros",
]
