"""The path of headings that a place in a document is under."""

from __future__ import annotations

SEPARATOR = " > "
PATH_CHARS_MAX = 500


class HeadingPath:
    """Headings are entered in reading order; each ends those of its own level and below."""

    def __init__(self) -> None:
        self._path: list[tuple[int, str]] = []

    def enter(self, level: int, title: str) -> None:
        """Enter the heading of this level: 1 is the highest. A heading without a text only ends others."""
        while self._path and self._path[-1][0] >= level:
            self._path.pop()
        if title := " ".join(title.split()):
            self._path.append((level, title))

    def copy(self) -> HeadingPath:
        """Return a path that stays as this one is now."""
        copied = HeadingPath()
        copied._path = self._path.copy()
        return copied

    @property
    def text(self) -> str:
        """The path as "Install > Linux", at most 500 characters: the lowest headings are kept."""
        text = SEPARATOR.join(title for _, title in self._path)
        return text if len(text) <= PATH_CHARS_MAX else f"…{text[1 - PATH_CHARS_MAX :]}"
