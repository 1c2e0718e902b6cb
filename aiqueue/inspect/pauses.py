"""All pauses that hold: those of families, tenants and kinds, and those of the values of limited keys."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from ..connection import Connection
from ..errors import AccessDenied, NotFound
from ..lanes import Pause, StoredPauses
from ..topology import Topology

if TYPE_CHECKING:
    from ..limits import KeyPause

log = logging.getLogger(__name__)


async def read_pauses(connection: Connection, topology: Topology) -> list[Pause]:
    """Return the pauses that have not ended, sorted by family, tenant, kind and key.

    Without those of keys, and with a warning, if this user may not read these. Raises Unavailable, NotFound (a stream
    is missing), AccessDenied.
    """
    found = await StoredPauses(connection, topology).read()
    try:
        found += await read_key_pauses(connection, topology)
    except AccessDenied as error:
        log.warning("pauses of limited keys are not listed: %s", error)
    return sorted(found, key=lambda each: (each.family, each.tenant or "", each.kind or "", each.key or ""))


async def read_pauses_if_allowed(connection: Connection, topology: Topology) -> list[Pause]:
    """As `read_pauses`, for views: without those of a stream that is missing, or that this user may not read.

    Raises Unavailable.
    """
    found = await StoredPauses(connection, topology).read_if_allowed()
    try:
        return found + await read_key_pauses(connection, topology)
    except (NotFound, AccessDenied):
        return found


async def read_key_pauses(connection: Connection, topology: Topology) -> list[Pause]:
    """Return the pauses of values of limited keys that have not ended. Raises as `read_pauses`."""
    if not any(each.limit_key for each in topology.families.values()):
        return []
    from ..limits import Controls, Rules  # noqa: PLC0415 -- where no family has limits, nobody pays for their room

    controls = Controls(connection, topology, Rules(), connection.clock.now)
    await connection.clock.ensure(controls.stream)
    await controls.reload()
    return [pause_of(each) for each in controls.pauses()]


def pause_of(found: KeyPause) -> Pause:
    """Return the pause of a key in the form of the others."""
    until = None if math.isinf(found.until) else found.until
    return Pause(found.family, found.tenant, None, found.set_at, found.author, found.why, until, key=found.key)
