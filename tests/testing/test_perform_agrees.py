"""What `perform` says of an attempt is what a worker makes of it: the same handlers, by both."""

from __future__ import annotations

import asyncio
import contextlib
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import testing
from aiqueue.errors import ChildFailed, ResultDisabled
from aiqueue.testing.server import settings_of_account

from ..support import Account
from . import acting
from .acting import (
    ACTS,
    LATE,
    InProcess,
    InThread,
    Loose,
    OnLoop,
    Page,
    Raw,
    Timed,
    TimedThread,
    Typed,
    Unkept,
    Unknown,
)

IN_PROCESS = (
    "what is set around", "an error that is suppressed around", "an error that is replaced around",
    "a map", "a model", "what cannot be kept", "an error", "reject_from_a_cause", "say_the_secret", "chunks",
    "a group with a rejected one", "retry in an hour", "steps_are_kept", "calls_are_noted", "gather_children",
    "exit", "a_step_that_fails", "what a policy delays", "half_a_character",
)  # fmt: skip
UNKEPT = ("nothing", "text", "what cannot be kept", "an error", "reject", "chunks", "steps_are_kept")
_ID = re.compile(r"06[0-9a-v]{24}|(?<=_)[0-9a-v]{16}\b")
DATA = b"bytes of a document" * 40_000


@dataclass
class Seen:
    """One attempt, as a reader of the job's journal sees it, or as `perform` tells it. `after`: bounds of the delay."""

    outcome: str
    attempt: int
    reason: str = ""
    error: str = ""
    traceback: str = ""
    after: tuple[float, float] | None = None
    chunks: list[Any] = field(default_factory=list)
    progress: list[tuple[float, str]] = field(default_factory=list)
    data: Any = None


@dataclass
class Case:
    message: aiqueue.Message[Any]
    options: dict[str, Any] = field(default_factory=dict)
    documents: dict[aiqueue.Document, bytes] = field(default_factory=dict)


def make_cases() -> dict[str, Case]:
    document = testing.document(DATA, tenant="acme")
    cases = {f"{name}, on the loop": Case(OnLoop(act=name, document=document)) for name in ACTS}
    cases |= {f"{name}, in a thread": Case(InThread(act=name, document=document)) for name in ACTS}
    cases |= {f"{name}, on the loop": Case(Timed(act=name)) for name in LATE}
    cases |= {"sleep_too_long, in a thread": Case(TimedThread(act="sleep_too_long"))}
    cases |= {f"{name}, in a process": Case(InProcess(act=name)) for name in IN_PROCESS}
    cases |= {f"{name}, not kept": Case(Unkept(act=name)) for name in UNKEPT}
    for each in cases.values():
        each.documents = {document: DATA}
    soon = {"deadline": "1m"}
    return cases | {
        "the declared result": Case(Typed(act="right")),
        "another result": Case(Typed(act="wrong")),
        "a message that the handler's model refuses": Case(Loose(n="one")),
        "an unknown kind": Case(Unknown()),
        "a handler of every kind": Case(Raw(n=1)),
        "a deadline that has passed": Case(OnLoop(act="text"), {"deadline": datetime(2026, 1, 1, tzinfo=UTC)}),
        "a retry after the deadline": Case(OnLoop(act="retry in an hour"), soon),
        "a retry before the deadline": Case(OnLoop(act="an error"), soon),
        "options": Case(
            OnLoop(act="what_the_job_says"),
            {"priority": "high", "unique": "https://a.test/?b=c", "headers": {"trace": "7"}, **soon},
        ),
    }


async def follow(handle: aiqueue.Handle[Any]) -> list[Seen]:
    """Return the attempts of a job: up to its end, or to a retry that is far off."""
    found: list[Seen] = []
    now = Seen("", 1)
    async with contextlib.aclosing(handle.stream(timeout=60)) as items:
        async for item in items:
            data = item.data
            match item.event:
                case "chunk":
                    now.chunks.append(data)
                case "progress":
                    now.progress.append((data["fraction"], data["note"]))
                case "retry":
                    history = [each for each in data["history"] if each["attempt"] == item.attempt]
                    now.outcome = "waiting" if "children" in data else "unknown" if item.attempt == 0 else "retry"
                    now.attempt = max(item.attempt, 1) if now.outcome == "unknown" else item.attempt
                    now.attempt += now.outcome == "waiting"
                    now.error, now.traceback = data["error"], history[-1].get("traceback", "") if history else ""
                    if now.outcome == "retry":
                        now.after = data["delay_s"], data["delay_s"]
                    found.append(now)
                    if now.outcome == "unknown" or (now.after and now.after[0] > 1):
                        return found
                    now = Seen("", 1)
                case "failed":
                    now.outcome, now.attempt, now.reason, now.error = (
                        "failed",
                        item.attempt,
                        data["reason"],
                        data["error"],
                    )
                    history = data["history"]
                    now.traceback = history[-1].get("traceback", "") if history else ""
                    found.append(now)
                case "result":
                    now.outcome, now.attempt, now.data = "done", item.attempt, data
                    found.append(now)
    if not found or found[-1].outcome not in ("done", "failed"):
        with pytest.raises(ResultDisabled):
            await handle.result(timeout=20)
        now.outcome, now.attempt = "done", (found[-1].attempt + 1 if found else 1)
        found.append(now)
    return found


