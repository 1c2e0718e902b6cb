"""Handlers that have children, which the tests run on the event loop, in threads, and in child processes."""

from __future__ import annotations

import asyncio
from typing import Any

import aiqueue

from .stepping import FAST, note, noted

__all__ = ["FAST", "Book", "Leaf", "Page", "book", "book_sync", "note", "noted", "page", "slow_page", "tree"]


class Page(aiqueue.Message, kind="page"):
    """`fails`: "" for a result, else how the handler ends."""

    log: str
    n: int
    fails: str = ""


class Leaf(aiqueue.Message, kind="leaf", family="rag.ingest"):
    """A child in a family that no worker of these tests serves."""

    n: int


class Book(aiqueue.Message, kind="book"):
    """`ends_at`: the attempt from which on the handler does not fail any more, after it has gathered its pages."""

    log: str
    pages: int = 3
    ends_at: int = 1
    fails: str = ""
    on_failed: str = "raise"


def children(book: Book) -> list[tuple[str, Page]]:
    return [(f"page-{n}", Page(log=book.log, n=n, fails=book.fails if n == 1 else "")) for n in range(book.pages)]


async def book(job: aiqueue.Job[Book]) -> Any:
    note(job.message.log, f"book {job.attempt}")
    got = await job.gather(children(job.message), on_failed=job.message.on_failed)  # type: ignore[arg-type]
    return _end(job, got)


def book_sync(job: aiqueue.Job[Book]) -> Any:
    note(job.message.log, f"book {job.attempt}")
    return _end(job, job.gather_sync(children(job.message), on_failed=job.message.on_failed))  # type: ignore[arg-type]


async def tree(job: aiqueue.Job[Book]) -> Any:
    """`ends_at` more levels of books, with pages at the end."""
    log, levels = job.message.log, job.message.ends_at
    note(log, f"book {job.id}")
    if levels:
        made: list[Any] = [(f"b-{n}", Book(log=log, pages=job.message.pages, ends_at=levels - 1)) for n in range(3)]
    else:
        made = [(f"p-{n}", Page(log=log, n=n)) for n in range(job.message.pages)]
    return await job.gather(made)


async def slow_page(job: aiqueue.Job[Page]) -> None:
    note(job.message.log, f"page {job.id}")
    await asyncio.sleep(0.5)


async def page(job: aiqueue.Job[Page]) -> Any:
    note(job.message.log, f"page {job.message.n}")
    if job.message.fails == "reject":
        raise aiqueue.Reject("torn")
    return {"n": job.message.n}


def _end(job: aiqueue.Job[Book], got: list[Any]) -> Any:
    if job.attempt < job.message.ends_at:
        raise ValueError("not yet")
    return [str(each) if isinstance(each, Exception) else each for each in got]
