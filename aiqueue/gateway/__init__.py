"""The gateway: calls of models as jobs, which are durable, limited, and paid for once.

A product: it uses the queue as any user does, by the public face. Only `usage_store` knows the connection and the
stream of usage. Neither litellm nor aiohttp is imported until a worker calls a model.
"""

from __future__ import annotations

from .budgets import Budget, Budgets, BudgetSpent, BudgetStats, Reservation
from .ledger import UsageLedger, UsageRecord, month_of
from .prices import Price, PriceMap, PriceUnknown, format_usd, parse_usd, to_micros
from .usage_store import UsageStore
from .usage_view import Sums, UsageTotal, UsageView

__all__ = [
    "Budget",
    "BudgetSpent",
    "BudgetStats",
    "Budgets",
    "Price",
    "PriceMap",
    "PriceUnknown",
    "Reservation",
    "Sums",
    "UsageLedger",
    "UsageRecord",
    "UsageStore",
    "UsageTotal",
    "UsageView",
    "format_usd",
    "month_of",
    "parse_usd",
    "to_micros",
]  # fmt: skip
