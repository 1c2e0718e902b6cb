"""Server-sent events, as a provider sends them: cut out of what its socket delivers."""

from __future__ import annotations


class EventParser:
    """Returns the data of events that have come whole. Everything else of an event is passed over.

    Most providers send whole events of one line each, which are cut in one go.
    """

    def __init__(self) -> None:
        self._line = bytearray()  # one that has not come whole
        self._data: list[bytes] = []  # of an event that has not
        self._data_bytes = 0  # of the lines that these came in

    @property
    def kept(self) -> int:
        """How many bytes have come of an event that has not come whole, without the lines that are passed over."""
        return len(self._line) + self._data_bytes

    def feed(self, part: bytes) -> list[bytes]:
        """Return the data of the events that end in `part`."""
        if not self._line and not self._data and part.startswith(b"data: ") and part.endswith(b"\n\n"):
            events = part[6:-2].split(b"\n\ndata: ")
            if part.count(b"\n") == 2 * len(events) and b"\r" not in part:
                return events
        end, *lines = part.split(b"\n")
        self._line += end  # what it has is not copied: an image comes in thousands of parts
        if not lines:
            return []
        lines.insert(0, bytes(self._line))
        self._line = bytearray(lines.pop())
        events = []
        for line in lines:
            text = line.removesuffix(b"\r")
            if text.startswith(b"data:"):
                self._data.append(text[5:].removeprefix(b" "))
                self._data_bytes += len(line) + 1
            elif not text and self._data:
                events += self.rest()
        return events

    def rest(self) -> list[bytes]:
        """Return the data of an event that the end of the stream has cut off, without a line that is not whole."""
        data, self._data, self._data_bytes = self._data, [], 0
        return [b"\n".join(data)] if data else []
