"""Limits by key: how often, how much and how many at once, over all processes.

Here: rules and their overrides, the stored use of each value of a key, pauses, and the limiter of a process, which
reserves before a call and settles after it. Not here: jobs, lanes and workers; those ask the limiter.
"""

from __future__ import annotations

from .controls import PAUSE_MAX_S, Controls, KeyPause
from .credit import BatchCall, Credit, CreditBatch
from .limiter import Limiter
from .rules import (
    EffectiveRule,
    Override,
    Rule,
    RuleId,
    Rules,
    find_limited_family,
    load_rules,
    make_rule,
    matches,
    merge_limits,
    parse_rules,
    rule_id,
)
from .stored_use import StoredUse, Timing

__all__ = [
    "PAUSE_MAX_S",
    "BatchCall",
    "Controls",
    "Credit",
    "CreditBatch",
    "EffectiveRule",
    "KeyPause",
    "Limiter",
    "Override",
    "Rule",
    "RuleId",
    "Rules",
    "StoredUse",
    "Timing",
    "find_limited_family",
    "load_rules",
    "make_rule",
    "matches",
    "merge_limits",
    "parse_rules",
    "rule_id",
]  # fmt: skip
