"""The limiter of a process: credits for calls, by family, key and tenant."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable
from functools import partial

from ..connection import Connection
from ..errors import AIQueueError, BadInput
from ..topology import Topology
from ..units import COST_MAX, real_number
from .controls import Controls
from .credit import BatchCall, Credit
from .key_limiter import KeyLimiter
from .rules import COUNT_MAX, Rules, check_key
from .sharing import Waiter

log = logging.getLogger(__name__)

RETRY_S = 0.2
SWEEP_S = 5.0  # how often keys that nobody uses are closed
BATCH_MAX = 128  # calls of a batch
BATCH_PART = 100  # and at most this part of a limit
WEIGHT_MIN, WEIGHT_MAX = 0.01, 100.0


class Limiter:
    """Grants credits so that no process ever starts more calls than the rules allow, over all processes together.

    A value of a key without a rule is not limited, and costs no message. All times are the server's.
    """

    def __init__(self, connection: Connection, topology: Topology, rules: Rules | None = None) -> None:
        self._connection, self._topology = connection, topology
        self.process = secrets.token_hex(5)
        self.controls = Controls(connection, topology, rules or Rules(), self.clock)
        self._keys: dict[tuple[str, str], KeyLimiter] = {}
        self._regained: Callable[[], None] | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._reloading: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Read rules and pauses, and follow them. Raises NotFound, Unavailable, AccessDenied."""
        await self._connection.api(f"STREAM.INFO.{self.controls.stream}")  # tells the server's time
        await self.controls.open()
        self.controls.listeners.append(self._wake_all)
        self._regained = self._connection.on_regained(self._on_regained)
        self._sweeper = asyncio.create_task(self._sweep())

    async def close(self) -> None:
        """Give back what is not spent, and stop. Safe twice, and before `open`."""
        if self._regained is not None:
            self._regained()
            self._regained = None
        for task in (self._sweeper, self._reloading):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        self._sweeper = self._reloading = None
        keys, self._keys = list(self._keys.values()), {}
        await asyncio.gather(*(each.close() for each in keys))
        await self.controls.close()

    def clock(self) -> float:
        """Return the server's time."""
        now = self._connection.clock.precise()
        return self._connection.clock.now() if now is None else now

    # -- credits

    def is_limited(self, family: str, key: str, tenant: str) -> bool:
        """Return whether a rule or a pause holds for this value of the family's key."""
        return self.controls.is_limited(family, key, tenant)

    def try_acquire(
        self, family: str, key: str, tenant: str, *, requests: int = 1, cost: float = 0.0, weight: float | None = None
    ) -> Credit | None:
        """Return a credit if that needs no waiting and no message, else None. Raises AboveLimit, BadInput."""
        waiter = self._waiter(family, key, tenant, requests, cost, weight)
        limiter = self._key(family, key, tenant)
        return limiter.try_acquire(waiter) if limiter is not None else self._unlimited(family, key, waiter)

    def is_short(self, family: str, key: str) -> bool:
        """Return whether a limit of this value of the family's key holds calls back now."""
        limiter = self._keys.get((family, key))
        return limiter is not None and limiter.sharing.is_short

    def shortage(self, family: str, key: str, *, requests: int = 1, cost: float = 0.0) -> tuple[str, float] | None:
        """Return what is short for one more call of this value of the key, over all tenants, "requests" or "cost", and
        for how many seconds. None: there is room, or nobody knows, because the server has not answered.
        """
        limiter = self._keys.get((family, key))
        if limiter is None or limiter.is_stale:
            return None
        return limiter.sharing.shortage(self.clock(), requests, cost)

    def batch_size(self, family: str, key: str, tenant: str, calls: int, cost: float) -> int:
        """Return for how many of these calls, which cost so much each, one credit may be had: a `CreditBatch`. 1 where
        calls are to be counted singly: a rule limits how many run at once, or allows few.
        """
        part = COUNT_MAX
        for rule in self.controls.rules.choose(family, key, tenant, self.clock()):
            if rule is not None:
                if rule.in_flight is not None:
                    return 1
                part = min(part, rule.requests or COUNT_MAX)
                if rule.cost is not None and cost:
                    part = min(part, int(rule.cost / cost))
        return max(1, min(calls, BATCH_MAX, part // BATCH_PART))

    async def acquire(
        self,
        family: str,
        key: str,
        tenant: str,
        *,
        requests: int = 1,
        cost: float = 0.0,
        weight: float | None = None,
        first: bool = False,
    ) -> Credit:
        """Wait until a call of this cost (an upper bound of what it will use) may start, and return its credit.

        `weight`: of the tenant among those that wait; None: the declared one. `first`: before all others of this
        tenant that wait in this process. Cancel the call to stop waiting.

        - Raises AboveLimit at once if the reservation is above the limit itself, or as soon as the limit is lowered so
          far; BadInput for a wrong argument.
        - Raises NotFound, AccessDenied or ConfigMismatch if the state of limits cannot be used.
        """
        waiter = self._waiter(family, key, tenant, requests, cost, weight)
        while (limiter := self._key(family, key, tenant)) is None:
            credit = self._unlimited(family, key, waiter)
            if credit is not None:
                return credit
            await self._changed(self.controls.paused_until(family, key, tenant) - self.clock())
        return await limiter.acquire(waiter, first=first)

    def ask(
        self,
        family: str,
        key: str,
        tenant: str,
        done: Callable[[Credit | Exception], None],
        *,
        requests: int = 1,
        cost: float = 0.0,
    ) -> Callable[[], None] | None:
        """As `acquire`, without waiting: `done` is called later, with the credit or an error. Return what stops that.

        None: no rule holds for the key, so `try_acquire` says all. Raises AboveLimit, BadInput.
        """
        waiter = self._waiter(family, key, tenant, requests, cost, None)
        limiter = self._key(family, key, tenant)
        if limiter is None:
            return None
        waiter.done = done
        limiter.ask(waiter)
        return partial(limiter.cancel, waiter)

    def _waiter(
        self, family: str, key: str, tenant: str, requests: int, cost: float, weight: float | None
    ) -> Waiter:  # fmt: skip
        check_key(key)
        if isinstance(requests, bool) or not isinstance(requests, int) or not 0 < requests <= COUNT_MAX:
            raise BadInput(f"requests must be a whole number from 1, not {requests!r}")
        real_number("cost", cost, 0, COST_MAX)
        weight = self._topology.family(family).weight(tenant) if weight is None else weight
        real_number("weight", weight, WEIGHT_MIN, WEIGHT_MAX)
        return Waiter(tenant, requests, cost, weight, lambda _outcome: None)

    def _key(self, family: str, key: str, tenant: str) -> KeyLimiter | None:
        """Return the limiter of a value of the key; None if no rule holds for it."""
        limiter = self._keys.get((family, key))
        if limiter is None:
            if not any(self.controls.rules.choose(family, key, tenant, self.clock())):
                return None
            limiter = KeyLimiter(self._connection, self.controls, family, key, self.process, self.clock)
            limiter.start()
            self._keys[family, key] = limiter
        return limiter

    def _unlimited(self, family: str, key: str, waiter: Waiter) -> Credit | None:
        owner = _Unlimited(self, family, key)
        if owner.paused_until(waiter.tenant) > self.clock():
            return None
        return Credit(owner, waiter.tenant, waiter.requests, waiter.cost, ())

    async def _changed(self, within_s: float) -> None:
        """Wait until rules or pauses change, for at most so many seconds."""
        changed = asyncio.Event()
        self.controls.listeners.append(changed.set)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.001, within_s)):
                    await changed.wait()
        finally:
            self.controls.listeners.remove(changed.set)

    # -- changes

    def key_limiters(self) -> list[KeyLimiter]:
        """Return the open ones, for figures and tests."""
        return list(self._keys.values())

    def _wake_all(self) -> None:
        for each in self._keys.values():
            each.wake()

    def _on_regained(self) -> None:
        """The connection was lost: changes may have been missed. Nothing is reserved until all is read again."""
        self.controls.current.clear()
        for each in self._keys.values():
            each.is_stale = True
        if self._reloading is None or self._reloading.done():
            self._reloading = asyncio.create_task(self._reload())

    async def _reload(self) -> None:
        while True:
            try:
                await self._connection.api(f"STREAM.INFO.{self.controls.stream}")
                await self.controls.reload()
            except AIQueueError as error:
                log.debug("%s: %s", self.controls.stream, error)
                await asyncio.sleep(RETRY_S)
            else:
                self._wake_all()
                return

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            for name, each in list(self._keys.items()):
                if each.is_idle:
                    del self._keys[name]
                    await each.close()


class _Unlimited:
    """The owner of credits of a key without a rule: only a pause concerns them."""

    def __init__(self, limiter: Limiter, family: str, key: str) -> None:
        self._limiter, self._family, self._key = limiter, family, key

    @property
    def rules_version(self) -> int:
        self._limiter.controls.rules.expire(self._limiter.clock())
        return self._limiter.controls.rules.version

    def clock(self) -> float:
        return self._limiter.clock()

    def paused_until(self, tenant: str) -> float:
        return self._limiter.controls.paused_until(self._family, self._key, tenant)

    def changed(self) -> None:
        """Nothing waits for it."""

    def report(self, credit: Credit | BatchCall, above: float) -> None:
        """Nothing was reserved."""
