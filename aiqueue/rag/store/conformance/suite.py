"""How a test of the suite runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from ...types import VectorStore
from .data import DIMENSIONS, EMBEDDER, new_tenant


class StoreSuite:
    """Runs each test with a new object and an open tenant of its own."""

    def connect(self) -> VectorStore:
        """Return a new object for the store under test, always for the same data."""
        raise NotImplementedError

    def _run(self, test: Callable[[VectorStore, str], Awaitable[None]]) -> None:
        async def with_store() -> None:
            store = self.connect()
            tenant = new_tenant()
            try:
                await store.open(tenant, EMBEDDER, DIMENSIONS)
                await test(store, tenant)
            finally:
                await store.close()
                await store.close()

        asyncio.run(with_store())
