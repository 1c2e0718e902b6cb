"""The web side of the reading service."""

from digest import Send

import aiqueue


async def sign_up(client: aiqueue.Client, reader: str) -> bool:
    """Whether this is the first time: a welcome goes out in an hour."""
    job = await client.enqueue(
        Send(reader=reader, text="Welcome!"), tenant="digest", unique=f"welcome-{reader}", delay="1h"
    )
    return not job.duplicate
