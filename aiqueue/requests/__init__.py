"""Request and reply: the caller's side, the form of replies, and which of several messages of one id runs.

May not run handlers. The service that answers is `responder`.
"""

from __future__ import annotations

from . import replies
from .caller import call
from .claims import AGAIN_S, Claims

__all__ = ["AGAIN_S", "Claims", "call", "replies"]
