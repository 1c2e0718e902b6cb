"""The figures of measurements: their one form, the table, the page, the pictures, and the words that ask for them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import aiqueue
from aiqueue import codec, headers
from benchmarks import agents, common, drain, guide, machine, page, targets, whole
from benchmarks.__main__ import main
from benchmarks.questions import ALL, OWN, ROWS, TEXTS
from benchmarks.raw import body
from benchmarks.report import OURS, RAW, STOCK, TUNED, Row, faults, figure, kin, plain, spread, table
from benchmarks.results import Asked, Results

from ..support import ROOT

pictures = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="only `make bench` has matplotlib")


def some_rows() -> list[Row]:
    """Rows of every kind that the page and the pictures know; the figures mean nothing."""
    peers = {OURS: [9.0, 8.0], RAW: [10.0], "huey": [12.0], "Celery, Redis": [11.0], "SAQ": [3.0, 4.0], "gone": []}
    return [
        Row("targets", "queuing, p95", "ms", {OURS: [4.0, 6.0, 9.0]}, how={OURS: "x"}, limit=5.0),
        Row("targets", "tracing", "%", how={OURS: "not built"}, limit=5.0),
        Row("targets", "rate", "/s", {OURS: [200.0]}, limit=100.0),
        Row("peers", "drain, one worker", "/s", peers, how={"huey": "8 threads", "gone": "FAILED: no answer"}),
        Row("peers", "latency at 200/s, p50", "ms", {OURS: [1.0], "SAQ": [0.5]}),
        Row("peers", "CPU of 10,000 jobs, worker", "CPU s", {OURS: [1.0], "SAQ": [2.0]}),
        Row("peers", "CPU of 10,000 jobs, all", "CPU s", {OURS: [1.5], "SAQ": [3.0]}),
        Row("drain", "drain, one | worker", "/s", {OURS: [1.0], RAW: [2.0]}, how={RAW: "fetch(100)"}),
        Row("tenants", "drain, 1 tenants active", "/s", {"shared lane": [5.0, 6.0]}, x=1),
        Row("tenants", "drain, 1,000 tenants active", "/s", {"shared lane": [4.0], OURS: [3.0]}, x=1_000),
        Row("durability", "drain of one worker, R1 sync always", "/s", {OURS: [1.0]}),
    ]


def some_results() -> Results:
    asked = Asked(3, 10_000, "2026-01-02", 12.0, {"cpus": 2, "python": "3.11"}, {"RQ": "there is no redis-server"})
    return Results(some_rows(), {"peers": asked}, {"payload": "not done after 9 s"})


def test_rows_go_through_json_and_come_back_as_they_were() -> None:
    rows = some_rows()
    told = json.loads(json.dumps(plain(rows)))
    assert [Row.read(each) for each in told["rows"]] == rows
    assert told["machine"]["cpus"]
    assert "aiqueue" in told["machine"]["versions"]


@pytest.mark.parametrize("wrong", [{}, {"question": "a", "name": "b", "unit": "s", "sides": {"x": ["y"]}}, {"a": 1}])
def test_what_is_no_row_is_refused_in_one_line(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not a row") as refused:
        Row.read(wrong)
    assert "\n" not in str(refused.value)


def test_a_limit_is_a_ceiling_or_for_rates_a_floor() -> None:
    late, absent, rate = some_rows()[:3]
    assert (late.met, late.demand) == (False, "at most 5 ms")
    assert absent.met is None
    assert (rate.met, rate.demand) == (True, "at least 100 /s")


def test_figures_have_the_digits_that_say_something() -> None:
    assert [figure(each, "ms") for each in (12.345, 0.0213, 0.00213, 0.0)] == ["12.35", "0.021", "0.00213", "0.00"]
    assert figure(12_345.6, "/s") == "12,346"
    assert spread([3.0, 1.0, 2.0], "s") == "2.00 [1.00-3.00]"


def test_a_ratio_with_a_side_that_is_missing_or_zero_is_none() -> None:
    row = Row("q", "n", "ms", {OURS: [1.0], "zero": [0.0], "none": []})
    assert [row.ratio(side) for side in ("zero", "none", "gone")] == [None, None, None]
    assert page.ahead(row, "zero") is None
    assert page.ahead(Row("q", "n", "ms", {OURS: [1.0], RAW: [2.0]}), RAW) == 2.0
    assert page.ahead(Row("q", "n", "/s", {OURS: [1.0], RAW: [2.0]}), RAW) == 0.5


def test_rows_of_one_curve_share_a_name() -> None:
    assert kin(Row("q", "drain with 1,000 of 11,000 jobs", "/s", x=1_000)) == "drain with N of 11,000 jobs"
    assert kin(Row("q", "drain, p95", "/s")) == "drain, p95"


def test_the_table_has_every_side_and_says_what_is_not_met_or_has_no_figure() -> None:
    lines = table(some_rows()).splitlines()
    assert "targets: queuing, p95 (at most 5 ms)  NOT met" in lines
    assert any(line.split() == [OURS, "-", "not", "built"] for line in lines)
    assert any(line.split()[:1] == ["gone"] and "FAILED" in line for line in lines)


def test_the_page_says_where_we_are_behind_what_failed_and_what_was_skipped() -> None:
    told = page.markdown(some_results(), {"throughput": "rates"})
    behind = told.partition("## The guide's targets")[0]
    assert "latency at 200/s, p50, SAQ (0.50)" in behind
    assert "queuing, p95" in behind
    assert "huey" not in behind  # it acknowledges nothing
    assert "| tracing | at most 5 % | - | not built |" in told
    assert "| drain, one worker | SAQ |" in told
    assert "drain, one \\| worker" in told
    assert "- RQ was skipped: there is no redis-server" in told
    assert "- payload: not done after 9 s" in told
    assert "- start: not measured" in told
    assert "![rates](throughput.png)" in told
    assert "latency.png" not in told  # a picture that was not drawn


@pytest.mark.parametrize(("question", "rate"), [("drain", 2.4), ("many", 2.1)])
def test_a_run_whose_bare_loop_is_too_slow_is_not_valid_and_says_why(question: str, rate: float) -> None:
    slow = Row(question, "all", "/s", {OURS: [1.0], STOCK: [1.0, 1.0], TUNED: [rate, rate]})
    (told,) = faults([slow])
    assert told.startswith(
        f"the run of {question} is not valid: in 'all' the bare loop is only {rate:.2f} times as fast"
    )
    assert table([slow]).splitlines()[-1] == told
    top, _, rest = page.markdown(Results([slow]), {}).partition("## Where aiqueue is not ahead")
    assert f"**{told}.**" in top.splitlines()
    assert f"**{told}.**" in rest.partition(f"## {ALL[question].title}")[2].splitlines()


def test_a_run_is_valid_with_a_fast_bare_loop_and_where_there_is_none() -> None:
    fast = Row("drain", "all", "/s", {STOCK: [1.0], TUNED: [2.6]})
    assert faults([fast, *some_rows(), Row("enqueue", "all", "/s", {STOCK: [1.0], TUNED: [1.1]})]) == []
    assert "not valid:" not in page.markdown(Results([fast]), {})


def test_the_page_names_the_interpreter_its_build_the_loop_and_the_server() -> None:
    told = {**machine.machine(), "nats_server": "2.99.1"}
    results = some_results()
    results.asked["drain"] = Asked(1, 10, "2026-01-02", 1.0, told)
    older, newer = page.markdown(results, {}).partition("## The machine\n\n")[2].splitlines()[:2]
    assert older.startswith("- peers: 2 CPUs")
    assert older.endswith(", Python 3.11; ")
    assert f"{platform.python_implementation()} {platform.python_version()} ({platform.python_compiler()}" in newer
    assert f"event loop {told['event_loop']}, nats-server 2.99.1; aiqueue " in newer
    assert machine.machine()["nats_server"].startswith("2.")


@pytest.mark.parametrize(
    ("configured", "optimizations", "lto"),
    [
        (None, None, None),
        ("", False, False),
        ("'--prefix=/usr' '--enable-optimizations' '--with-lto=thin'", True, True),
        ("--enable-optimizations=no --without-lto", False, False),
        ("'CFLAGS=-DNAME=--enable-optimizations' --with-lto", False, True),
    ],
)
def test_how_an_interpreter_was_built_is_read_from_its_configure(
    configured: str | None, optimizations: bool | None, lto: bool | None
) -> None:
    built = machine.built(configured)
    assert built == {"optimizations": optimizations, "lto": lto}
    told = machine.interpreter({"implementation": "CPython", "python": "3.13.1", "compiler": "GCC 13", **built})
    assert told.startswith("CPython 3.13.1 (GCC 13")
    assert ("slower" in told) == (optimizations is False)


def test_the_page_of_nothing_says_so() -> None:
    told = page.markdown(Results(), {}, ["all pictures: nothing to draw"])
    assert "Nothing has been measured yet." in told
    assert "- all pictures: nothing to draw" in told


def test_results_are_kept_and_a_question_asked_again_replaces_its_own(tmp_path: Path) -> None:
    results = some_results()
    results.write(tmp_path / "deep" / "results.json")
    again = Results.read(tmp_path / "deep" / "results.json")
    assert again == results
    row = Row("peers", "drain, one worker", "/s", {OURS: [1.0]})
    again.failed["peers"] = "no"
    again.put("peers", [row], Asked(1, 10, "2026-01-03", 1.0))
    assert again.of("peers") == [row]
    assert again.of("drain") == results.of("drain")
    assert "peers" not in again.failed


@pytest.mark.parametrize("text", ["", "[]", '{"rows": 1}', '{"rows": [{}], "asked": {}, "failed": {}}'])
def test_a_file_that_holds_no_results_is_refused_in_one_line(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        whole.report(["--from", str(tmp_path / "results.json"), "--out", str(tmp_path)])
    assert len(capsys.readouterr().err.splitlines()) == 1


@pictures
def test_the_same_rows_give_the_same_pictures_and_a_picture_whose_rows_are_gone_goes_too(tmp_path: Path) -> None:
    plots = importlib.import_module("benchmarks.plots")
    one, two = tmp_path / "one", tmp_path / "two"
    for place in (one, two):
        place.mkdir()
        drawn, left = plots.draw(some_rows(), place)
        assert {*drawn} == {"throughput", "latency", "cost", "raw", "tenants", "durability"}
        assert len(left) == 2  # backlog and payload have no rows
    assert {path.name: path.read_bytes() for path in one.iterdir()} == {
        path.name: path.read_bytes() for path in two.iterdir()
    }
    drawn, left = plots.draw([], two)
    assert not drawn
    assert len(left) == 8
    assert not [*two.iterdir()]


@pytest.mark.parametrize(
    "words",
    [["nonsense"], ["drain", "--rounds", "0"], ["drain", "--jobs", "many"], ["cancel", "--json"],
     ["all", "--only", "nonsense"], ["report", "--from", "nowhere.json"]],
)  # fmt: skip
def test_a_wrong_question_is_a_one_line_error(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
    try:
        code: object = main()
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr()
    assert code == 2
    assert said.out == ""
    assert len(said.err.splitlines()) == 1, said.err


def test_without_a_question_there_is_help_that_names_them_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    assert main() == 0
    said = capsys.readouterr().out
    assert [name for name in [*ALL, *TEXTS, *OWN, "all", "report"] if name not in said] == []


def test_a_question_answers_in_json() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "enqueue", "--rounds", "1", "--jobs", "60", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (row,) = [Row.read(each) for each in json.loads(done.stdout)["rows"]]
    assert {*row.sides} == {OURS, RAW, TUNED}


def test_a_question_whose_module_fails_is_told_and_the_older_figures_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(words: list[str], *, within_s: float) -> str:
        raise RuntimeError("59 of 60 jobs ran, in 59 runs")

    monkeypatch.setattr(whole, "_output", broken)
    results = some_results()
    assert not whole.ask(results, "drain", 1, 60, "[1/1]")
    assert results.failed["drain"] == "59 of 60 jobs ran, in 59 runs"
    assert "(the figures above are older)" in page.markdown(results, {})


def test_a_job_that_is_missing_or_ran_twice_is_an_error_and_no_figure(tmp_path: Path) -> None:
    file = tmp_path / "records"
    file.write_bytes(b"".join(drain.RECORD.pack(0.0, float(i), i) for i in range(4)))
    assert drain.rate(file, 4) == 1.0
    for numbers in ((0, 1, 3), (0, 1, 1, 3), (0, 1, 2, 2, 3)):
        file.write_bytes(b"".join(drain.RECORD.pack(0.0, float(i), i) for i in numbers))
        with pytest.raises(RuntimeError, match="of 4 jobs ran"):
            drain.rate(file, 4)


async def test_the_raw_side_stores_what_aiqueue_stores(tmp_path: Path) -> None:
    async with aiqueue.connect(directory=tmp_path) as client:
        message = common.message(1, 2.0)
        await client.enqueue(message, tenant="bench")
        await client.inboxes.send(message, tenant="bench", to="raw", sender="sender")
        raw = await common.raw_client(client)
        for subject, body, told in (common.raw_job(1, 2.0), agents.raw_mail(1, 2.0)):
            await raw.jetstream().publish(subject, body, headers=told)
        await raw.close()
        for stream in (common.STREAM, agents.STREAM):
            ours, theirs = [await client.connection.get(stream, seq) for seq in (1, 2)]
            assert ours is not None
            assert theirs is not None
            assert {*ours.headers} == {*theirs.headers}
            assert (ours.subject, ours.data) == (theirs.subject, theirs.data)


def test_a_body_without_a_typed_message_is_the_same() -> None:
    assert body(3, 2.5) == codec.encode(common.message(3, 2.5))


async def test_a_backlog_with_a_deadline_has_that_one_header_more(tmp_path: Path) -> None:
    async with aiqueue.connect(directory=tmp_path) as client:
        await client.enqueue(common.message(0), tenant="bench", deadline=drain.DEADLINE_S)
        await drain.fill(client, 1, first=False)
        await drain.fill(client, 1, first=False, deadline_s=drain.DEADLINE_S)
        ours, plain_job, theirs = [await client.connection.get(common.STREAM, seq) for seq in (1, 2, 3)]
        assert ours is not None
        assert plain_job is not None
        assert theirs is not None
        assert {*theirs.headers} == {*ours.headers} == {*plain_job.headers, headers.DEADLINE}
        assert abs(int(theirs.headers[headers.DEADLINE]) - int(ours.headers[headers.DEADLINE])) < 60_000
        assert await drain.ours(client, 3) > 0


@pytest.mark.slow
async def test_processes_get_more_jobs_than_this_one_and_the_rows_say_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drain, "LONGER", 2)
    async with aiqueue.connect(directory=tmp_path) as client:
        measured = await drain.run(client, rounds=1, jobs=100)
    assert all(rate > 0 for row in measured for rates in row.sides.values() for rate in rates)
    rows = {row.name: {*row.sides} for row in measured}
    assert rows["drain, one worker in this process"] == {OURS, RAW, STOCK, TUNED}
    assert rows["drain of jobs with a deadline, one worker in this process"] == {OURS, RAW}
    assert rows["drain, two worker processes, 200 jobs"] == {OURS, RAW, TUNED}


async def test_the_guides_targets_are_measured_on_its_families(tmp_path: Path) -> None:
    async with aiqueue.connect(directory=tmp_path) as client:
        for key in targets.FAMILIES:
            assert await targets.throughput(client, key, 50, result=key == "gateway") > 0
        codec = targets.Codec(client, "2 KB")
        codec.measure()
        assert all(row.limit for row in codec.rows.values())
        assert all(
            codec.rows[key].sides[OURS][0] > 0 for key in ("encode", "decode", "guide")
        )  # "more" is a difference
        assert targets.tracing().met is None


@pytest.mark.slow
async def test_the_guides_client_is_measured_on_each_of_its_topics(tmp_path: Path) -> None:
    async with aiqueue.connect(directory=tmp_path) as client:
        for key, pace in (("mail", "paced"), ("gateway", "many"), ("ingest", "one")):
            for measure in (guide.ours, guide.theirs):
                came, waits = await measure(client, key, pace, 20)
                assert sorted(came) == list(range(20))
                assert len(waits) == 20
                assert all(0 < began - sent < 60 for sent, began in came.values())


async def test_the_guides_client_is_measured_beside_the_typed_calls(tmp_path: Path) -> None:
    async with aiqueue.connect(directory=tmp_path) as client:
        rows = {row.name: row for row in await guide.beside_typed(client, rounds=2, jobs=30)}
    for name, row in rows.items():
        if row.limit is None:
            assert {side: len(figures) for side, figures in row.sides.items()} == {OURS: 2, guide.TYPED: 2}
        else:
            rates = rows[name.partition(": ")[0]].sides
            costs = [(typed / bus - 1) * 100 for bus, typed in zip(rates[OURS], rates[guide.TYPED], strict=True)]
            assert row.sides[OURS] == pytest.approx(costs)
            assert (row.demand, row.unit) == ("at most 15 %", "%")


def test_the_page_says_what_is_demanded_of_a_row_and_what_each_side_does() -> None:
    how = {OURS: "publish", RAW: "js.publish"}
    rows = [
        Row("guide", "mail, p95", "ms", {OURS: [1.0], RAW: [0.5]}, how=how, limit=2.0),
        Row("guide", "requests, p95", "ms", {OURS: [3.0], RAW: [0.5]}, how=how, limit=2.5),
        Row("guide", "requests, p50", "ms", {OURS: [1.0], RAW: [0.5]}, how=how),
    ]
    told = page.section("guide", Results(rows), {})
    for each in (
        "| mail, p95 | 1.00 ms | 0.50 ms | 0.50 | at most 2 ms: met |",
        "| requests, p95 | 3.00 ms | 0.50 ms | 0.17 | at most 2.5 ms: **not met** |",
        "| requests, p50 | 1.00 ms | 0.50 ms | 0.50 | - |",
        "- aiqueue: publish",
    ):
        assert each in told.splitlines()


def test_every_question_has_a_sentence_and_a_time() -> None:
    for name in ROWS:
        assert ALL[name].about.endswith(".")
        assert whole.expected_s(name, rounds=1, jobs=10) > 0
