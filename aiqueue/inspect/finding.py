"""What doctor finds: its form, and the remedy of each kind. docs/operations/findings.md explains each kind."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..connection import Connection
from ..topology import Topology, problems

if TYPE_CHECKING:
    from ..limits import Rules

Level = Literal["ok", "warn", "fail"]

NEAR, FULL = 0.8, 0.95  # shares of a limit

REMEDIES: Mapping[str, str] = {
    **problems.REMEDIES,
    "unchecked": "mend that, then run `aiqueue doctor` again",
    "server-old": "install nats-server 2.12 or newer (`nats-server --version`): delays need its message schedules",
    "payload-large": "set `max_payload: 8MB` in the server's configuration, then `nats-server --signal reload`: larger "
    "messages delay all others",
    "account-storage": "raise the account's limit in the server's configuration, then `nats-server --signal reload`; "
    "or delete dead letters: `aiqueue dead purge --older 7d`",
    "account-count": "raise the account's limit in the server's configuration, then `nats-server --signal reload`",
    "disk-low": "free disk space, for example with `aiqueue dead purge --older 7d`: once it is full, streams store "
    "nothing until a server restart",
    "sync-unknown": "pass the server's monitoring address: `aiqueue doctor --monitor http://HOST:8222`",
    "sync-late": "if a power cut {where}may not lose jobs, {how} `sync_interval: always` in its jetstream block, "
    "restart the server, and run `aiqueue doctor` again",
    "stream-missing": "run `aiqueue apply`, which creates it",
    "stream-drift": "`aiqueue plan` shows all differences, `aiqueue apply` removes them",
    "stream-full": "{advice}",
    "stream-consumers": "raise its max_consumers in its stream file, then `aiqueue apply`",
    "stream-memory": 'set storage = "file" in its stream file, then `nats stream rm {stream}` (deletes its '
    "messages) and `aiqueue apply`: a restart of the server loses all of it",
    "stream-unbounded": "set max_bytes in its stream file, then `aiqueue apply`: without it the stream's messages may "
    "fill the disk of all streams",
    "replica-away": "`nats server report jetstream` shows the servers: start the one that is away. Without a majority "
    "of them nothing is stored",
    "stored-twice": "delete the one that is not wanted: `nats --js-domain DOMAIN stream rm {stream}`",
    "foreign-responder": "find it with `nats server report connections --subscriptions` and stop its answers",
    "lane-full": "run more workers (`aiqueue work`), or raise max_msgs_per_subject and run `aiqueue apply`: a full "
    "lane refuses jobs (LaneFull)",
    "lane-unserved": "run a worker that handles their family and tenant: `aiqueue work MODULE:WORKER`",
    "kind-unknown": "run a worker with a handler for the kind: `aiqueue work MODULE:WORKER`. If the kind is a mistake, "
    "`aiqueue cancel JOB`; after 24 hours the jobs are dead letters",
    "paused": "`aiqueue resume {scope}` when it may go on",
    "pause-unheeded": "install this version for these workers and restart them, or permit them to read "
    "`$KV.AI_PRESENCE.pause.>`: `aiqueue doctor` names them until they heed pauses",
    "limit-unmatched": "`aiqueue limits unset {scope}`, or declare the family's limit_key here, too: no job is "
    "limited by the rule",
    "limit-override-old": "write the rule into limits.toml, then `aiqueue limits unset {scope}`: nobody expects it "
    "elsewhere",
    "limit-lanes": "run `aiqueue apply`: until then limited jobs wait among all others, and hold them up",
    "limit-unheeded": "install this version for these workers and restart them: `aiqueue doctor` names them until they "
    "heed limits",
    "schedule-chain": "`aiqueue schedule resume {schedule}` parks the tick; a running worker does so within a minute",
    "schedule-unserved": "run a worker: `aiqueue work MODULE:WORKER`. If workers run, install this version for them, "
    "and permit them `$KV.AI_SCHEDULES.>` and `ai.ticks.>`",
    "schedule-owner": "run a worker of this owner, whose code makes the messages: `aiqueue work MODULE:WORKER`",
    "schedule-zone": "`pip install -U tzdata` on this host and those of the workers, then `aiqueue doctor` again; or "
    "give the schedule another zone",
    "schedule-unreadable": "update aiqueue on this host; if it is damaged, `aiqueue schedule rm {schedule}`, then "
    "add it again",
    "lane-paused": "`nats consumer resume {stream} {consumer}`",
    "lane-stuck": "`nats consumer info {stream} {consumer}` shows what the server delivers: workers pull, and get "
    "nothing. Restart the workers, and look for jobs past max_deliver with `aiqueue dead ls`",
    "counts-low": "run `aiqueue doctor` again in some seconds; if it stays, `nats server report jetstream`",
    "tenant-invalid": "`nats stream purge {stream} --subject {subject}` deletes them; "
    f"to move them to a valid tenant: {problems.GUIDE}",
    "clock-skew": "`timedatectl set-ntp true` on both machines: times in logs and `at=` are off by as much",
}
WHEN_FULL: Mapping[str, str] = {
    "work": "run more workers (`aiqueue work`), or raise max_bytes and run `aiqueue apply`: a full stream refuses "
    "jobs (StreamFull)",
    "inbox": "raise max_bytes and run `aiqueue apply`: a full stream refuses messages",
    "journal": "raise max_bytes or lower max_age, and run `aiqueue apply`: a full stream drops the oldest results "
    "before their time",
    "dead": "replay or purge dead letters (`aiqueue dead ls`), or raise max_bytes and run `aiqueue apply`",
    "parked": "run `aiqueue apply`, which removes the limit: a full stream drops the oldest parked jobs",
    "stranded": "run a worker (`aiqueue work`), which reads these notices of jobs past max_deliver: a full stream "
    "drops the oldest",
    "documents": "run `aiqueue documents collect`, or raise max_bytes and run `aiqueue apply`: a full stream refuses "
    "documents",
    "presence": "remove agents (`aiqueue inbox rm`), or raise max_bytes and run `aiqueue apply`: a full stream refuses "
    "new agents",
    "checkpoints": "raise max_bytes and run `aiqueue apply`: a full stream refuses the results of steps, and attempts "
    "that keep some fail",
    "limits": "raise max_bytes and run `aiqueue apply`: a full stream refuses a key's first use, so its jobs wait",
    "usage": "raise max_bytes or lower max_age, and run `aiqueue apply`: a full stream refuses records of usage and "
    "what budgets reserve, so the gateway calls no model",
    "recent": "raise max_bytes and run `aiqueue apply`: a full stream drops the oldest notes, so a request that a "
    "client repeats by itself may be paid for twice",
    "ticks": "run `aiqueue apply`, which removes the limit: a full stream loses ticks until a worker parks them again",
    "schedules": "remove schedules (`aiqueue schedule rm`), or raise max_bytes and run `aiqueue apply`: a full stream "
    "refuses changes, and the ticks of all schedules wait",
    "rag": "raise max_bytes and run `aiqueue apply`: a full stream refuses new stores of documents",
    "api_keys": "delete revoked API keys (`nats kv del AI_API_KEYS ID`), or raise max_bytes and run `aiqueue apply`: a "
    "full stream refuses new ones",
    "batches": "raise max_bytes and run `aiqueue apply`: a full stream refuses new files and batches",
    "metrics": "raise max_bytes and run `aiqueue apply`: a full stream drops the oldest counters",
    "audit": "raise max_bytes or lower max_age, and run `aiqueue apply`: a full stream drops the oldest acts before "
    "their time",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check: what was found, and what to do about it.

    `code` names the kind of finding, a key of REMEDIES. `code` and `remedy` are empty if nothing is to be done.
    """

    check: str
    """What was checked, such as storage or clock."""
    level: Level
    """How bad it is: ok, warn or fail."""
    text: str
    """What was found, in a sentence."""
    remedy: str = ""
    """What to do, with the command; empty: nothing."""
    code: str = ""
    """Kind of the finding, by which the page of what can go wrong names it; empty: nothing is to be done."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What to examine. `directory`: the embedded server's, None for any other server. `monitor`: the address of the
    server's monitoring, such as ``http://127.0.0.1:8222``. `rules`: the declared ones of limits; None: none.
    """

    connection: Connection
    topology: Topology
    directory: Path | None = None
    monitor: str | None = None
    rules: Rules | None = None


def warn(check: str, code: str, text: str, *, level: Level = "warn", **values: str) -> Finding:
    """Return a finding with the remedy of its kind. `values` fill the remedy; a subject is quoted for a shell."""
    quoted = {key: shlex.quote(value) if key == "subject" else value for key, value in values.items()}
    return Finding(check, level, text, REMEDIES[code].format(**quoted), code)


def level_of_use(used: int, limit: int) -> Level:
    """Return how near a limit is; a limit of 0 or less is none."""
    if limit <= 0 or used < NEAR * limit:
        return "ok"
    return "fail" if used >= FULL * limit else "warn"
