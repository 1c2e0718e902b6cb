"""`top` as a view: keys change the state, the state says what is read, and what was read is drawn."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...errors import AIQueueError
from .. import output
from ..live import Poller
from . import acts
from .acts import TopAct
from .figures import Figures
from .frame import draw_frame, draw_plain
from .panes import table_of
from .place import Place
from .reader import JOBS_MAX, TopReader
from .state import Look, Shown, TopState, ask, press, say, settle

if TYPE_CHECKING:
    from ...client import Client
    from ...inspect import LaneStats

JOBS_STEP = 100
SAMPLE_S = 0.5
LANES_AGED = 100  # the oldest job is read of so many lanes where all of them may be visible


class TopApp:
    """The view of a client's server, from a place on."""

    def __init__(self, client: Client, place: Place, interval_s: float) -> None:
        self._client = client
        self._reader = TopReader(client)
        self._reader.shown_lanes = self._shown_lanes
        self._changed: Callable[[], None] = _nothing
        self._tasks: set[asyncio.Task[None]] = set()
        self._shown = Shown(None)
        self._size = 80, 24
        self._colour = not os.environ.get("NO_COLOR")
        self.state = TopState(Look(place, sort=place.default_sort))
        self.poller: Poller[Figures] = Poller(client.connection, self._read, interval_s, self._on_read)

    @property
    def done(self) -> bool:
        """Whether the user has left."""
        return self.state.done

    def attach(self, changed: Callable[[], None]) -> None:
        """See `View`."""
        self._changed = changed

    def draw(self, columns: int, rows: int) -> Sequence[str]:
        """See `View`."""
        self._size = columns, rows
        frame = draw_frame(
            self.state, self.poller.value, self.poller.problem(), columns, rows,
            interval_s=self.poller.interval_s, colour=self._colour,
        )  # fmt: skip
        self._shown = frame.shown
        self.state = replace(self.state, look=settle(self.state.look, frame.shown))
        return frame.lines

    def lines(self) -> Sequence[str]:
        """See `View`."""
        return draw_plain(self.state.place, self.poller.value, self.poller.problem(), output.terminal_width())

    def press(self, key: str) -> None:
        """See `View`."""
        before = self.state
        self.state = press(self.state, key, self._shown)
        if self.state.place != before.place:
            self._reader.jobs_limit = JOBS_STEP
            self.poller.restart()
        elif self.state.place.pane == "lanes" and _order(self.state.look) != _order(before.look):
            self.poller.hurry()
        if self.state.place != before.place or _order(self.state.look) != _order(before.look):
            self.draw(*self._size)  # the next key may be here already: it is about the rows of this state
        if self.state.act is not None:
            self._start(self._carry_out(self.state.act))
            self.state = replace(self.state, act=None)
        self._read_more_jobs()

    async def read_once(self) -> None:
        """Read for one look, with rates over the time between two readings. Raises AIQueueError."""
        await self._read()
        await asyncio.sleep(SAMPLE_S)
        await self.poller.read_once()
        if self.poller.error is not None:
            raise self.poller.error

    async def stop(self) -> None:
        """Wait for what is being carried out, and print what came of it: an act is not cut in two."""
        if self._tasks:
            await asyncio.wait(self._tasks)
            if self.state.said:
                output.print_line(output.escape_controls(self.state.said))

    def _on_read(self) -> None:
        self._changed()

    async def _read(self) -> Figures:
        return await self._reader.read(self.state.place)

    def _read_more_jobs(self) -> None:
        """Read more jobs when the last one is selected."""
        figures, rows = self.poller.value, self._shown.rows
        if figures is None or not figures.more_jobs or not rows or self._reader.jobs_limit >= JOBS_MAX:
            return
        if self._shown.position(self.state.look.selected) == len(rows) - 1:
            self._reader.jobs_limit = min(JOBS_MAX, self._reader.jobs_limit * 3)
            self.poller.hurry()

    def _shown_lanes(self, lanes: Sequence[LaneStats]) -> Iterable[LaneStats]:
        """Return the lanes that are visible, whose oldest jobs are read; at times all where they are sorted by them."""
        look = self.state.look
        if look.sort == "oldest" and self._reader.ages.begin_all(time.monotonic()):
            return lanes
        table = table_of(Figures(look.place, lanes=tuple(lanes)))
        rows = table.arrange(look.sort, look.reverse, look.wanted)
        if self._shown.table is None:  # nothing is drawn yet, or lines are printed
            return rows[:LANES_AGED]
        shown = replace(self._shown, table=table, rows=rows)
        offset = settle(look, shown).offset
        return rows[offset : offset + self._shown.height + 1]

    # -- acts

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry_out(self, act: TopAct) -> None:
        try:
            if act.name == "count":
                await self._ask_to_replay(act)
            else:
                self._say(f"{act.question.partition('?')[0]} …")
                self._say(await acts.carry_out(self._client, act))
        except AIQueueError as error:
            self._say(str(error), is_bad=True)
        self.poller.hurry()

    async def _ask_to_replay(self, act: TopAct) -> None:
        place = self.state.place
        replay = await acts.count_dead(self._client, act)
        assert replay.plan is not None
        if self.state.place != place or self.state.asked is not None or self.state.typing:
            return  # the user has gone on meanwhile: a "y" that is typed is no answer
        if replay.plan.count:
            self.state = ask(self.state, replay)
            self._changed()
        else:
            self._say(f"{act.scope} has no dead letters")

    def _say(self, text: str, *, is_bad: bool = False) -> None:
        self.state = say(self.state, text, is_bad=is_bad)
        self._changed()


def _nothing() -> None:
    """Stand in for who listens, before there is one."""


def _order(look: Look) -> tuple[Any, ...]:
    return look.offset, look.sort, look.reverse, look.wanted