async def perform_all(case: Case, settings: aiqueue.Settings, *, waits: bool) -> list[Seen]:
    """As `follow`, by `perform`: attempt after attempt, each with what the one before has kept.

    `waits`: whether the worker's job has waited for children. A child that was enqueued before may have ended by then.
    """
    found: list[Seen] = []
    kept: dict[str, Any] = {}
    attempt, calls, children = 1, list[Any](), dict[str, Any]()
    while True:
        done = await testing.perform(
            acting.worker, case.message, attempt=attempt, state={"state": 1}, settings=settings, tenant="acme",
            documents=case.documents, steps=kept, calls=calls, children=children, **case.options,
        )  # fmt: skip
        if done.outcome == "waiting" and not waits:
            children |= {child.name: await end_of_child(child, settings) for child in done.children}
            continue
        after = None if done.after_s is None or done.after_min_s is None else (done.after_min_s, done.after_s)
        found.append(
            Seen(
                done.outcome, done.attempt, done.reason, done.error, done.traceback, after, list(done.chunks),
                list(done.progress), done.data,
            )
        )  # fmt: skip
        if done.outcome == "waiting":
            for child in done.children:
                children[child.name] = await end_of_child(child, settings)
        elif done.outcome != "retry" or (done.after_s or 0) > 1:
            return found
        else:
            attempt += 1
        kept, calls = dict(done.steps), [*calls, *done.calls]


async def end_of_child(child: testing.PerformedChild, settings: aiqueue.Settings) -> Any:
    done = await testing.perform(acting.worker, child.message(Page), settings=settings, tenant="acme")
    if done.outcome == "done":
        return done.result
    return ChildFailed(child.id, name=child.name, reason=done.reason, error=done.error, attempt=done.attempt)


def comparable(seen: Seen) -> dict[str, str]:
    """What both must say: without ids, and of tracebacks what is in the handlers' file."""
    known = {name: _ID.sub("(id)", str(value)) for name, value in vars(seen).items() if name != "after"}
    frames = re.findall(r'acting.py", line (\d+), in (\w+)', seen.traceback)
    return known | {"traceback": str(frames) + _ID.sub("(id)", (seen.traceback.splitlines() or [""])[-1])}


def first_difference(theirs: list[dict[str, str]], ours: list[dict[str, str]]) -> str:
    for one, other in zip_longest(theirs, ours, fillvalue={}):
        for name in {*one, *other}:
            if one.get(name) != other.get(name):
                return f"{name}: a worker says {one.get(name)!s:.900}, and perform {other.get(name)!s:.900}"
    return ""


@pytest.mark.timeout(300)
async def test_an_attempt_ends_as_in_a_worker_whatever_its_handler_does(account: Account, streams: Path) -> None:
    settings = settings_of_account(account).model_copy(
        update={"streams": streams, "families": ("agent.tasks", "small.jobs")}
    )
    cases = make_cases()
    async with testing.client(settings) as client:
        await client.documents.put(DATA, tenant="acme")
        async with acting.worker.running(client):
            handles = {
                name: await client.enqueue(case.message, tenant="acme", **case.options) for name, case in cases.items()
            }
            real = dict(zip(cases, await asyncio.gather(*map(follow, handles.values())), strict=True))
    differing = {}
    for name, case in cases.items():
        told = await perform_all(case, settings, waits=any(each.outcome == "waiting" for each in real[name]))
        if problem := first_difference([comparable(each) for each in real[name]], [comparable(each) for each in told]):
            differing[name] = problem
        for one, other in zip(real[name], told, strict=False):
            if one.after is not None and other.after is not None:
                assert other.after[0] - 1e-9 <= one.after[0] <= other.after[1] + 1e-9, (name, one.after, other.after)
    assert not differing, "\n".join(f"{name}: {problem}" for name, problem in differing.items())
