"""Subjects of counters: built and parsed. No server."""

from __future__ import annotations

import pytest

from aiqueue.metrics.metric_subjects import OTHER, MetricKey, metric, metric_filter, metric_filters, parse_metric
from aiqueue.topology.declared import Topology, bundled_directory

KEYS = [
    (MetricKey("minute", 1796013960, "agent.tasks", "page.render", "done"),
     "ai.metrics.minute.202611300446.agent.tasks.page/render.done"),
    (MetricKey("hour", 1796011200, "agent.tasks", "a.b:c-d_E", "run:-13"),
     "ai.metrics.hour.2026113004.agent.tasks.a/b:c-d_E.run:-13"),
    (MetricKey("total", 0, "agent.tasks", OTHER, "dead"), "ai.metrics.total.agent.tasks.=other.dead"),
    (MetricKey("tenant", 1796011200, "rag.ingest", "acme", "run_us"),
     "ai.metrics.tenant.2026113004.rag.ingest.acme.run_us"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "subject"), KEYS)
def test_each_counter_has_its_subject(key: MetricKey, subject: str) -> None:
    assert metric(key) == subject
    assert parse_metric(subject) == key
    assert any(_matches(each, subject) for each in metric_filters())
    assert _matches(metric_filter(key.level), subject)
    assert _matches(metric_filter(key.level, key.family), subject)
    assert not _matches(metric_filter(key.level, "some.others"), subject)


def test_the_stream_stores_these_subjects() -> None:
    assert Topology.build(_bundled()).streams["AI_METRICS"].config["subjects"] == metric_filters()


@pytest.mark.parametrize(
    "subject",
    ["ai.metrics", "ai.metrics.flush.06h", "ai.metrics.minute.202611300446.agent.tasks.k", "ai.metrics.total.a.b.c.d.e",
     "ai.metrics.minute.2026113004.agent.tasks.k.done", "ai.metrics.hour.2026139904.agent.tasks.k.done",
     "ai.metrics.day.20261130.agent.tasks.k.done", "ai.agent.tasks.acme"],
)  # fmt: skip
def test_other_subjects_are_no_counters(subject: str) -> None:
    assert parse_metric(subject) is None


def test_no_family_has_these_subjects_but_for_one_name_that_is_reserved() -> None:
    for name in ("metrics.minute", "metrics.total", "metrics.tenant", "metrics.hour"):
        text = f'[family]\nname = "{name}"\ndefault_kind = "k"\nlimit_key = "x"\n[stream]\nname = "OWN"\n'
        topology = Topology.build([*_bundled(), ("own.toml", text)])
        for own in topology.streams["OWN"].config["subjects"]:
            assert not any(_overlap(own, each) for each in metric_filters())
    reserved = '[family]\nname = "metrics.flush"\ndefault_kind = "k"\n[stream]\nname = "OWN"\n'
    with pytest.raises(Exception, match=r"own\.toml.*'metrics\.flush' is reserved for aiqueue"):
        Topology.build([*_bundled(), ("own.toml", reserved)])


def _bundled() -> list[tuple[str, str]]:
    return [(str(path), path.read_text()) for path in sorted(bundled_directory().glob("*.toml"))]


def _matches(pattern: str, subject: str) -> bool:
    wanted, given = pattern.split("."), subject.split(".")
    return len(wanted) == len(given) and all(a in ("*", b) for a, b in zip(wanted, given, strict=True))


def _overlap(one: str, other: str) -> bool:
    a, b = one.split("."), other.split(".")
    return len(a) == len(b) and all("*" in (x, y) or x == y for x, y in zip(a, b, strict=True))
