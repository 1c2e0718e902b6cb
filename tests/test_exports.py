"""The public face."""

from __future__ import annotations

import builtins
import importlib
import subprocess
import sys

import pytest

import aiqueue
from aiqueue import errors


def test_all_is_exactly_what_has_a_home() -> None:
    assert sorted(aiqueue.__all__) == sorted(aiqueue._MODULE_OF) == aiqueue.__all__


@pytest.mark.parametrize("name", aiqueue.__all__)
def test_every_public_name_loads_from_its_module(name: str) -> None:
    home = importlib.import_module(f"aiqueue.{aiqueue._MODULE_OF[name]}")
    assert getattr(aiqueue, name) is getattr(home, name)


def test_no_public_name_and_no_error_shadows_a_builtin() -> None:
    assert not {*aiqueue.__all__, *vars(errors)} & {each for each in vars(builtins) if not each.startswith("_")}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Wrker"):
        _ = aiqueue.Wrker


def test_dir_lists_the_public_names() -> None:
    assert set(aiqueue.__all__) <= set(dir(aiqueue))


def test_a_star_import_gives_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from aiqueue import *", names)
    assert set(aiqueue.__all__) <= set(names)


def test_importing_aiqueue_loads_no_module_of_its_own_and_no_client_library() -> None:
    code = "import sys, aiqueue; print([m for m in sys.modules if m.startswith(('aiqueue.', 'nats', 'pydantic'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "[]"
