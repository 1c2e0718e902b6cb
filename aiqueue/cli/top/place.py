"""Where the user of `top` is: of which family, tenant and job something is shown, and what."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from .. import output

if TYPE_CHECKING:
    from ...inspect import ListedJob

Pane = Literal["families", "lanes", "jobs", "dead", "workers", "kinds", "pauses", "job", "worker"]
TABS: tuple[Pane, ...] = ("families", "jobs", "dead", "workers", "kinds", "pauses")  # "lanes" instead, in a family


@dataclass(frozen=True)
class Place:
    """What is shown: a pane, and of what. "": of all. `item`: the job's id, or the worker's name.

    `listed`: the job as the list had it, whose message is shown.
    """

    pane: Pane = "families"
    family: str = ""
    tenant: str = ""
    priority: str = ""
    item: str = ""
    listed: ListedJob | None = field(default=None, compare=False)

    @property
    def scope(self) -> str:
        """Of what something is shown, for people."""
        if not self.family:
            return "all families"
        return output.format_lane(self.family, self.tenant, self.priority or None) if self.tenant else self.family

    @property
    def default_sort(self) -> str:
        """The column by which it is sorted at first; "": in its own order."""
        return "pending" if self.pane == "lanes" else ""

    @property
    def tabs(self) -> tuple[Pane, ...]:
        """The panes of this scope."""
        return ("lanes", *TABS[1:]) if self.family else TABS

    def tab(self, number: int) -> Place | None:
        """Return the place of a tab, from 1 on; None: there is none."""
        if not 1 <= number <= len(self.tabs):
            return None
        return replace(self, pane=self.tabs[number - 1], item="", listed=None)
