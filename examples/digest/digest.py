"""A reading service: a digest of feeds for each reader, every morning.

Moved from arq (docs/guides/from-arq-and-taskiq.md).
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from feeds import Busy, Feeds, Mailbox

import aiqueue


class Digest(aiqueue.Message[int], kind="digest"):
    reader: str
    urls: list[str]


class Send(aiqueue.Message[None], kind="send"):
    reader: str
    text: str


class Nightly(aiqueue.Message[None], kind="nightly"):
    pass


@dataclass
class State:
    feeds: Feeds = field(default_factory=Feeds)
    mailbox: Mailbox = field(default_factory=Mailbox)


@asynccontextmanager
async def lifespan() -> AsyncIterator[State]:
    yield State()


worker = aiqueue.Worker(lifespan=lifespan, concurrency=20, owner="digest")
ONCE = aiqueue.Backoff(attempts=1)


@worker.handle(Digest, timeout=120, retry=ONCE, on={Busy: aiqueue.Backoff(attempts=4, first="1m")})
async def digest(job: aiqueue.Job[Digest, State]) -> int:
    titles = [title for url in job.message.urls for title in await job.state.feeds.titles(url)]
    if titles:
        await job.enqueue(Send(reader=job.message.reader, text="\n".join(titles)), "mail")
    return len(titles)


@worker.handle(Send, retry=ONCE)
async def send(job: aiqueue.Job[Send, State]) -> None:
    await job.state.mailbox.send(job.message.reader, job.message.text)


@worker.schedule("0 6 * * *", tz="Europe/Berlin", tenant="digest")
@worker.handle(Nightly, retry=ONCE)
async def nightly(job: aiqueue.Job[Nightly, State]) -> None:
    for reader, urls in job.state.feeds.readers.items():
        await job.enqueue(Digest(reader=reader, urls=urls), reader)
