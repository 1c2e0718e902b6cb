"""The examples that were moved from other libraries, by the tests that they had there (docs/from-*.md)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..support import ROOT

MOVED = sorted(each.parent.name for each in ROOT.glob("examples/*/test_*.py"))


@pytest.mark.parametrize("name", MOVED)
def test_the_tests_of_a_moved_app_pass(name: str, tmp_path: Path) -> None:
    directory = tmp_path / name
    shutil.copytree(ROOT / "examples" / name, directory, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("AIQUEUE_", "NATS_"))}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_moved_app_names_the_page_that_tells_of_its_move() -> None:
    assert len(MOVED) > 1
    for name in MOVED:
        texts = [file.read_text() for file in (ROOT / "examples" / name).glob("*.py")]
        pages = [
            page for page in ROOT.glob("docs/guides/from-*.md") if any(f"guides/{page.name}" in text for text in texts)
        ]
        assert [page.name for page in pages if f"examples/{name}" in page.read_text()], name
