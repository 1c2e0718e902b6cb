"""The state of one mail in an inbox worker."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from ..attempt import Refused
from ..lanes import Delivery
from ..mailbox import Envelope


@dataclass(slots=True, eq=False)
class HeldMail:
    """A mail that this process holds, until it is handled, refused, or left to another process.

    - `refusal`: why it is not handled; set until this is stored.
    - `secrets`: which of its fields are secret; None until it is decoded.
    - `task`: the one of its handler, or the one that stores why it is not handled.
    - `abandoned`: the task was cancelled, because another process gets the mail.
    """

    delivery: Delivery
    envelope: Envelope
    attempt: int = 1
    task: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None
    refusal: Refused | None = None
    secrets: str | None = None
    abandoned: bool = False
    failures: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def started(self) -> bool:
        """Whether a handler was started for the mail, or its end could not be stored yet."""
        return self.task is not None or self.timer is not None or self.attempt > 1 or self.refusal is not None
