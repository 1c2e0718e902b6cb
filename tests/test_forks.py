"""Forked programs are what `python program` would be, as far as other tests stand on it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from . import forks
from .support import ROOT, Eventually, processes

SAYS = """
import json, os, sys
print(json.dumps([__name__, sys.argv, sys.path[0], os.getcwd(), dict(os.environ), sys.stdin.read(), os.getsid(0)]))
print("to stderr", file=sys.stderr)
sys.exit(3)
"""
PARENT = """
import sys, time
from pathlib import Path
from tests import forks
print(forks.start("time.py", cwd=Path(sys.argv[1])).pid, flush=True)
time.sleep(600)
"""


def start(place: Path, code: str, *arguments: str, **options: Any) -> forks.Program:
    (place / "program.py").write_text(code)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return forks.start("program.py", *arguments, cwd=place, **streams, **options)


def test_a_program_has_its_directory_environment_arguments_streams_and_exit_code(tmp_path: Path) -> None:
    program = start(tmp_path, SAYS, "a", "b c", env={"A": "1", "PYTHONPATH": "/elsewhere"}, start_new_session=True)
    out, err = program.communicate()
    here = str(tmp_path)
    assert json.loads(out) == [
        "__main__", ["program.py", "a", "b c"], here, here, {"A": "1", "PYTHONPATH": "/elsewhere"}, "", program.pid
    ]  # fmt: skip
    assert (program.returncode, err) == (3, "to stderr\n")


def test_an_error_is_exit_code_1_with_a_traceback_and_a_signal_a_negative_one(tmp_path: Path) -> None:
    program = start(tmp_path, "raise ValueError('broken')")
    assert program.communicate()[1].endswith("ValueError: broken\n")
    assert program.returncode == 1
    program = start(tmp_path, "import time; print('up', flush=True); time.sleep(600)")
    assert program.stdout is not None
    assert program.stdout.readline() == "up\n"
    assert program.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(0.01)
    program.kill()
    program.communicate()
    assert program.returncode == program.poll() == -signal.SIGKILL


def test_a_program_finds_loaded_what_it_asked_for_and_nothing_that_others_have_loaded(tmp_path: Path) -> None:
    says = "import sys; print([name in sys.modules for name in ('aiqueue', 'tests.keyed', 'program_a')])"
    (tmp_path / "program_a.py").write_text("")
    assert start(tmp_path, says, imports=["tests.keyed"]).communicate()[0] == "[True, True, False]\n"
    assert start(tmp_path, f"import program_a; {says}").communicate()[0] == "[True, False, True]\n"
    assert start(tmp_path, says).communicate()[0] == "[True, False, False]\n"


async def test_programs_end_with_the_process_that_started_them(tmp_path: Path, eventually: Eventually) -> None:
    (tmp_path / "time.py").write_text("import signal; signal.pause()")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    await eventually(lambda: pid not in processes(""))
