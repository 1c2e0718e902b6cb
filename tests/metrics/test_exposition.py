"""The text that Prometheus reads, without a server."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiqueue.metrics import Counts, Exposition, JobSums, MonotonicTotals

RUN = "aiqueue_job_run_seconds"
SAMPLE = re.compile(
    r'(?P<name>[a-z_]+)(?:\{(?P<labels>(?:[a-z]+="(?:[^"\\\n]|\\["\\n])*",?)*)\})? (?P<value>[0-9.e+-]+)'
)


def samples(text: str) -> dict[str, float]:
    """The samples of a text by name and labels. Fails for what is no sample, and for one that is there twice."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("#"):
            assert re.fullmatch(r"# (HELP [a-z_]+ .+|TYPE [a-z_]+ (gauge|counter|histogram))", line)
            continue
        match = SAMPLE.fullmatch(line)
        assert match, line
        key = line.rpartition(" ")[0]
        assert key not in found, line
        found[key] = float(match["value"])
    return found


def test_a_metric_has_its_help_and_type_once_and_its_samples_together() -> None:
    text = Exposition()
    text.add("aiqueue_jobs_waiting", 3, family="agent.tasks")
    text.add("aiqueue_up", 1, source="queues")
    text.add("aiqueue_jobs_waiting", 0.5, family="b.c")
    assert text.render().splitlines() == [
        "# HELP aiqueue_up Whether a source was read: queues, workers, history. If not, it has no series.",
        "# TYPE aiqueue_up gauge",
        'aiqueue_up{source="queues"} 1',
        "# HELP aiqueue_jobs_waiting Jobs in their lanes that no worker holds.",
        "# TYPE aiqueue_jobs_waiting gauge",
        'aiqueue_jobs_waiting{family="agent.tasks"} 3',
        'aiqueue_jobs_waiting{family="b.c"} 0.5',
    ]


@given(st.lists(st.text(), max_size=5))
def test_any_text_is_a_label_and_none_makes_a_line_or_a_sample_twice(values: list[str]) -> None:
    text = Exposition()
    for value in values:
        text.add("aiqueue_jobs_waiting", 1, family=value)
    rendered = text.render()
    assert all(each.isprintable() or each == "\n" for each in rendered)
    assert len(samples(rendered)) <= len(set(values))


def test_a_label_is_escaped_and_cut() -> None:
    text = Exposition()
    text.add("aiqueue_jobs_waiting", 1, family='a"b\\c\nd\x1b\u202e' + "x" * 1_000)
    (line,) = samples(text.render())
    assert line.startswith(r'aiqueue_jobs_waiting{family="a\"b\\c\\nd\\x1b\\u202ex')
    assert len(line) < 300


@given(st.lists(st.floats(min_value=0, max_value=1e6), max_size=40))
def test_buckets_are_cumulative_and_the_same_for_all(times: list[float]) -> None:
    counts = Counts()
    for each in times:
        counts.add_run(each)
    sums = JobSums.of(counts.increments())
    text = Exposition()
    text.add_histogram(RUN, sums.runs, sums.run_s, family="f", kind="k")
    text.add_histogram(RUN, {}, 0.0, family="f", kind="none")
    found = samples(text.render())
    by_kind: dict[str, dict[float, float]] = {"k": {}, "none": {}}
    for key, value in found.items():
        if match := re.fullmatch(rf'{RUN}_bucket{{family="f",kind="(\w+)",le="(.+)"}}', key):
            by_kind[match[1]][float(match[2])] = value
    buckets = by_kind["k"]
    assert list(buckets) == list(by_kind["none"]) == [*(2.0**e for e in range(-10, 13)), float("inf")]
    for le, count in buckets.items():
        assert count == sum(each < le for each in times)
    assert found[f'{RUN}_count{{family="f",kind="k"}}'] == len(times) == buckets[float("inf")]
    assert found[f'{RUN}_sum{{family="f",kind="k"}}'] == pytest.approx(sum(times), abs=1e-5)
    assert not any(by_kind["none"].values())


def shown(*steps: dict[str, Any]) -> list[JobSums]:
    totals = MonotonicTotals()
    return [totals.update({("f", "k"): JobSums(**step)})["f", "k"] for step in steps]


def test_a_total_that_falls_a_little_stays_until_it_has_caught_up() -> None:
    found = shown({"done": 100}, {"done": 90}, {"done": 99}, {"done": 101})
    assert [each.done for each in found] == [100, 100, 100, 101]


def test_a_bucket_that_begins_again_does_not_take_its_histogram_back() -> None:
    *_, last = shown({"runs": {0: 1000, 9: 7}, "run_s": 900.0}, {"runs": {0: 1010, 9: 1}, "run_s": 880.0})
    assert last.runs == {0: 1010, 9: 7}
    assert last.run_s == 900.0


def test_a_total_that_begins_again_is_shown_as_it_is() -> None:
    *_, last = shown(
        {"done": 100, "dead": 50, "runs": {0: 150}, "run_s": 9.0}, {"done": 110, "dead": 2, "runs": {1: 3}}
    )
    assert (last.done, last.dead, last.runs, last.run_s) == (110, 2, {1: 3}, 0.0)


def test_a_kind_that_is_gone_is_forgotten() -> None:
    totals = MonotonicTotals()
    totals.update({("f", "k"): JobSums(done=5), ("f", "l"): JobSums(done=1)})
    assert set(totals.update({("f", "l"): JobSums(done=1)})) == {("f", "l")}
    assert totals.update({("f", "k"): JobSums(done=4)})["f", "k"].done == 4
