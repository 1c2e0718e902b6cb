"""A worker's lifespan, which may take the client: how the worker enters it, and how its child processes do."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from ..attempt import Handler
from ..client import Client, connect
from ..config import Settings
from ..errors import BadInput
from ..processes import find_global, find_object, refer_to

Lifespan = Callable[[], AbstractAsyncContextManager[Any]]
ClientLifespan = Callable[[Client], AbstractAsyncContextManager[Any]]


def takes_client(lifespan: Any) -> bool:
    """Return whether a lifespan has an argument that it needs. Raises BadInput for what is no lifespan."""
    if not callable(lifespan):
        raise BadInput(f"lifespan must be a function that returns an async context manager, not {lifespan!r}")
    try:
        signature = inspect.signature(lifespan)
    except ValueError:
        return False  # a builtin without a signature
    try:
        signature.bind()
    except TypeError:
        try:
            signature.bind(None)
        except TypeError as error:
            name = getattr(lifespan, "__qualname__", None) or repr(lifespan)
            raise BadInput(f"lifespan {name} must take no argument, or one, the client: {error}") from None
        return True
    return False


def lifespan_of_children(
    lifespan: Any, client: Client, worker: object, handlers: Iterable[Handler]
) -> Callable[..., AbstractAsyncContextManager[Any]]:
    """Return how child processes enter a lifespan that takes the client: each with a client of its own.

    Where a child cannot find the lifespan, it is returned as it is, which is refused where children are needed.
    """
    found = refer_to(lifespan)
    if not found and (reference := find_global(worker, handlers)):
        found = f"{reference}.lifespan"
    if not found:
        return lifespan  # type: ignore[no-any-return]
    make_headers = "" if client.make_headers is None else refer_to(client.make_headers)
    return functools.partial(enter_with_client, client.settings.to_plain(), make_headers, found)


@asynccontextmanager
async def enter_with_client(settings: Mapping[str, Any], make_headers: str, lifespan: str) -> AsyncIterator[Any]:
    """Enter a lifespan in a child process, with a client of that process. Both functions are given by their names."""
    headers = find_object(make_headers) if make_headers else None
    async with (
        connect(settings=Settings.of_plain(settings), headers=headers) as client,
        find_object(lifespan)(client) as state,
    ):
        yield state
