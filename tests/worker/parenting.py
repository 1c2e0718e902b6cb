"""Handlers that have children, which the tests run on the event loop, in threads, and in child processes."""

from __future__ import annotations

import asyncio
from datetime import date
from typing import Any, Literal

import pydantic

import aiqueue
from aiqueue.errors import ResultInvalid

from .stepping import FAST, note, noted

__all__ = [
    "FAST", "Book", "Count", "Index", "Leaf", "Page", "Section", "Table", "book", "book_sync", "count", "index",
    "index_sync", "note", "noted", "page", "slow_page", "table", "tree",
]  # fmt: skip


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
    on_failed: Literal["raise", "return"] = "raise"


class Section(pydantic.BaseModel):
    title: str
    day: date
    key: pydantic.SecretStr = pydantic.SecretStr("")


class Table(aiqueue.Message[Section], kind="table"):
    """`returns`: plain data to return, in place of a Section of this title."""

    title: str
    returns: Any = None


class Count(aiqueue.Message[int], kind="count"):
    n: int


class Index(aiqueue.Message[list[str]], kind="index"):
    """Its result: the results of its children, in words."""

    tables: list[Table]


async def table(job: aiqueue.Job[Table]) -> Section:
    if job.message.returns is not None:
        return job.message.returns  # type: ignore[no-any-return]
    return Section(title=job.message.title, day=date(2026, 1, 2))


async def count(job: aiqueue.Job[Count]) -> int:
    return job.message.n


def tables(index: Index) -> list[tuple[str, Table]]:
    return [(f"table-{n}", each) for n, each in enumerate(index.tables)]


async def index(job: aiqueue.Job[Index]) -> list[str]:
    counted = await job.enqueue(Count(n=7), "count")
    sections = await job.gather(tables(job.message), on_failed="return")
    return [*map(_words, sections), *map(repr, await job.gather([counted]))]


def index_sync(job: aiqueue.Job[Index]) -> list[str]:
    counted = job.enqueue_sync(Count(n=7), "count")
    sections = job.gather_sync(tables(job.message), on_failed="return")
    return [*map(_words, sections), *map(repr, job.gather_sync([counted]))]


def _words(section: Section | aiqueue.AIQueueError) -> str:
    match section:
        case Section():
            return f"{section.title[:20]} {section.day:%A}"
        case ResultInvalid():
            return f"{section} {section.data}"
        case _:
            return type(section).__name__


def children(book: Book) -> list[tuple[str, Page]]:
    return [(f"page-{n}", Page(log=book.log, n=n, fails=book.fails if n == 1 else "")) for n in range(book.pages)]


async def book(job: aiqueue.Job[Book]) -> Any:
    note(job.message.log, f"book {job.attempt}")
    got = await job.gather(children(job.message), on_failed=job.message.on_failed)
    return _end(job, got)


def book_sync(job: aiqueue.Job[Book]) -> Any:
    note(job.message.log, f"book {job.attempt}")
    return _end(job, job.gather_sync(children(job.message), on_failed=job.message.on_failed))


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
