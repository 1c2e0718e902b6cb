"""Calls of customers: cut into pieces, transcribed, summarised.

Moved from Hatchet (docs/from-temporal-and-hatchet.md).
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from models import Models, TooLong

import aiqueue
from aiqueue.errors import ChildFailed


class Call(aiqueue.Message[str], kind="call"):
    customer: str
    audio: str


class Transcription(aiqueue.Message[str], kind="transcription", family="calls.work"):
    customer: str  # streams/limits.toml: two at once
    audio: str


@asynccontextmanager
async def lifespan() -> AsyncIterator[Models]:
    yield Models()


worker = aiqueue.Worker(lifespan=lifespan, concurrency=20)


@worker.handle(Call)
async def call(job: aiqueue.Job[Call, Models]) -> str:
    work = Transcription(customer=job.message.customer, audio=job.message.audio)
    try:
        (summary,) = await job.gather([("work", work)])
    except ChildFailed as error:  # for good, after all its attempts
        job.state.told.append(job.message.customer)
        raise aiqueue.Reject(error.error) from error
    return summary


@worker.handle(Transcription, timeout="5m", retry=aiqueue.Backoff(attempts=4), on={TooLong: aiqueue.Reject})
async def transcription(job: aiqueue.Job[Transcription, Models]) -> str:
    models = job.state
    pieces = await job.step("split", job.message.audio.split, "|", returns=list[str])
    heard = await job.steps("hear", pieces, models.hear)
    return await models.shorten(" ".join(heard))
