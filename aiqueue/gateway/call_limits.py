"""How far a call has come, and the time limits on it."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Final, Self

from .provider_errors import ProviderError

END_S: Final = 10.0  # how long a stream may go on when its choices have ended: for its usage, and for its own end


class CallState:
    """How far a call has come: whether the request was `sent`, and whether its stream has `begun`."""

    __slots__ = ("begun", "sent")

    def __init__(self) -> None:
        self.sent = False
        self.begun = False


class CallLimit:
    """A time limit on a call: ``async with CallLimit("openai", 60.0, state):``. Its end is a ProviderError.

    A TimeoutError of anything else passes.
    """

    def __init__(self, provider: str, limit_s: float, state: CallState, what: str = "the answer") -> None:
        self._text = f"{provider}: {what} took longer than {limit_s:g} s"
        self._state = state
        self._timeout = asyncio.timeout(limit_s)

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, traceback)
        except TimeoutError:
            raise ProviderError("timeout", self._text, may_be_billed=self._state.sent) from None


class StreamEnd:
    """Leaves a stream that goes on for END_S after `begin`: ``async with StreamEnd() as end:``. That is no error."""

    def __init__(self) -> None:
        self._timeout = asyncio.timeout(None)

    def begin(self) -> None:
        """All that is paid for has come. May be called with each further chunk."""
        if self._timeout.when() is None:
            self._timeout.reschedule(asyncio.get_running_loop().time() + END_S)

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        try:
            await self._timeout.__aexit__(kind, error, traceback)
        except TimeoutError:
            return True
        return False
