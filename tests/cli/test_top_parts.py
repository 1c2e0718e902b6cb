"""The parts of `top` that need neither a server nor a terminal: keys, tables, rates, what a key changes, and frames."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from aiqueue.cli.live.keys import KeyDecoder
from aiqueue.cli.live.styled import crop, fold
from aiqueue.cli.options import add_watch_value
from aiqueue.cli.top.acts import TopAct
from aiqueue.cli.top.figures import FamilyRow, Figures, KindRow, KnownAges, OutcomeRates, RecentRates
from aiqueue.cli.top.frame import draw_frame, draw_plain
from aiqueue.cli.top.panes import number, rate, table_of
from aiqueue.cli.top.place import Place
from aiqueue.cli.top.state import Look, Shown, TopState, press, settle
from aiqueue.cli.top.table import Table, TopField
from aiqueue.inspect import FamilyStats, LaneStats, ListedJob, RunningJob, WorkerStats
from aiqueue.lanes import Pause
from aiqueue.metrics import JobSums, Point, Series

from .terminals import cells_of

NOW = 1_800_000_000
EVIL = "\x1b[2J\x1b]0;t\x07\x9b31m\u202egnp\r\n\x00"


class TestKeyDecoder:
    def test_sequences_are_keys_also_in_two_parts(self) -> None:
        keys = KeyDecoder()
        assert keys.feed(b"a\x1b[A\x1b[5~\x1bOB\r\x7f\xc3\xa9") == [
            "a",
            "up",
            "page_up",
            "down",
            "enter",
            "backspace",
            "é",
        ]
        assert keys.feed(b"\x1b[") == []
        assert keys.waits
        assert keys.feed(b"6~\xc3") == ["page_down"]
        assert keys.feed(b"\xa9") == ["é"]

    def test_a_lone_escape_is_a_key_once_nothing_follows(self) -> None:
        keys = KeyDecoder()
        assert keys.feed(b"\x1b") == []
        assert keys.flush() == ["escape"]
        assert keys.flush() == []
        assert keys.feed(b"\x1bx") == ["escape", "x"]

    def test_unknown_sequences_and_control_characters_are_no_keys(self) -> None:
        assert KeyDecoder().feed(b"\x1b[<0;3;4M\x1b[200~\x00\x01\x1b[1;5A") == ["up"]


class TestStyledLines:
    def test_a_line_is_cut_and_folded_by_its_cells_and_its_colour_goes_on(self) -> None:
        assert crop("abcdef", 3) == "abc"
        assert fold("\x1b[31mabcdef\x1b[0mgh", 4) == ["\x1b[31mabcd\x1b[0m", "\x1b[31mef\x1b[0mgh"]
        assert fold("\uff21\uff22\uff23", 4) == ["\uff21\uff22", "\uff23"]
        assert crop("\x1b[1mab\x1b[0m", 10) == "\x1b[1mab\x1b[0m"


class TestRates:
    def series(self, *minutes: tuple[int, int], length_s: float = 60.0) -> Series:
        points = [
            Point(NOW + 60 * at, 60.0, 1, JobSums(done=done, dead=failed)) for at, (done, failed) in enumerate(minutes)
        ]
        points[-1] = points[-1]._replace(length_s=length_s)
        return Series("agent.tasks", "", tuple(points))

    def test_at_first_they_are_those_of_the_last_minute(self) -> None:
        rates = RecentRates()
        rates.update(self.series((600, 0), (30, 6), length_s=30.0), NOW)
        assert rates.now == (330 / 60, 6 / 60)

    def test_then_those_of_what_has_come_in_the_last_15_seconds(self) -> None:
        rates = RecentRates()
        for step in range(6):
            rates.update(self.series((600, 0), (step * 50, step * 5), length_s=5.0 * step), NOW + 5.0 * step)
        assert rates.now == (10.0, 1.0)

    def test_minutes_that_are_too_old_take_nothing_away(self) -> None:
        rates = RecentRates()
        both = self.series((6_000, 0), (100, 0))
        rates.update(both, NOW)
        rates.update(both._replace(points=(both.points[1]._replace(sums=JobSums(done=200)),)), NOW + 10)
        assert rates.now.done == 10.0

    def test_nothing_is_known_where_no_worker_has_reported(self) -> None:
        rates = RecentRates()
        rates.update(Series("agent.tasks", "", (Point(NOW, 60.0, 0, None),)), NOW)
        assert rates.now == (None, None)


class TestKnownAges:
    def test_lanes_that_were_not_read_are_sorted_by_what_is_known_of_them(self) -> None:
        ages = KnownAges()
        assert [each.oldest_age_s for each in ages.fill([lane("a", oldest_age_s=5.0)], 100.0)] == [5.0]
        unread = [lane("a", oldest_age_s=None), lane("b", oldest_age_s=None), lane("a", oldest_age_s=None, pending=0)]
        assert [each.oldest_age_s for each in ages.fill(unread, 110.0)] == [15.0, None, None]

    def test_all_are_read_every_15_seconds(self) -> None:
        ages = KnownAges()
        assert [ages.begin_all(now) for now in (100.0, 102.0, 114.9, 115.0, 117.0)] == [True, False, False, True, False]


class TestCells:
    @pytest.mark.parametrize(
        ("value", "text"),
        [(None, "-"), (0, "0"), (99_999, "99,999"), (123_456, "123k"), (1_234_567, "1.2M"), (123_456_789, "123M")],
    )
    def test_a_count_has_at_most_six_characters(self, value: int | None, text: str) -> None:
        assert number(value) == text
        assert len(text) <= 6

    @pytest.mark.parametrize(
        ("value", "text"),
        [(None, "-"), (0, "0"), (0.001, "<0.01"), (0.02, "0.02"), (1.26, "1.3"), (12.4, "12"), (45_678.0, "45,678")],
    )
    def test_a_rate_is_as_precise_as_it_is_small(self, value: float | None, text: str) -> None:
        assert rate(value) == text


def letters(*rows: tuple[str, int | None]) -> Table:
    fields = [
        TopField("name", lambda row: row[0], lambda row: row[0], right=False, low=True, grows=True),
        TopField("size", lambda row: number(row[1]), lambda row: row[1]),
        TopField("extra", lambda _: "x" * 10, drop=1),
    ]
    return Table(fields, rows, lambda row: row[0], lambda row: row[0], "none")


class TestTable:
    table = letters(("b", 1), ("a", None), ("c", 3))

    def names(self, sort: str, reverse: bool = False, wanted: str = "") -> str:
        return "".join(row[0] for row in self.table.arrange(sort, reverse, wanted))

    def test_it_is_sorted_by_a_column_and_what_has_no_value_is_last(self) -> None:
        assert self.names("") == "bac"
        assert self.names("", reverse=True) == "cab"
        assert self.names("name") == "abc"
        assert self.names("name", reverse=True) == "cba"
        assert self.names("size") == "cba"
        assert self.names("size", reverse=True) == "bca"

    def test_it_is_filtered_whatever_the_case(self) -> None:
        assert self.names("", wanted="A") == "a"
        assert self.names("", wanted="zzz") == ""

    def test_columns_are_left_out_before_names_are_cut_much(self) -> None:
        table = letters(("a-long-name-of-a-tenant", 1))
        header, _ = table.render(table.rows, 80)
        assert header.split() == ["name", "size", "extra"]
        header, lines = table.render(table.rows, 20)
        assert header.split() == ["name", "size"]
        assert len(lines[0]) <= 20
        assert "…" in lines[0]


def shown(*names: str, height: int = 3) -> Shown:
    table = letters(*((name, 1) for name in names))
    return Shown(table, table.rows, height=height)


class TestKeys:
    def press(self, keys: str | list[str], state: TopState | None = None, of: Shown | None = None) -> TopState:
        state = state or TopState(Look(Place("lanes", "agent.tasks")))
        for key in keys:
            state = press(state, key, of or shown("a", "b", "c", "d", "e"))
        return state

    def test_the_selection_moves_and_stays_visible(self) -> None:
        assert self.press("jj").look.selected == "c"
        moved = self.press("jjj").look
        assert (moved.selected, moved.offset) == ("d", 1)
        assert self.press("G").look.offset == 2
        assert self.press("Gg").look.offset == 0
        assert self.press("kkk").look.selected == "a"

    def test_the_selection_stays_with_its_row_when_the_order_changes(self) -> None:
        look = settle(Look(selected="a"), shown("e", "d", "c", "b", "a"))
        assert (look.selected, look.offset) == ("a", 2)
        assert settle(look, shown("x", "y")).selected == "x"
        assert settle(look, shown()).offset == 0

    def test_a_filter_is_typed_kept_and_ended(self) -> None:
        typed = self.press("/qp")
        assert (typed.typing, typed.look.wanted, typed.done) == (True, "qp", False)
        kept = self.press(["enter"], typed)
        assert (kept.typing, kept.look.wanted) == (False, "qp")
        assert self.press(["escape"], kept).look.wanted == ""
        assert self.press(["backspace"], typed).look.wanted == "q"
        assert self.press(["escape"], typed).typing is False

    def test_views_replace_each_other_and_escape_leads_up(self) -> None:
        state = self.press("2", TopState())
        assert state.place == Place("jobs")
        state = self.press("3", state)
        assert (state.place.pane, len(state.before)) == ("dead", 1)
        assert self.press(["escape"], state).place == Place("families")
        assert self.press("1", state) == TopState()
        assert self.press(["back_tab"], TopState()).place.pane == "pauses"
        assert self.press("9", TopState()) == TopState()

    def test_only_y_carries_out_what_was_asked(self) -> None:
        asked = TopState(asked=TopAct("pause", "agent.tasks", "acme"))
        assert self.press("y", asked).act == TopAct("pause", "agent.tasks", "acme")
        for key in ("n", "enter", "escape", "q", " "):
            answered = self.press([key], asked)
            assert (answered.act, answered.asked, answered.done) == (None, None, False)

    def test_nothing_is_asked_about_figures_that_are_not_current(self) -> None:
        old = replace(shown("a"), current=False)
        state = self.press("p", of=old)
        assert (state.asked, state.is_bad) == (None, True)


def lane(tenant: str = "acme", **more: Any) -> LaneStats:
    given = {
        "pending": 5, "in_flight": 1, "oldest_age_s": 3.0, "pulls": 1, "redelivered": 0, "limit": 100_000,
        "in_flight_limit": 10, "consumer": True,
    }  # fmt: skip
    return LaneStats("agent.tasks", tenant, "normal", **{**given, **more})


def job(text: str, **more: Any) -> ListedJob:
    given = {
        "stream": "S",
        "seq": 7,
        "enqueued_at": float(NOW),
        "payload": {text: [text]},
        "error": text,
        "reason": text,
    }
    return ListedJob(text, "agent.tasks", text, "normal", text, "failed", **{**given, "failed_at": float(NOW), **more})


def worker(text: str) -> WorkerStats:
    running = RunningJob("agent.tasks", text, "normal", 1, text, text, 1.5)
    return WorkerStats(
        text, "stalled", text, 1, text, NOW, NOW, 8, 1, 0, 5, 3, ("agent.tasks", text), {text: (text,)}, (text,),
        (running,), 2**20, blocked_at=text, stalled_s=4.0,
    )  # fmt: skip


def figures_of(place: Place, text: str = "name") -> Figures:
    points = tuple(
        Point(NOW + 60 * at, 60.0, 1, JobSums(done=at, dead=1, runs={1: 2}, waits={0: 1})) for at in range(60)
    )
    series = Series("agent.tasks", text, points)
    rates = OutcomeRates(12.5, 0.1)
    stats = FamilyStats(
        "agent.tasks", "AI", pending=1_234_567, in_flight=3, oldest_age_s=99_999.0, rate_in=3.0, dead=9, parked=4
    )
    gone = FamilyStats("lost.family", text, missing=True)
    pauses = (Pause("agent.tasks", text, text, NOW, text, text, NOW + 60.0),)
    return Figures(
        place, "nats://127.0.0.1:4222",
        (FamilyRow(stats, series, rates, 2), FamilyRow(gone, None, OutcomeRates(), None)), (worker(text),),
        (lane(text), lane("*", key_hash="0a1b2c3d4e", key=text, limit_key="model")),
        (job(text), job("other", seq=8)), True,
        (KindRow(series, series.sums, rates),), pauses, worker(text) if place.pane == "worker" else None,
        notes={"history": text},
    )  # fmt: skip


PLACES = [
    Place("families"), Place("lanes", "agent.tasks"), Place("jobs"), Place("jobs", "agent.tasks", "acme", "normal"),
    Place("dead"), Place("workers"), Place("kinds"), Place("pauses"), Place("worker", item="w"),
]  # fmt: skip


def frame_of(place: Place, size: tuple[int, int], text: str = "name", problem: str = "", **more: Any) -> list[str]:
    state = TopState(Look(place))
    return draw_frame(
        replace(state, **more), figures_of(place, text), problem, *size, interval_s=2.0, colour=False
    ).lines


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place.pane} of {place.scope}")
class TestFrame:
    @pytest.mark.parametrize("size", [(80, 24), (200, 50), (40, 10), (20, 5)])
    def test_it_fits_into_any_size(self, place: Place, size: tuple[int, int]) -> None:
        lines = frame_of(place, size)
        assert len(lines) == size[1]
        assert max(map(cells_of, lines)) <= size[0]

    def test_hostile_names_and_texts_are_escaped(self, place: Place) -> None:
        for size in ((80, 24), (400, 60)):
            lines = [
                *frame_of(place, size, EVIL, EVIL),
                *frame_of(place, size, EVIL),
                *frame_of(place, size, EVIL, said=EVIL),
            ]
            assert not re.search("[\x00-\x1f\x7f-\x9f\u202e]", "".join(lines))
        if place.pane != "worker":
            plain = draw_plain(place, figures_of(place, EVIL), "", None)
            assert not re.search("[\x00-\x1f\x7f-\x9f\u202e]", "".join(plain))

    def test_figures_that_are_not_current_are_called_so(self, place: Place) -> None:
        assert "!! no connection since" in "\n".join(frame_of(place, (80, 24), problem="no connection since 12:00:00"))
        if place.pane != "worker":
            (line,) = draw_plain(place, figures_of(place), "no connection since 12:00:00", 80)
            assert line.endswith("no connection since 12:00:00")


def test_figures_of_another_place_are_not_shown() -> None:
    state = TopState(Look(Place("lanes", "agent.tasks")))
    frame = draw_frame(state, figures_of(Place("families")), "", 80, 24, interval_s=2.0, colour=False)
    assert "reading …" in frame.lines
    assert not any("1.2M" in line for line in frame.lines)


def test_a_question_is_read_whole_on_a_narrow_terminal() -> None:
    act = TopAct("pause", "agent.tasks", "a-tenant-with-a-long-name", "a.kind.with.a.long.name")
    lines = frame_of(Place("families"), (60, 20), asked=act)
    assert " ".join(" ".join(lines[-4:-1]).split()).endswith(act.question)
    assert lines[-1] == "y: yes   any other key: no"


def test_a_busy_worker_serves_a_lane_that_none_of_its_pulls_is_open_for() -> None:
    place = Place("lanes", "agent.tasks")
    idle = lane(in_flight=0, pulls=0)
    busy = replace(worker("w"), tenants=None, running=8)
    for workers, said in (((busy,), "busy"), ((replace(busy, running=1),), "none"), ((), "none")):
        table = table_of(Figures(place, lanes=(idle,), workers=workers))
        _, (line,) = table.render(table.rows, 100)
        assert line.endswith(said)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--watch"], ["--watch=2"]),
        (["--watch", "5"], ["--watch", "5"]),
        (["--watch", "0.5s", "agent.tasks"], ["--watch", "0.5s", "agent.tasks"]),
        (["--watch", "agent.tasks"], ["--watch=2", "agent.tasks"]),
        (["--watch", "--json"], ["--watch=2", "--json"]),
        (["--watch=3"], ["--watch=3"]),
        (["--", "--watch"], ["--", "--watch"]),
    ],
)
def test_watch_has_a_value_of_its_own_where_none_is_given(given: list[str], meant: list[str]) -> None:
    assert add_watch_value(given) == meant
