"""Sentry and SQLAlchemy around handlers, set up as a service would: child processes of the tests import this by name.

The Sentry SDK's transport writes what it would send to a file, and the database is a file too.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import sentry_sdk
from sentry_sdk.transport import Transport
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import NullPool

import aiqueue
from aiqueue.agent import Mail

SESSION: contextvars.ContextVar[Session] = contextvars.ContextVar("SESSION")
ASYNC_SESSION: contextvars.ContextVar[AsyncSession] = contextvars.ContextVar("ASYNC_SESSION")
DIRECTORY = "TOOLS_DIRECTORY"


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "rows"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class Save(aiqueue.Message, kind="save"):
    text: str
    fails: bool = False


class FileTransport(Transport):
    def capture_envelope(self, envelope: Any) -> None:
        if (event := envelope.get_event()) is not None:
            error = event["exception"]["values"][-1]
            line = [error["type"], error["value"], event.get("tags", {}), event["breadcrumbs"]["values"]]
            with (_directory() / "events").open("a") as file:
                file.write(json.dumps([*line[:3], [each["message"] for each in line[3]]]) + "\n")


def _directory() -> Path:
    return Path(os.environ[DIRECTORY])


def start_sentry() -> None:
    sentry_sdk.init("https://key@sentry.invalid/1", transport=FileTransport, default_integrations=False)


def database(driver: str) -> str:
    return f"sqlite+{driver}:///{_directory() / 'rows'}"


def events() -> list[Any]:
    file = _directory() / "events"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def rows() -> list[str]:
    with Session(create_engine(database("pysqlite"), poolclass=NullPool)) as session:
        return sorted(row.text for row in session.query(Row))


@asynccontextmanager
async def lifespan() -> AsyncIterator[None]:
    start_sentry()  # in each child process too
    yield


@contextmanager
def report(job: aiqueue.Job[Any] | Mail[Any]) -> Iterator[None]:
    with sentry_sdk.isolation_scope() as scope:
        scope.set_tag("kind", job.kind)
        try:
            yield
        except Exception as error:
            sentry_sdk.capture_exception(error)
            raise


@contextmanager
def session(job: aiqueue.Job[Any] | Mail[Any]) -> Iterator[None]:
    with Session(create_engine(database("pysqlite"), poolclass=NullPool)) as opened, opened.begin():
        SESSION.set(opened)
        yield


@asynccontextmanager
async def async_session(job: aiqueue.Job[Any] | Mail[Any]) -> AsyncIterator[None]:
    engine = create_async_engine(database("aiosqlite"), poolclass=NullPool)
    async with AsyncSession(engine) as opened, opened.begin():
        ASYNC_SESSION.set(opened)
        yield


def save(job: aiqueue.Job[Save] | Mail[Save]) -> None:
    sentry_sdk.add_breadcrumb(message=job.message.text)
    SESSION.get().add(Row(text=job.message.text))
    SESSION.get().flush()
    if job.message.fails:
        raise ValueError(f"cannot save {job.message.text}")


async def async_save(job: aiqueue.Job[Save] | Mail[Save]) -> None:
    sentry_sdk.add_breadcrumb(message=job.message.text)
    await asyncio.sleep(0)
    ASYNC_SESSION.get().add(Row(text=job.message.text))
    await ASYNC_SESSION.get().flush()
    if job.message.fails:
        raise ValueError(f"cannot save {job.message.text}")
