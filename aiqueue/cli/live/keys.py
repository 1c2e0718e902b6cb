"""What a terminal sends for keys, in words: "up", "enter", "escape", or the character that was typed."""

from __future__ import annotations

import codecs
import re

ESCAPE = "\x1b"
_SEQUENCE = re.compile("\x1b(?:\\[[0-?]*[ -/]*[@-~]|O[ -~])")
_BEGUN = re.compile("\x1b(?:\\[[0-?]*[ -/]*|O)?")
_FINAL = {"A": "up", "B": "down", "C": "right", "D": "left", "H": "home", "F": "end", "Z": "back_tab"}
_NUMBERED = {"1": "home", "4": "end", "5": "page_up", "6": "page_down", "7": "home", "8": "end"}
_CONTROLS = {
    "\r": "enter", "\n": "enter", "\t": "tab", "\x7f": "backspace", "\x08": "backspace", "\x0c": "redraw",
    "\x04": "page_down", "\x15": "page_up", "\x0e": "down", "\x10": "up",
}  # fmt: skip


class KeyDecoder:
    """Makes keys of what was read. A lone ESC may be the key or the start of a sequence: `flush` says that no more has
    come.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    @property
    def waits(self) -> bool:
        """Whether a sequence has begun."""
        return bool(self._rest)

    def feed(self, data: bytes) -> list[str]:
        """Return the keys in what was read."""
        text, self._rest = self._rest + self._decoder.decode(data), ""
        keys: list[str] = []
        at = 0
        while at < len(text):
            if text[at] != ESCAPE:
                keys += _plain_key(text[at])
                at += 1
            elif (match := _SEQUENCE.match(text, at)) is not None:
                keys += _sequence_key(match[0])
                at = match.end()
            elif (begun := _BEGUN.match(text, at)) is not None and begun.end() == len(text):
                self._rest = text[at:]
                break
            else:  # ESC, and then another key, as ESC pressed quickly before it
                keys.append("escape")
                at += 1
        return keys

    def flush(self) -> list[str]:
        """Return the keys of a sequence that has begun and will not go on."""
        rest, self._rest = self._rest, ""
        return ["escape"] if rest else []


def _plain_key(character: str) -> list[str]:
    if character in _CONTROLS:
        return [_CONTROLS[character]]
    return [character] if character.isprintable() else []


def _sequence_key(sequence: str) -> list[str]:
    """Return the key of a sequence; none of one that is not known, such as a report of the mouse."""
    if sequence == "\x1bOM":  # of the keypad; after "[<" an M ends a report of the mouse
        return ["enter"]
    final, number = sequence[-1], sequence[2:-1].partition(";")[0]
    name = _NUMBERED.get(number) if final == "~" else _FINAL.get(final)
    return [name] if name else []
