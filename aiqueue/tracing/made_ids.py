"""Ids of traces that were made elsewhere: OpenTelemetry's API cannot start a trace with a given id."""

from __future__ import annotations

import threading
from typing import Any


class MadeIds:
    """The generator of ids of one tracer of the SDK, by which a new trace can get an id that was made elsewhere."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator
        self._local = threading.local()

    @classmethod
    def of(cls, tracer: Any) -> MadeIds:
        """Return the generator, in place of that of the tracer. Where a tracer has none, ids stay its own."""
        generator = getattr(tracer, "id_generator", None)
        if isinstance(generator, MadeIds):  # the provider has given the tracer of another client
            return generator
        made = cls(generator)
        if generator is not None:
            tracer.id_generator = made
        return made

    def use(self, trace_id: int) -> None:
        """Give a new trace of this thread this id, until the next call. 0: any."""
        self._local.trace_id = trace_id

    def generate_trace_id(self) -> int:
        return getattr(self._local, "trace_id", 0) or int(self._generator.generate_trace_id())

    def generate_span_id(self) -> int:
        return int(self._generator.generate_span_id())

    def is_trace_id_random(self) -> bool:
        is_random = getattr(self._generator, "is_trace_id_random", None)
        return is_random is not None and bool(is_random())
