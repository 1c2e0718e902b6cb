"""Doctor's checks of limits: overrides that were forgotten or that concern nobody, and who does not heed the rules."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from .. import units
from ..errors import AccessDenied, NotFound
from ..lanes import Record, WorkerRecords, without_key_lanes
from .finding import Finding, Subject, warn

if TYPE_CHECKING:
    from ..limits import EffectiveRule, RuleId

FORGOTTEN_S = 86_400.0  # an override without an end that is older may be meant to be a declared rule
SHOWN_MAX = 3


async def check_limits(subject: Subject) -> AsyncIterator[Finding]:
    """Check the overrides, and whether streams and workers are ready for the rules."""
    from ..limits import Controls, Rules  # noqa: PLC0415

    connection, topology = subject.connection, subject.topology
    controls = Controls(connection, topology, subject.rules or Rules(), connection.clock.now)
    try:
        await controls.reload()
    except NotFound:
        return  # the stream has a finding already
    now = controls.now()
    effective = controls.rules.effective(now)
    limited = {each.name for each in topology.families.values() if each.limit_key}
    if effective:
        overridden = sum(each.override is not None for each in effective)
        rules = "1 rule holds" if len(effective) == 1 else f"{len(effective):,} rules hold"
        yield Finding("limits", "ok", f"{rules}, {overridden:,} of them set by operators")
    for each in effective:
        if each.rule.id.family not in limited:
            text = f"a rule for {each.rule.id}, set by {_author(each)}: no such family here has a limit_key"
            yield warn("limits", "limit-unmatched", text, scope=_options(each.rule.id))
        elif each.override is not None and each.override.expires_at is None:
            age_s = now - each.override.set_at
            if age_s > FORGOTTEN_S:
                ago = f"{units.short_duration(age_s)} ago"
                text = f"{each.rule.id}: {each.rule.describe()}, set by {_author(each)} {ago}, without an end"
                yield warn("limits", "limit-override-old", text, scope=_options(each.rule.id))
    ruled = limited & ({each.rule.id.family for each in effective} | {each.family for each in controls.pauses()})
    for family in (topology.families[each] for each in sorted(ruled)):
        with contextlib.suppress(NotFound):
            config = (await connection.api(f"STREAM.INFO.{family.stream}"))["config"]
            if not family.takes_keys(config["subjects"]):
                text = f"{family.stream} has no subjects for the lanes of {family.name}'s limited keys"
                yield warn("limits", "limit-lanes", text)
    records: list[Record] = []
    with contextlib.suppress(NotFound, AccessDenied):
        records = await WorkerRecords(connection, topology).read() if ruled else []
    former = without_key_lanes(records)
    if heedless := sorted({name for family in ruled for name in former.get(family, ())}):
        more = f" and {len(heedless) - SHOWN_MAX} more" if len(heedless) > SHOWN_MAX else ""
        names = ", ".join(heedless[:SHOWN_MAX]) + more
        yield warn("limits", "limit-unheeded", f"workers that heed no limits: {names}")


def _author(each: EffectiveRule) -> str:
    return each.override.author if each.override is not None else "limits.toml"


def _options(which: RuleId) -> str:
    """Return the arguments that name a rule on the command line."""
    whom = {None: "", "*": " --each-tenant"}.get(which.tenant, f" --tenant {which.tenant}")
    return f"{which.family} {shlex.quote(which.key)}{whom}"
