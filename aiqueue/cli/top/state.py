"""What the user of `top` has chosen, and what a key changes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .acts import TopAct
from .panes import RowTarget, inside, target_of
from .place import Place

if TYPE_CHECKING:
    from .table import Table

FILTER_MAX = 100


@dataclass(frozen=True)
class Look:
    """How a place is looked at: the selected row by its key, the first visible one, order and filter."""

    place: Place = field(default_factory=Place)
    selected: str = ""
    offset: int = 0
    sort: str = ""
    reverse: bool = False
    wanted: str = ""


@dataclass(frozen=True)
class TopState:
    """All that keys change. `before`: the looks that Escape goes back to.

    `typing`: keys are characters of the filter. `asked`: what is to be confirmed. `act`: what is to be carried out now.
    `said`: what came of the last act, or why a key does nothing; `is_bad`: it is an error.
    """

    look: Look = field(default_factory=Look)
    before: tuple[Look, ...] = ()
    typing: bool = False
    helping: bool = False
    asked: TopAct | None = None
    act: TopAct | None = None
    said: str = ""
    is_bad: bool = False
    done: bool = False

    @property
    def place(self) -> Place:
        """What is shown."""
        return self.look.place


@dataclass(frozen=True)
class Shown:
    """What keys act on: the rows that the filter leaves, in order, or so many lines of text. `height`: of the list."""

    table: Table | None
    rows: Sequence[Any] = ()
    text_lines: int = 0
    height: int = 1
    dead_seq: int = 0  # of the job that is shown
    current: bool = True  # what is shown is of this moment

    def position(self, selected: str) -> int:
        """Return where the selected row is; the first if it is not there any more."""
        if self.table is not None:
            for at, row in enumerate(self.rows):
                if self.table.key(row) == selected:
                    return at
        return 0


def settle(look: Look, shown: Shown) -> Look:
    """Return a look whose selected row exists and is visible."""
    if shown.table is None:
        return replace(look, offset=max(0, min(look.offset, shown.text_lines - shown.height)))
    if not shown.rows:
        return replace(look, offset=0)
    at = shown.position(look.selected)
    offset = min(max(look.offset, at - shown.height + 1), at, max(0, len(shown.rows) - shown.height))
    return replace(look, selected=shown.table.key(shown.rows[at]), offset=max(0, offset))


def press(state: TopState, key: str, shown: Shown) -> TopState:
    """Return the state after a key. `act` is set if something is to be carried out."""
    state = replace(state, act=None)
    if state.asked is not None:
        return _answer(state, key)
    if state.typing:
        return _type(state, key)
    state = replace(state, said="", is_bad=False)
    if state.helping:
        return replace(state, helping=False, done=key == "q")
    moved = _move(state.look, key, shown)
    if moved is not None:
        return replace(state, look=moved)
    return _command(state, key, shown)


def say(state: TopState, text: str, *, is_bad: bool = False) -> TopState:
    """Return the state with a line for the user."""
    return replace(state, said=text, is_bad=is_bad)


def ask(state: TopState, act: TopAct) -> TopState:
    """Return the state in which an act is to be confirmed."""
    return replace(state, asked=act, typing=False, helping=False, said="", is_bad=False)


def _answer(state: TopState, key: str) -> TopState:
    if key in ("y", "Y"):
        return replace(state, asked=None, act=state.asked)
    return replace(state, asked=None, said="nothing was changed", is_bad=False)


def _type(state: TopState, key: str) -> TopState:
    look = state.look
    if key == "enter":
        return replace(state, typing=False)
    if key == "escape":
        return replace(state, typing=False, look=replace(look, wanted=""))
    if key == "backspace":
        return replace(state, look=replace(look, wanted=look.wanted[:-1]))
    if len(key) == 1 and len(look.wanted) < FILTER_MAX:
        return replace(state, look=replace(look, wanted=look.wanted + key))
    return state


def _move(look: Look, key: str, shown: Shown) -> Look | None:
    """Return the look after a key that moves; None: the key does not move."""
    page = max(1, shown.height - 1)
    steps = {
        "up": -1, "k": -1, "down": 1, "j": 1, "page_up": -page, "page_down": page, " ": page,
        "home": -(10**9), "g": -(10**9), "end": 10**9, "G": 10**9,
    }  # fmt: skip
    step = steps.get(key)
    if step is None:
        return None
    if shown.table is None:
        return settle(replace(look, offset=look.offset + step), shown)
    if not shown.rows:
        return look
    at = max(0, min(len(shown.rows) - 1, shown.position(look.selected) + step))
    return settle(replace(look, selected=shown.table.key(shown.rows[at])), shown)


def _command(state: TopState, key: str, shown: Shown) -> TopState:
    match key:
        case "q" | "?" | "h":
            return replace(state, done=key == "q", helping=key != "q")
        case "enter" | "right" | "l":
            return _enter(state, shown)
        case "escape" | "left" | "backspace":
            return _leave(state)
        case "/" | "s" | "S" if shown.table is not None:
            look = state.look if key == "/" else _sort(state.look, shown.table, reverse=key == "S")
            return replace(state, look=look, typing=key == "/")
        case "p" | "R":
            return _act(state, key, shown)
        case "tab" | "back_tab":
            return _next_tab(state, 1 if key == "tab" else -1)
    if key.isdecimal() and len(key) == 1 and (place := state.place.tab(int(key))) is not None:
        return _go(state, place, keep=False)
    return state


def _enter(state: TopState, shown: Shown) -> TopState:
    row = _selected(state, shown)
    if row is None:
        return state
    place = inside(state.place, row)
    if place is None:
        return say(state, "there is nothing inside of it here: see `aiqueue inspect` and `aiqueue inbox ls`")
    return _go(state, place)


def _go(state: TopState, place: Place, *, keep: bool = True) -> TopState:
    """Go to a place. A tab replaces the one that was looked at: Escape goes up, not through all tabs."""
    if place == state.place:
        return state
    if not keep and state.before and state.before[-1].place == place:
        return _leave(state)
    before = (*state.before, state.look) if keep or not state.before else state.before
    return replace(state, look=Look(place, sort=place.default_sort), before=before)


def _leave(state: TopState) -> TopState:
    if state.look.wanted:
        return replace(state, look=replace(state.look, wanted=""))
    if not state.before:
        return say(state, "this is the outermost view: q quits")
    return replace(state, look=state.before[-1], before=state.before[:-1])


def _next_tab(state: TopState, step: int) -> TopState:
    tabs = state.place.tabs
    at = tabs.index(state.place.pane) + step if state.place.pane in tabs else 0
    place = state.place.tab(at % len(tabs) + 1)
    assert place is not None
    return _go(state, place, keep=False)


def _sort(look: Look, table: Table, *, reverse: bool) -> Look:
    if reverse:
        return replace(look, reverse=not look.reverse)
    names = table.sorts()
    at = names.index(look.sort) if look.sort in names else 0
    return replace(look, sort=names[(at + 1) % len(names)], reverse=False, offset=0, selected="")


def _selected(state: TopState, shown: Shown) -> Any:
    return shown.rows[shown.position(state.look.selected)] if shown.table is not None and shown.rows else None


def _act(state: TopState, key: str, shown: Shown) -> TopState:
    """Ask whether to pause, resume or replay what is selected."""
    if not shown.current:
        return say(state, "not now: what is shown is not current", is_bad=True)
    if shown.table is None:
        place = state.place
        target = RowTarget(place.family, place.tenant, seq=shown.dead_seq, name=place.item) if place.family else None
        target = target if place.pane == "job" else None
    else:
        row = _selected(state, shown)
        target = None if row is None else target_of(state.place, row)
    if target is None:
        return say(state, "there is nothing to pause or to replay here")
    act = _pause_of(target) if key == "p" else _replay_of(state.place, target)
    if act is None:
        return say(state, "only dead letters can be replayed: this job is none")
    if act.name == "count":
        return replace(state, act=act, said="counting dead letters …")
    return ask(state, act)


def _pause_of(target: RowTarget) -> TopAct:
    if target.pause is not None:
        return TopAct("resume", *target.pause.scope)
    return TopAct("pause", target.family, target.tenant, target.kind, target.key)


def _replay_of(place: Place, target: RowTarget) -> TopAct | None:
    if place.pane in ("jobs", "dead", "job"):
        return (
            TopAct("replay_one", target.family, target.tenant, seq=target.seq, item=target.name) if target.seq else None
        )
    return TopAct("count", target.family, target.tenant, target.kind)
