"""``work --health-file`` and ``health``: a worker reports its state every second, for supervisors and probes.

The report is a file and not a port: it needs no permission, cannot collide, and its age reveals a blocked event loop.
Under systemd, the same state also goes to its notification socket (docs/operations/supervision.md).
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
from .options import FAILED, Json, ServerOptions, add_command, duration_option

if TYPE_CHECKING:
    import asyncio

REPORT_EVERY_S = 1.0
STALE_S = 10.0  # an older report is that of a blocked or dead process
STALLED_MAX_S = 60.0  # a stalled worker repairs itself within this time, or must be replaced
FILE_VARIABLE = "AIQUEUE_HEALTH_FILE"  # an image sets it once, for workers and probes
STATES = ("ok", "starting", "draining", "disconnected", "stalled", "stale")  # from best to worst

Report = dict[str, Any]  # a worker's state as plain data


def register(app: typer.Typer) -> None:
    """Register the command."""
    add_command(app, "health", only=())(health)


def health(
    _options: ServerOptions,
    path: Annotated[
        Path,
        typer.Argument(metavar="FILE", envvar=FILE_VARIABLE, help="The file that `aiqueue work --health-file` writes."),
    ],
    *,
    ready: Annotated[
        bool, typer.Option("--ready", metavar="", help="Check for readiness: the worker takes jobs now.")
    ] = False,
    within: Annotated[
        float | None,
        duration_option("Maximum age of the file. Default: 10s."),
    ] = None,
    json: Json = False,
) -> None:
    """Check whether a worker is alive; with --ready, whether it takes jobs now.

    A worker without a connection to the server is alive but not ready: it reconnects by itself.

    Exit codes: 0 healthy, 1 not healthy or no such file.
    """
    report = read_report(path, within_s=STALE_S if within is None else within)
    healthy = report["state"] == "ok" if ready else is_alive(report)
    if json:
        output.print_json({**report, "healthy": healthy})
    else:
        output.print_line(output.escape_controls(format_report(report)), err=not healthy)
    if not healthy:
        raise typer.Exit(FAILED)


def is_alive(report: Report) -> bool:
    """Return whether the worker should be left running."""
    return report["state"] != "stale" and float(report.get("stalled_s") or 0) < STALLED_MAX_S


def format_report(report: Report) -> str:
    """Return a report as one line."""
    counts = f"{report.get('running', 0)} of {report.get('slots', 0)} slots in use, {report.get('done', 0):,} done"
    age_s = time.time() - float(report.get("time") or 0)
    return f"worker {report.get('worker', '?')}: {report['state']}, {counts}, reported {output.format_age(age_s)} ago"


def read_report(path: Path, *, within_s: float = STALE_S) -> Report:
    """Return the last report in the file, with state "stale" if it is older than `within_s` seconds.

    Raises NotFound, BadInput.
    """
    try:
        report = jsonlib.loads(path.read_bytes())
    except FileNotFoundError:
        raise NotFound(f"{path}: no such file: the worker has not started, or has ended") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not a health file: {error}") from None
    if not isinstance(report, dict) or not isinstance(report.get("time"), int | float):
        raise BadInput(f"{path}: not a health file")
    if report.get("state") == "deaf":  # what a worker of the former version writes
        report |= {"state": "stalled", "stalled_s": report.get("deaf_s")}
    if report.get("state") not in STATES or time.time() - report["time"] > within_s:
        report["state"] = "stale"
    return report


def write_report(path: Path, report: Report) -> None:
    """Replace the file atomically, so that a reader never sees half a report. Raises BadInput if it is not writable."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(jsonlib.dumps(report))
        draft.replace(path)
    except OSError as error:
        raise BadInput(f"--health-file {path}: {error.strerror or error}") from None


def merge_reports(reports: Sequence[Report], *, worker: str) -> Report:
    """Return one report for several processes: the worst state, and the sums of the counts."""
    sums = {key: sum(int(each.get(key) or 0) for each in reports) for key in ("slots", "running", "done")}
    worst = max((str(each["state"]) for each in reports), key=STATES.index, default="starting")
    return {
        "state": worst, "time": time.time(), "pid": os.getpid(), "worker": worker, **sums,
        "stalled_s": max((float(each.get("stalled_s") or 0) for each in reports), default=0.0),
        "processes": list(reports),
    }  # fmt: skip


class SystemdNotifier:
    """Sends the state to systemd's notification socket, sd_notify(3), if there is one: READY once, then WATCHDOG."""

    def __init__(self) -> None:
        self._at = os.environ.get("NOTIFY_SOCKET", "")
        self._ready = False

    @property
    def is_wanted(self) -> bool:
        return bool(self._at)

    def notify(self, report: Report) -> None:
        if not self._at:
            return
        fields = [f"STATUS={format_report(report)}"]
        if not self._ready and report["state"] == "ok":
            self._ready = True
            fields.append("READY=1")
        if report["state"] == "draining":
            fields.append("STOPPING=1")
        if is_alive(report):
            fields.append("WATCHDOG=1")
        address = f"\0{self._at[1:]}" if self._at.startswith("@") else self._at
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.sendto("\n".join(fields).encode(), address)


class HealthReporter:
    """Writes what `get_report` returns every second, from `start` until `stop`, which removes the file."""

    def __init__(self, path: Path | None, get_report: Callable[[], Report], *, notify: bool) -> None:
        self._path = path
        self.get_report = get_report
        self._notifier = SystemdNotifier() if notify else None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Write the first report and start the task. Raises BadInput if the file is not writable."""
        import asyncio  # noqa: PLC0415  (the parent of a worker pool imports this module without asyncio)

        self._report()
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Stop the task and remove the file. Safe to call twice, and before `start`."""
        import asyncio  # noqa: PLC0415

        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
            if self._path is not None:
                self._path.unlink(missing_ok=True)

    def _report(self) -> None:
        report = self.get_report()
        if self._path is not None:
            write_report(self._path, report)
        if self._notifier is not None:
            self._notifier.notify(report)

    async def _run(self) -> None:
        import asyncio  # noqa: PLC0415

        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            with contextlib.suppress(BadInput):  # for example a full disk; the age of the file shows it
                self._report()
