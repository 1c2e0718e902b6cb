"""``work --health-file`` and ``health``: what a worker says of itself, each second, for whatever supervises it.

A file and not a port: it needs no permission, cannot collide, and a loop that is blocked shows in its age. systemd is
told the same on its own socket, where it gives one (docs/supervision.md).
"""

from __future__ import annotations

import contextlib
import json as jsonlib
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import BadInput, NotFound
from . import output
from .options import FAILED, Json, Where, duration, verb

if TYPE_CHECKING:
    import asyncio

BEAT_S = 1.0
STALE_S = 10.0  # a file that is older is that of a blocked or dead process
DEAF_MAX_S = 60.0  # in which a deaf worker mends itself, or is to be replaced
STATES = ("ok", "starting", "draining", "disconnected", "deaf", "stale")  # from good to bad

Told = dict[str, Any]


def register(app: typer.Typer) -> None:
    """Add this verb."""
    verb(app, "health", only=())(health)


def health(
    _where: Where,
    path: Annotated[Path, typer.Argument(metavar="FILE", help="What `aiqueue work --health-file` writes.")],
    *,
    ready: Annotated[bool, typer.Option("--ready", help="Also demand that it takes jobs now.")] = False,
    within: Annotated[
        float | None, typer.Option(parser=duration, metavar="DURATION", help="How old the file may be. Default: 10s.")
    ] = None,
    json: Json = False,
) -> None:
    """Say whether a worker is alive: exit code 0, or 1 if it is to be replaced.

    A lost server is no reason to replace a worker, which waits for it; --ready says no meanwhile.
    """
    told = read(path, within_s=STALE_S if within is None else within)
    good = told["state"] == "ok" if ready else alive(told)
    if json:
        output.say_json({**told, "healthy": good})
    else:
        output.say(output.clean(line(told)), err=not good)
    if not good:
        raise typer.Exit(FAILED)


def alive(told: Told) -> bool:
    """Whether the worker is to be left running."""
    return told["state"] != "stale" and float(told.get("deaf_s") or 0) < DEAF_MAX_S


def line(told: Told) -> str:
    """A report for people."""
    counts = f"{told.get('running', 0)} of {told.get('slots', 0)} slots in use, {told.get('done', 0):,} done"
    age_s = time.time() - float(told.get("time") or 0)
    return f"worker {told.get('worker', '?')}: {told['state']}, {counts}, said {output.age(age_s)} ago"


def read(path: Path, *, within_s: float = STALE_S) -> Told:
    """What a worker last said; its state is "stale" where that is too long ago. Raises NotFound, BadInput."""
    try:
        told = jsonlib.loads(path.read_bytes())
    except FileNotFoundError:
        raise NotFound(f"{path}: there is no such file: the worker has not begun, or has ended") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not a health file: {error}") from None
    if not isinstance(told, dict) or not isinstance(told.get("time"), int | float):
        raise BadInput(f"{path}: not a health file")
    if told.get("state") not in STATES or time.time() - told["time"] > within_s:
        told["state"] = "stale"
    return told


def write(path: Path, told: Told) -> None:
    """Put a report in place at once, so that no reader sees half of it. Raises BadInput where it cannot be."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(jsonlib.dumps(told))
        draft.replace(path)
    except OSError as error:
        raise BadInput(f"--health-file {path}: {error.strerror or error}") from None


def merged(members: Sequence[Told], *, worker: str) -> Told:
    """One report for several processes: the worst state, and the sums."""
    sums = {each: sum(int(member.get(each) or 0) for member in members) for each in ("slots", "running", "done")}
    worst = max((str(member["state"]) for member in members), key=STATES.index, default="starting")
    return {
        "state": worst, "time": time.time(), "pid": os.getpid(), "worker": worker, **sums,
        "deaf_s": max((float(member.get("deaf_s") or 0) for member in members), default=0.0),
        "members": list(members),
    }  # fmt: skip


class Notify:
    """systemd's socket (sd_notify(3)), where there is one: ready once, and alive for as long as it is."""

    def __init__(self) -> None:
        self._at = os.environ.get("NOTIFY_SOCKET", "")
        self._ready = False

    @property
    def wanted(self) -> bool:
        return bool(self._at)

    def tell(self, told: Told) -> None:
        if not self._at:
            return
        words = [f"STATUS={line(told)}"]
        if not self._ready and told["state"] == "ok":
            self._ready = True
            words.append("READY=1")
        if told["state"] == "draining":
            words.append("STOPPING=1")
        if alive(told):
            words.append("WATCHDOG=1")
        address = f"\0{self._at[1:]}" if self._at.startswith("@") else self._at
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line_out:
            line_out.sendto("\n".join(words).encode(), address)


class Pulse:
    """Writes what `told` says each second, from `start` to `stop`, which removes the file."""

    def __init__(self, path: Path | None, told: Callable[[], Told], *, notify: bool) -> None:
        self._path = path
        self.told = told
        self._notify = Notify() if notify else None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Raises BadInput where the file cannot be written."""
        import asyncio  # noqa: PLC0415  (the parent of a crew can do without it)

        self._beat()
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Safe twice and unstarted."""
        import asyncio  # noqa: PLC0415

        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
            if self._path is not None:
                self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        told = self.told()
        if self._path is not None:
            write(self._path, told)
        if self._notify is not None:
            self._notify.tell(told)

    async def _run(self) -> None:
        import asyncio  # noqa: PLC0415

        while True:
            await asyncio.sleep(BEAT_S)
            with contextlib.suppress(BadInput):  # a full disk, say: its age tells
                self._beat()
