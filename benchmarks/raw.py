"""What the sides on plain nats-py share. It imports nothing of aiqueue: a raw process has its own start and memory."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import cbor2
from nats.aio.msg import Msg

TEXT = "x" * 160
FETCH = "fetch(100), CBOR decoded, ack"


def body(i: int, t: float = 0.0) -> bytes:
    """What `common.message` is as a body, encoded without a typed message: for the sides that have none."""
    return cbor2.dumps({"i": i, "t": t, "text": TEXT})


def opened(message: Msg) -> Any:
    """The decoded body. A worker decodes each, so each raw side does."""
    return cbor2.loads(message.data)


def collect_less_often() -> None:
    """Set Python's garbage collector as `aiqueue work` sets it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, where it is installed, as `aiqueue work` uses it."""
    try:
        import uvloop  # noqa: PLC0415
    except ImportError:
        return None
    return uvloop.new_event_loop
