"""A span that is made a moment after its start, together with others, unless something asks for it before.

An attempt among a hundred that are not traced finds none of the SDK's code and data in the processor's caches: a span
takes three times as long there as one of many in a row. Most handlers never look at their span. So an attempt gets a
LateSpan, which knows when it began and when it has ended; the provider makes the span with these times.
"""

from __future__ import annotations

import asyncio
import importlib
import threading
import time
from collections.abc import Callable, Mapping
from contextvars import Context
from typing import Any, Final

BATCH: Final = 64  # spans are made when so many have begun
WITHIN_S: Final = 0.1  # and at the latest after this time


class LateSpan:
    """In place of a span of OpenTelemetry, whose `Span` it is registered for.

    `make` has the provider start the span, and raises nothing. `fields`: the attributes at its start. `started_at`: in
    nanoseconds since the epoch.
    """

    __slots__ = ("__weakref__", "_ended_at", "_lock", "_made", "_make", "fields", "started_at")

    def __init__(self, make: Callable[[LateSpan], Any], fields: dict[str, Any]) -> None:
        self._make: Callable[[LateSpan], Any] | None = make
        self._made: Any = None
        self._ended_at = 0
        self._lock = threading.RLock()
        self.fields = fields
        self.started_at = time.time_ns()

    def made(self) -> Any:
        """Return the span of the provider. It is made now if there is none yet."""
        with self._lock:  # a handler may run in a thread, and leave others behind
            if self._make is not None:
                make, self._make = self._make, None
                # as long as it is made, for a processor or a sampler that asks for the current span
                self._made = importlib.import_module("opentelemetry.trace").INVALID_SPAN
                self._made = make(self)
                if self._ended_at:
                    self._made.end(self._ended_at)
            return self._made

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Set attributes: those of the start, if nothing has asked for the span yet."""
        with self._lock:
            if self._make is not None and not self._ended_at:
                self.fields |= attributes
            else:
                self.made().set_attributes(attributes)

    def end(self, end_time: int | None = None) -> None:
        """End the span: now, or at a time in nanoseconds since the epoch."""
        with self._lock:
            if self._make is not None and not self._ended_at:
                self._ended_at = end_time or time.time_ns()
            else:
                self.made().end(end_time)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.made(), name)

    def __enter__(self) -> Any:
        return self.made().__enter__()

    def __exit__(self, *error: object) -> Any:
        return self.made().__exit__(*error)


class LateSpans:
    """Those that are to be made. `guard` calls a function, and logs what it raises."""

    def __init__(self, guard: Callable[..., None]) -> None:
        self._guard = guard
        self._spans: list[LateSpan] = []
        self._loop: asyncio.AbstractEventLoop | None = None  # whose timer makes them

    def add(self, span: LateSpan) -> None:
        """Have a span made soon; at once outside of an event loop."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._guard(span.made)
            return
        self._spans.append(span)
        if len(self._spans) == 1 or loop is not self._loop:  # a former loop may have ended before its timer
            self._loop = loop
            loop.call_later(WITHIN_S, self.make, context=Context())
        elif len(self._spans) >= BATCH:
            Context().run(self.make)

    def make(self) -> None:
        """Make all of them."""
        spans, self._spans = self._spans, []
        for each in spans:
            self._guard(each.made)
