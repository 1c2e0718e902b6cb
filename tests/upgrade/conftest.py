from __future__ import annotations

from pathlib import Path

import pytest

from .former import unpack


@pytest.fixture(scope="session")
def former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The former version, unpacked once: where each test has a copy, its first program compiles all modules anew."""
    return unpack(tmp_path_factory.mktemp("former"))
