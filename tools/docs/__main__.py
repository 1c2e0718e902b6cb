"""`python -m tools.docs reference` writes the reference; with --check it says which pages differ."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .pages import render_all

ROOT = Path(__file__).resolve().parents[2]
DIRECTORY = ROOT / "docs" / "reference"
COMMAND = "python -m tools.docs reference"


def differing(directory: Path = DIRECTORY) -> dict[str, str]:
    """Return the pages whose file is missing or differs, with the text that they should have."""
    found = {}
    for name, text in render_all().items():
        file = directory / name
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            found[name] = text
    return found


def main(arguments: list[str]) -> int:
    """Write the pages that differ, or name them. Return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.docs", description="Write the pages of docs/reference.")
    parser.add_argument("what", choices=["reference"])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page differs")
    options = parser.parse_args(arguments)
    changed = differing()
    for name, text in changed.items():
        if not options.check:
            (DIRECTORY / name).parent.mkdir(parents=True, exist_ok=True)
            (DIRECTORY / name).write_text(text, encoding="utf-8")
        sys.stdout.write(f"{'differs' if options.check else 'written'}: docs/reference/{name}\n")
    if changed and options.check:
        sys.stderr.write(f"run `{COMMAND}`\n")
    return int(bool(changed and options.check))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
