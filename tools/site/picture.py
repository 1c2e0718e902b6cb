"""Draws what a terminal shows as SVG: `tmux capture-pane -e -p | python -m tools.site.picture > docs/demo.svg`."""

from __future__ import annotations

import io
import re
import sys

from rich.console import Console
from rich.text import Text

WIDTH = 104


def draw(screen: str, title: str) -> str:
    """Return the screen, with its colors, as an SVG that loads nothing from elsewhere."""
    lines = screen.rstrip("\n").splitlines()
    console = Console(record=True, width=WIDTH, file=io.StringIO(), color_system="truecolor", force_terminal=True)
    for line in lines:
        console.print(Text.from_ansi(line), no_wrap=True, crop=True)
    return re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title=title, unique_id="demo"), flags=re.DOTALL)


if __name__ == "__main__":
    sys.stdout.write(draw(sys.stdin.read(), sys.argv[1] if len(sys.argv) > 1 else "make demo"))
