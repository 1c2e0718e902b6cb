"""Spans in memory, and as a tree that a test can compare whole."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="the SDK of OpenTelemetry is not installed: pip install aiqueue[otel]")

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import aiqueue

from ..support import Account, eventually

TRACE_ID = 0x4BF92F3577B34DA6A3CE929D0E0E4736
PARENT_ID = 0x00F067AA0BA902B7
SAMPLED = f"00-{TRACE_ID:032x}-{PARENT_ID:016x}-01"
UNSAMPLED = f"00-{TRACE_ID:032x}-{PARENT_ID:016x}-00"


class Recorder:
    """A provider of tracers whose spans stay in memory."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = self.provider.get_tracer("the user's")

    @property
    def spans(self) -> list[ReadableSpan]:
        """All ended spans, in the order of their starts."""
        return sorted(self._exporter.get_finished_spans(), key=lambda each: each.start_time or 0)

    @property
    def names(self) -> list[str]:
        return [each.name for each in self.spans]

    def one(self, name: str) -> ReadableSpan:
        """The only span of this name."""
        (found,) = [each for each in self.spans if each.name == name]
        return found

    def attributes(self, name: str) -> dict[str, Any]:
        """Those of the only span of this name."""
        return dict(self.one(name).attributes or {})

    async def ended(self, count: int) -> list[ReadableSpan]:
        """All spans, once there are so many of them."""
        await eventually(lambda: len(self.spans) >= count)
        assert len(self.spans) == count, self.names
        return self.spans

    def tree(self, shown: Collection[str] = ()) -> list[str]:
        """All spans, a line each, indented below their parents, with the attributes that are to be `shown`."""
        known = {each.context.span_id for each in self.spans if each.context}
        lines: list[str] = []

        def add(parent: int | None, depth: int) -> None:
            for each in self.spans:
                above = each.parent.span_id if each.parent and each.parent.span_id in known else None
                if above == parent and each.context is not None:
                    values = [
                        f"{name}={(each.attributes or {})[name]}" for name in shown if name in (each.attributes or {})
                    ]
                    status = [] if each.status.is_ok or each.status.is_unset else ["ERROR"]
                    lines.append(" ".join(["  " * depth + each.name, each.kind.name, *values, *status]))
                    add(each.context.span_id, depth + 1)

        add(None, 0)
        return lines

    def connect(self, account: Account, **options: Any) -> aiqueue.Client:
        """A client whose spans are recorded. Everything that begins a trace is traced."""
        options = {"trace_ratio": 1.0, **options}
        return aiqueue.connect(
            account.url, user=account.user, password=account.password, tracer_provider=self.provider, **options
        )


def trace_ids(recorder: Recorder) -> set[int]:
    return {each.context.trace_id for each in recorder.spans if each.context}


__all__ = ["PARENT_ID", "SAMPLED", "TRACE_ID", "UNSAMPLED", "Recorder", "trace", "trace_ids"]
