"""Alerts and dashboard for Prometheus and Grafana: what they name is exported, and promtool accepts it."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from typing import Any

import pytest

import aiqueue
from aiqueue.inspect import MetricsExporter
from aiqueue.metrics import EXPORTED, OUTCOMES, Counts, Flusher

from ..metrics.test_exposition import samples
from ..support import ROOT

yaml = pytest.importorskip("yaml")
pytestmark = pytest.mark.families("agent.tasks")

FILES = ROOT / "deploy/prometheus"
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not on PATH: apt-get install prometheus")
NAME = re.compile(r"\baiqueue_[a-z_]+")


@pytest.fixture
async def exposition(client: aiqueue.Client) -> str:
    """All that is exported where there is something of everything."""
    counts = Counts()
    counts.done = 3
    counts.add_run(0.3)
    counts.add_wait(0.1)
    counted = [{("agent.tasks", "acme", "k"): counts}]
    take: Any = lambda: counted.pop() if counted else {}  # noqa: E731
    await Flusher(client.connection, client.topology, ["agent.tasks"], take).flush()
    return (await MetricsExporter(client.connection, client.topology).scrape()).text


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load((FILES / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FILES / "dashboard.json").read_text())
    return found


def queries() -> list[str]:
    panels = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    return [*panels, *(rule["expr"] for rule in rules())]


def test_each_metric_that_is_named_is_exported(exposition: str) -> None:
    exported = {each.partition("{")[0] for each in samples(exposition)}
    families = {each.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for each in exported}
    assert families == set(EXPORTED)
    variables = [each["definition"] for each in dashboard()["templating"]["list"] if "definition" in each]
    named = {name for text in [*queries(), *variables] for name in NAME.findall(text)}
    assert len(named) > 10
    assert named <= exported
    page = (ROOT / "docs/operations/prometheus.md").read_text()
    assert set(NAME.findall(page)) <= exported | set(EXPORTED)
    assert re.findall(r"^\| `(aiqueue_[a-z_]+)", page, re.MULTILINE) == list(EXPORTED)


def test_each_label_and_value_that_is_asked_for_is_exported(exposition: str) -> None:
    has = set(re.findall(r'([a-z]+)="', exposition)) | {"instance"}
    values = set(re.findall(r'([a-z]+="[^"]*")', exposition))
    for query in queries():
        for labels in re.findall(r"\b(?:by|on) \(([a-z, ]+)\)", query):
            assert set(labels.split(", ")) <= has, query
        for label, value in re.findall(r'([a-z]+)="([^"$]+)"', query):
            assert (label, value) == ("job", "aiqueue") or f'{label}="{value}"' in values, query
    assert {f'outcome="{each}"' for each in OUTCOMES} <= values


def test_each_alert_says_what_to_do() -> None:
    found = rules()
    assert len({rule["alert"] for rule in found}) == len(found) >= 4
    page = (ROOT / "docs/operations/prometheus.md").read_text()
    for rule in found:
        assert "`aiqueue " in rule["annotations"]["description"]
        assert rule["labels"]["severity"] in ("warning", "critical")
        row = re.search(rf"^\| `{rule['alert']}` \|.*", page, re.MULTILINE)
        assert row is not None
        assert row[0].endswith(f"| {rule.get('for', 'at once')} | `{' '.join(rule['expr'].split())}` |")


def test_the_dashboard_asks_the_data_source_that_is_chosen() -> None:
    found = dashboard()
    source, family = found["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert family["datasource"] == chosen
    panels = found["panels"]
    for panel in panels:
        assert panel["datasource"] == chosen
        assert all(each["datasource"] == chosen for each in panel["targets"])
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    squares = [tuple(panel["gridPos"][each] for each in "xywh") for panel in panels]
    taken = [(column, row) for x, y, w, h in squares for column in range(x, x + w) for row in range(y, y + h)]
    assert len(set(taken)) == len(taken)
    assert all(column < 24 for column, _ in taken)


def promtool(*arguments: str, text: str | None = None) -> None:
    assert PROMTOOL is not None
    command = [PROMTOOL, *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=FILES, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
async def test_promtool_accepts_the_exposition(exposition: str) -> None:
    await asyncio.to_thread(promtool, "check", "metrics", text=exposition)


@needs_promtool
def test_promtool_accepts_the_rules_and_they_fire_when_they_should() -> None:
    promtool("check", "rules", "alerts.yaml")
    promtool("test", "rules", "alerts_test.yaml")


@needs_promtool
def test_promtool_parses_the_queries_of_the_dashboard(tmp_path: Any) -> None:
    exprs = [query.replace("$__rate_interval", "5m") for query in queries()]
    found = [{"record": f"query:{n}", "expr": expr} for n, expr in enumerate(exprs)]
    (tmp_path / "queries.yaml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": found}]}))
    promtool("check", "rules", str(tmp_path / "queries.yaml"))
