"""The store that rag.toml names, for commands that read it themselves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from ..options import ServerOptions

if TYPE_CHECKING:
    from ...client import Client
    from ...rag import RagConfig, VectorStore

T = TypeVar("T")


def run_with_store(options: ServerOptions, tenant: str, work: Callable[[VectorStore], Awaitable[T]]) -> T:
    """Open the store, return what `work` reads from it, and close the store. See `run_with_parts`."""

    async def run(_: Client, __: RagConfig, store: VectorStore) -> T:
        return await work(store)

    return run_with_parts(options, tenant, run, reads=True)


def run_with_parts(
    options: ServerOptions,
    tenant: str,
    work: Callable[[Client, RagConfig, VectorStore], Awaitable[T]],
    *,
    reads: bool = False,
) -> T:
    """Open a client and the store, and return what `work` returns for them and rag.toml. `reads` as in ServerOptions.

    Raises BadInput and the like in one line: for a wrong rag.toml, or a store that is on another host.
    """
    from ...rag import load, open_bound_store  # noqa: PLC0415
    from ...subjects import token  # noqa: PLC0415

    token("tenant", tenant)

    async def run(client: Client) -> T:
        import asyncio  # noqa: PLC0415

        config = await asyncio.to_thread(load, streams=client.settings.streams)
        store = await open_bound_store(client, config, tenant)
        try:
            return await work(client, config, store)
        finally:
            await store.close()

    return options.run_with_client(run, reads=reads)
