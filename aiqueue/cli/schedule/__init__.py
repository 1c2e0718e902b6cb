"""``schedule``: add schedules, show when they fire and what became of their jobs, pause, run and remove them."""

from __future__ import annotations

import typer

from ..options import add_command
from . import add, change, jobs, show

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Add, show, pause, run and remove schedules: jobs that come again.")

add_command(app, "ls", examples=("  aiqueue schedule ls --tenant acme",))(show.ls)
add_command(app, "show")(show.show)
add_command(
    app,
    "add",
    examples=(
        "  aiqueue schedule add report agent.task '{}' --tenant acme \\",
        "    --cron '0 6 * * mon-fri' --tz Europe/Berlin",
        "  aiqueue schedule add poll agent.task '{}' --tenant acme --every 90s",
        "  aiqueue schedule add bill agent.task @bill.json --tenant acme \\",
        "    --months 1 --starting 2027-01-31 --time 06:00 --tz Europe/Berlin",
        "  aiqueue schedule add launch agent.task '{}' --tenant acme \\",
        "    --at 2027-01-01T08:00+01:00",
    ),
)(add.add)
add_command(app, "rm")(change.rm)
add_command(
    app,
    "prune",
    examples=("  aiqueue schedule prune --owner billing", "  aiqueue schedule prune --owner billing --yes"),
)(change.prune)
add_command(app, "pause", examples=("  aiqueue schedule pause report --tenant acme --reason 'books are closed'",))(
    change.pause
)
add_command(app, "resume")(change.resume)
add_command(app, "run")(jobs.run)
add_command(app, "next", examples=("  aiqueue schedule next report --tenant acme --count 20",))(show.next_times)
add_command(
    app,
    "backfill",
    examples=(
        "  aiqueue schedule backfill report --tenant acme --from 2026-11-01T00:00+01:00 --to 2026-11-08T00:00+01:00",
    ),
)(jobs.backfill)
