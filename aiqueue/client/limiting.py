"""Limits by key: calls of the client that set, remove and show rules."""

from __future__ import annotations

import getpass
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..connection import Connection
from ..errors import BadInput
from ..inspect import LimitStats, describe_limit, read_limits
from ..topology import LIMITS_FILE, Topology, list_directories
from ..units import Duration, flag, parse_duration

if TYPE_CHECKING:  # only who uses limits imports their room, which takes some milliseconds
    from ..limits import Controls, Rule, RuleId, Rules


def load_declared(topology: Topology, *directories: Path) -> tuple[Rule, ...]:
    """Load the rules of limits.toml beside the stream files. Raises TopologyError, in one line with file and key."""
    having = [each for each in list_directories(*directories) if (each / LIMITS_FILE).is_file()]
    if not having:
        return ()
    from ..limits import load_rules  # noqa: PLC0415

    return tuple(load_rules(topology, *having).declared.values())


class LimitCalls:
    """The part of `Client` that limits."""

    topology: Topology
    _declared_limits: tuple[Rule, ...]

    @property
    def connection(self) -> Connection:
        raise NotImplementedError

    @property
    def limit_rules(self) -> Rules:
        """The declared rules of limits.toml; for aiqueue's own modules. Each call returns an object of its own, so that
        whoever follows the overrides has it to itself.
        """
        from ..limits import Rules  # noqa: PLC0415

        return Rules(self._declared_limits)

    async def set_limit(
        self,
        family: str,
        key: str = "*",
        *,
        tenant: str | None = None,
        requests: int | None = None,
        cost: float | None = None,
        window: Duration | None = None,
        in_flight: int | None = None,
        unlimited: bool = False,
        duration: Duration | None = None,
        by: str | None = None,
    ) -> LimitStats:
        """Override a rule of limits.toml, or set one that is not declared. All processes heed it within a second.

        - `key`: a value of the family's `limit_key`, or a pattern such as "gpt-*", as the rule has it.
        - `tenant`: a tenant's own limit, ``*`` for each tenant by itself; by default one of all tenants together.
        - `requests`, `cost` (from 0) and `in_flight`: what starts in any `window` (a duration; by default as it is now,
          or else "1m"), what that costs together, and what runs at once. Those that are not given stay as they hold for
          the key now, also those of a pattern.
        - Requests and cost of a rule share one window. If one of them is given, and the other one stays and would
          change its window, nothing is set: give both.
        - `unlimited=True` lifts the rule that holds for the key: the declared one, or a pattern for this key only.
        - `duration` (a duration; at most 366 days): the override ends by itself, and the declared rule holds again.
        - `by` (default: the user and host of this process) is shown to operators.

        Returns the rule as it is now, without its use.

        Raises BadInput, NotFound (the stream is missing: run `aiqueue apply`), AccessDenied, QueueFull, Unavailable.
        """
        from ..limits import EffectiveRule, merge_limits, rule_id  # noqa: PLC0415

        limits = {"requests": requests, "cost": cost, "window": window, "in_flight": in_flight}
        wanted = {field: value for field, value in limits.items() if value is not None}
        if flag("unlimited", unlimited) and wanted:
            raise BadInput("unlimited lifts a rule: give no limit and no window beside it")
        if not unlimited and not wanted:
            raise BadInput("give at least one of requests, cost and in_flight; or unlimited, to lift a rule")
        which = rule_id(self.topology, {"family": family, "key": key, "tenant": tenant})
        expires_in_s = None if duration is None else parse_duration("duration", duration)
        controls = await self._controls()
        await controls.reload()
        if not unlimited:
            wanted = merge_limits(which, _limits_now(controls, which), wanted)
        whom = {} if tenant is None else {"tenant": tenant}
        override = await controls.set_rule(
            {"family": family, "key": key, **whom, **wanted},
            author=name_user() if by is None else by,
            expires_in_s=expires_in_s,
        )
        return describe_limit(EffectiveRule(override.rule, controls.rules.declared.get(override.rule.id), override))

    async def unset_limit(self, family: str, key: str = "*", *, tenant: str | None = None) -> bool:
        """Remove the override of exactly this rule, so that the declared one holds again, or none.

        Return False if there is no such override. Raises as `set_limit`.
        """
        from ..limits import RuleId  # noqa: PLC0415

        return await (await self._controls()).unset_rule(RuleId(family, key, tenant))

    async def limits(self, family: str | None = None) -> list[LimitStats]:
        """Return the rules that hold now, with the use of each value of the key, of one family or all.

        Raises BadInput, AccessDenied, NotFound (the stream is missing: run `aiqueue apply`), Unavailable.
        """
        return await read_limits(self.connection, self.topology, self.limit_rules, family)

    async def _controls(self) -> Controls:
        from ..limits import Controls  # noqa: PLC0415

        controls = Controls(self.connection, self.topology, self.limit_rules, self.connection.clock.now)
        await self.connection.clock.ensure(controls.stream)
        return controls


def _limits_now(controls: Controls, which: RuleId) -> dict[str, Any]:
    """Return the limits that hold now for what a rule is for, as fields of a table: those of this rule, or else of the
    more general one that the rule will replace for its key; none if there is neither.
    """
    for rule, _, _ in controls.rules.effective(controls.now()):
        if rule.id == which:
            return rule.fields()
    found = controls.rules.more_general(which, controls.now())
    return {} if found is None else found.fields()


def name_user() -> str:
    """Return who runs this process, such as "anna@host"."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a user id without a name, as in a container
        name = "?"
    return f"{name}@{socket.gethostname()}"
