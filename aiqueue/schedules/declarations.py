"""Which schedules the workers of an owner declare in their code. Workers of several versions may run at once.

Each set of declarations is a key of the bucket, ``owner.{owner}.{fingerprint}``, which its workers refresh while they
run. Of the sets whose workers run, the newest that declares a schedule decides about this schedule.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import NamedTuple

from .. import codec, headers
from ..connection import Stored
from ..errors import Conflict, DecodeError
from .document import ScheduleDocument, ScheduleSpec
from .store import STORE_S, ScheduleStore

FORMAT = 1  # later ones only add fields: what this one reads of a set decides which set is the newest
OWNER_KEY = "owner"
ALIVE_S = 90.0  # a set that was refreshed within this time has workers
KEPT_TTL = "2592000s"  # how long a set is known without workers, 30 days: when its workers come back, it is no new one
Name = tuple[str, str]  # of a schedule: tenant and id


class DeclaredSet(NamedTuple):
    """What one version of an owner's code declares. `first` and `seen`: when the first worker with it was seen, and
    when one was seen last (seconds since the epoch). `seq`: of the stored message, 0 if it is not stored yet.
    """

    fingerprint: str
    generation: int
    first: float
    seen: float
    names: frozenset[Name]
    seq: int = 0

    @property
    def rank(self) -> tuple[int, float, str]:
        """The newer set has the greater one."""
        return self.generation, self.first, self.fingerprint

    def is_alive(self, now: float) -> bool:
        return abs(now - self.seen) < ALIVE_S  # one that was seen in the future is of a clock that was set back

    def encode(self) -> bytes:
        """Return the stored form."""
        names = sorted(map(list, self.names))
        fields = {
            "v": FORMAT,
            "generation": self.generation,
            "first": self.first,
            "seen": self.seen,
            "schedules": names,
        }
        return codec.dump(fields)

    @classmethod
    def of_specs(cls, specs: Collection[ScheduleSpec], generation: int, now: float) -> DeclaredSet:
        """Return a set that is first seen now. Its fingerprint is another one if a schedule does something else."""
        prints = sorted((each.tenant, each.id, ScheduleDocument.of_spec(each, 0.0).fingerprint) for each in specs)
        digest = hashlib.sha256(codec.dump([generation, [list(each) for each in prints]])).hexdigest()[:32]
        return cls(digest, generation, now, now, frozenset((each.tenant, each.id) for each in specs))


class UndeclaredSchedule(NamedTuple):
    """A schedule whose owner's code declares it no more: what `prune` removes. Times are seconds since the epoch.

    - `document`: as it is stored.
    - `declared_at`: when a worker that declares it was seen last, None if none was in the last 30 days.
    - `ended_at`: None if workers of the owner run, and none of them declares it. Else when the newest version of the
      owner's workers was seen last, which does not declare it.
    """

    document: ScheduleDocument
    declared_at: float | None = None
    ended_at: float | None = None

    @property
    def tenant(self) -> str:
        return self.document.tenant

    @property
    def id(self) -> str:
        return self.document.id


class DeclaredSets:
    """Reads and writes the declarations of one server's owners. Without state of its own.

    All raise NotFound (there is no bucket), Unavailable, AccessDenied.
    """

    def __init__(self, store: ScheduleStore) -> None:
        self._store = store

    async def get(self, owner: str, fingerprint: str) -> DeclaredSet | None:
        """Return a set, as the stream's leader has it."""
        return _parse(await self._store.last(self._store.key(OWNER_KEY, owner, fingerprint)))

    async def refresh(self, owner: str, declared: DeclaredSet) -> bool:
        """Store a set in place of the message `declared.seq`. Return False if another worker was first."""
        subject, fields = self._store.key(OWNER_KEY, owner, declared.fingerprint), {headers.TTL: KEPT_TTL}
        try:
            await self._store.write(subject, declared.seq, declared.encode(), fields, STORE_S)
        except Conflict:
            return False
        return True

    async def list(self, owner: str) -> list[DeclaredSet]:
        """Return the sets of an owner that this version can read, the newest first."""
        connection, subject = self._store.connection, self._store.key(OWNER_KEY, owner, "*")
        found = [_parse(each) async for each in connection.read(self._store.stream, subject)]
        return sorted((each for each in found if each is not None), key=lambda each: each.rank, reverse=True)


def find_undeclared(
    sets: Sequence[DeclaredSet], documents: Collection[ScheduleDocument], now: float
) -> list[UndeclaredSchedule]:
    """Return the schedules of an owner that its running workers do not declare; if none runs, that the newest of its
    sets, of which there must be one, does not.
    """
    alive = [each for each in sets if each.is_alive(now)]
    declared = frozenset[Name]().union(*(each.names for each in alive or sets[:1]))
    ended = None if alive else sets[0].seen
    found: list[UndeclaredSchedule] = []
    for each in documents:
        if (name := (each.tenant, each.id)) not in declared:
            last = max((former.seen for former in sets if name in former.names), default=None)
            found.append(UndeclaredSchedule(each, last, ended))
    return found


def _parse(stored: Stored | None) -> DeclaredSet | None:
    """Return a set; None if there is none, or this version cannot read it."""
    if stored is None or headers.KV_OPERATION in stored.headers:
        return None
    try:
        read = codec.decode_map(stored.data, codec.CBOR)
        names = frozenset((str(tenant), str(schedule_id)) for tenant, schedule_id in read["schedules"])
        fingerprint = stored.subject.rpartition(".")[2]
        found = DeclaredSet(fingerprint, read["generation"], read["first"], read["seen"], names, stored.seq)
        return found if all(0 <= each < 2**63 for each in (found.generation, found.first, found.seen)) else None
    except (DecodeError, KeyError, TypeError, ValueError):
        return None
