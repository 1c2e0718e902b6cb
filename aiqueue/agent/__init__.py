"""Agents: what a user declares of one, and how the mail in its inbox is handled.

Above `worker` and all rooms below it. May not decide what becomes of a job: that is `worker.settlement`.
"""

from __future__ import annotations

from ..mailbox import Bounce, Mail
from .agent import Agent, AgentGroup

__all__ = ["Agent", "AgentGroup", "Bounce", "Mail"]
