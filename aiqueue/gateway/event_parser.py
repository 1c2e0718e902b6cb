"""Server-sent events, as a provider sends them: cut out of what its socket delivers."""

from __future__ import annotations


class EventParser:
    """Returns the data of events that have come whole. Everything else of an event is passed over.

    Most providers send whole events of one line each, which are cut in one go.
    """

    def __init__(self) -> None:
        self._line = b""  # one that has not come whole
        self._data: list[bytes] = []  # of an event that has not

    @property
    def kept(self) -> int:
        """How many bytes are kept of an event that has not come whole."""
        return len(self._line) + sum(map(len, self._data))

    def feed(self, part: bytes) -> list[bytes]:
        """Return the data of the events that end in `part`."""
        if not self._line and not self._data and part.startswith(b"data: ") and part.endswith(b"\n\n"):
            events = part[6:-2].split(b"\n\ndata: ")
            if part.count(b"\n") == 2 * len(events) and b"\r" not in part:
                return events
        *lines, self._line = (self._line + part).split(b"\n")
        events = []
        for line in lines:
            text = line.removesuffix(b"\r")
            if text.startswith(b"data:"):
                self._data.append(text[5:].removeprefix(b" "))
            elif not text and self._data:
                events += self.rest()
        return events

    def rest(self) -> list[bytes]:
        """Return the data of an event that the end of the stream has cut off, without a line that is not whole."""
        data, self._data = self._data, []
        return [b"\n".join(data)] if data else []
