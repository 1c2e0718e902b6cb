"""How many messages of a stream match a filter."""

from __future__ import annotations

import json
from typing import NamedTuple

from ..connection import Connection, wait_current
from ..errors import NotFound, Unavailable

CURRENT_S = 0.1  # how long a server of a cluster that is behind is waited for


class MessageCount(NamedTuple):
    """`messages`: None if the stream is missing. `behind`: a server of a cluster has counted that lacks changes."""

    messages: int | None
    behind: bool = False


async def count_messages(connection: Connection, stream: str, subject_filter: str, *, seq: int = 1) -> MessageCount:
    """Return how many messages match a filter, from a sequence on. Raises Unavailable, AccessDenied.

    One direct get: the answer with the first message also states how many follow it.
    """
    request = {"seq": seq, "batch": 1, "next_by_subj": subject_filter}
    try:
        behind = not await wait_current(connection, stream, within_s=CURRENT_S)
        answer = await connection.request(f"$JS.API.DIRECT.GET.{stream}", json.dumps(request).encode())
    except NotFound:
        return MessageCount(None)
    except Unavailable as error:
        if "no responders" in str(error):
            return MessageCount(None)
        raise
    if answer.status is not None:
        return MessageCount(0, behind)
    following = (answer.headers or {}).get("Nats-Num-Pending", "")
    return MessageCount(1 + (int(following) if following.isdigit() else 0), behind)
