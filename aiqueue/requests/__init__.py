"""Request and reply: the caller's side, the form of answers, and which of several messages with one job id is run.

This room may not run handlers. The service that answers is `worker/responder`.
"""

from __future__ import annotations

from . import replies
from .caller import find_bare_id, request_result, send_until_answered, start_request
from .claims import CHECK_AGAIN_S, Claims
from .parsed import ParsedRequest

__all__ = [
    "CHECK_AGAIN_S", "Claims", "ParsedRequest", "find_bare_id", "replies", "request_result", "send_until_answered",
    "start_request",
]  # fmt: skip
