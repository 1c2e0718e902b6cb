"""A handler with secrets that runs in a child process: the child imports it by name."""

from __future__ import annotations

from typing import Any

from pydantic import SecretStr

import aiqueue


class Guarded(aiqueue.Message, kind="guarded"):
    key: SecretStr
    fail: bool = False


worker = aiqueue.Worker()


@worker.handle(Guarded, process=True, retry=aiqueue.Backoff(attempts=1))
async def guard(job: aiqueue.Job[Guarded]) -> Any:
    if job.message.fail:
        raise LookupError(f"no entry with {job.message.key.get_secret_value()}")
    await job.chunk({"part": job.message.key})
    for part in ("\ud83d", "\ude00", "\ud83d"):
        await job.chunk(part)
    return {"again": job.message.key}
