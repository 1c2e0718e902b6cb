"""``top``: the queue at a glance, in a terminal, with keys to look closer and to pause and replay.

- `command` parses options. `reader` reads `figures` of a `place` from the server.
- `state` says what a key changes, `panes` which columns a place has, `table` sorts, filters and lays them out, and
  `frame` makes lines of it all: plain functions, without a server and a terminal.
- `acts` pauses, resumes and replays. `app` brings them together; `live` shows it.
"""

from __future__ import annotations

from .command import register

__all__ = ["register"]
