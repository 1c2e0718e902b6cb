"""Which API key has asked for a job, as workers know it: its calls are charged to the budget of the key, too."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from .. import subjects
from ..errors import NotFound
from .api_key_store import ApiKey, ApiKeyStore

if TYPE_CHECKING:
    from ..client import Client

API_KEY: Final = "Gateway-Api-Key"  # a header of jobs: the id of the API key that has asked for it
KNOWN_S: Final = 30.0  # how long a key is not read again: its budget never changes
KNOWN_MAX: Final = 1_000


class KnownApiKeys:
    """The API keys of the jobs that a worker runs, read when they are needed."""

    def __init__(self, client: Client) -> None:
        self._store = ApiKeyStore(client.connection, client.topology)
        self._known: OrderedDict[str, tuple[float, ApiKey]] = OrderedDict()

    async def key_of(self, tenant: str, headers: Mapping[str, str]) -> ApiKey | None:
        """Return the key that the headers of a tenant's job name, also a revoked one; None: they name none of the
        tenant's. Raises Unavailable, AccessDenied.
        """
        key_id = headers.get(API_KEY, "")
        if not subjects.TOKEN.fullmatch(key_id):
            return None
        read_at, key = self._known.get(key_id, (0.0, None))
        if key is None or time.monotonic() - read_at > KNOWN_S:
            try:
                found = await self._store.find(key_id)
            except NotFound:  # there are no API keys on this server
                return None
            if found is None or found.key is None:
                return None
            key = found.key
            self._known[key_id] = time.monotonic(), key
            if len(self._known) > KNOWN_MAX:
                self._known.popitem(last=False)
        return key if key.tenant == tenant else None
