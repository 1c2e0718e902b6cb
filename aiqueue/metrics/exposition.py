"""Metrics as text for Prometheus: the exposition format 0.0.4. Plain values; what is exported is declared here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LABEL_MAX = 200  # characters of a label's value
LOWEST, HIGHEST = -10, 12  # histograms have buckets up to 2**-10 s, about a millisecond, to 2**12 s, about 68 minutes


class MetricType(NamedTuple):
    """What a metric is: its type, and its help text."""

    type: Literal["gauge", "counter", "histogram"]
    help: str


EXPORTED: Mapping[str, MetricType] = {
    "aiqueue_up": MetricType("gauge", "Whether a source was read: queues, workers, history. If not, it has no series."),
    "aiqueue_scrape_errors_total": MetricType("counter", "How often a source could not be read by this exporter."),
    "aiqueue_jobs_waiting": MetricType("gauge", "Jobs in their lanes that no worker holds."),
    "aiqueue_jobs_in_flight": MetricType("gauge", "Jobs that a worker holds, or that wait in their lane for a retry."),
    "aiqueue_jobs_parked": MetricType("gauge", "Jobs that wait for their time, outside of their lanes."),
    "aiqueue_jobs_dead": MetricType("gauge", "Dead letters that are stored."),
    "aiqueue_oldest_waiting_seconds": MetricType("gauge", "Age of the oldest waiting job; 0 if none waits."),
    "aiqueue_counts_partial": MetricType(
        "gauge", "1: servers of a cluster did not report all lanes; waiting, in_flight and oldest are left out."
    ),
    "aiqueue_workers": MetricType("gauge", "Workers by state."),
    "aiqueue_family_workers": MetricType("gauge", "Running workers that serve a family."),
    "aiqueue_jobs_total": MetricType("counter", "Attempts that ended, by outcome: done, retried, dead, cancelled."),
    "aiqueue_job_run_seconds": MetricType("histogram", "How long attempts ran."),
    "aiqueue_job_wait_seconds": MetricType("histogram", "How long jobs waited in their lane until their start."),
}  # fmt: skip

_Labels = tuple[tuple[str, str], ...]


class Exposition:
    """The samples of one scrape. A metric without samples is not in the text, nor is one that is not in `EXPORTED`."""

    def __init__(self) -> None:
        self._samples: dict[str, dict[tuple[str, _Labels], float]] = {name: {} for name in EXPORTED}

    def add(self, name: str, value: float, /, **labels: str) -> None:
        """Add a sample of a gauge or counter. One with equal labels is replaced: Prometheus refuses duplicates."""
        self._samples[name][name, _clean(labels)] = value

    def add_histogram(self, name: str, counts: Mapping[int, int], total: float, /, **labels: str) -> None:
        """Add a histogram of times. `counts`: how many took less than 2**e seconds and not less than half of that, by
        `e`. `total`: the sum of all of them, in seconds.

        The buckets are the same for all labels, so that they can be added up; what is longer is only in +Inf.
        """
        samples, cleaned = self._samples[name], _clean(labels)
        below = sum(count for exponent, count in counts.items() if exponent < LOWEST)
        for exponent in range(LOWEST, HIGHEST + 1):
            below += counts.get(exponent, 0)
            samples[f"{name}_bucket", (*cleaned, ("le", _number(2.0**exponent)))] = below
        count = sum(counts.values())
        samples[f"{name}_bucket", (*cleaned, ("le", "+Inf"))] = count
        samples[f"{name}_sum", cleaned] = total
        samples[f"{name}_count", cleaned] = count

    def update(self, other: Exposition) -> None:
        """Add the samples of another one."""
        for name, samples in other._samples.items():
            self._samples[name] |= samples

    def render(self) -> str:
        """Return the text."""
        lines: list[str] = []
        for name, samples in self._samples.items():
            if samples:
                declared = EXPORTED[name]
                lines += (f"# HELP {name} {declared.help}", f"# TYPE {name} {declared.type}")
                lines += (f"{each}{_render(labels)} {_number(value)}" for (each, labels), value in samples.items())
        return "".join(f"{line}\n" for line in lines)


def _clean(labels: Mapping[str, str]) -> _Labels:
    """Return labels that a terminal can show: what is not printable is escaped, and what is too long is cut."""
    return tuple((name, "".join(map(_printable, value[:LABEL_MAX]))) for name, value in labels.items())


def _printable(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def _render(labels: _Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escape(value)}"' for name, value in labels) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))
