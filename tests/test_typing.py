"""What type checkers say of user code: aiqueue is typed end to end. The code is in tests/typing."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = ROOT / "tests" / "typing"
Complaints = dict[int, str]  # by line


def check_with_mypy(name: str, tmp_path: Path) -> Complaints:
    ran = subprocess.run(
        [
            sys.executable, "-m", "mypy", "--strict", "--config-file", "", "--cache-dir", str(ROOT / ".mypy_cache"),
            "--no-error-summary", "--hide-error-context", name,
        ],
        cwd=CODE, env={"MYPYPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode in (0, 1), ran.stdout + ran.stderr
    found: Complaints = {}
    for file, line, text in re.findall(r"^(.+?):(\d+): error: (.*)$", ran.stdout, re.MULTILINE):
        assert file == name, ran.stdout
        found[int(line)] = found.get(int(line), "") + text
    return found


def check_with_pyright(name: str, tmp_path: Path) -> Complaints:
    if importlib.util.find_spec("basedpyright") is None:
        pytest.skip("basedpyright is not installed: `make test` installs it")
    project = {"include": [str(CODE / name)], "extraPaths": [str(ROOT)], "typeCheckingMode": "standard"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(project))
    ran = subprocess.run(
        [
            sys.executable, "-m", "basedpyright", "--project", str(tmp_path), "--pythonpath", sys.executable,
            "--outputjson",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode in (0, 1), ran.stdout + ran.stderr
    report = json.loads(ran.stdout)
    assert report["summary"]["filesAnalyzed"] == 1
    found: Complaints = {}
    for each in report["generalDiagnostics"]:
        if each["severity"] == "error":
            line = each["range"]["start"]["line"] + 1
            found[line] = found.get(line, "") + each["message"]
    return found


CHECKERS = pytest.mark.parametrize(
    "check", [pytest.param(check_with_mypy, id="mypy"), pytest.param(check_with_pyright, id="pyright")]
)


def lines_with(mark: str, name: str) -> dict[int, str]:
    lines = enumerate((CODE / name).read_text().splitlines(), 1)
    return {number: line for number, line in lines if f"# {mark}:" in line}


@pytest.mark.timeout(300)
@CHECKERS
def test_a_type_checker_complains_of_no_right_use(check: Callable[[str, Path], Complaints], tmp_path: Path) -> None:
    assert len(lines_with("right", "right.py")) >= 65
    assert check("right.py", tmp_path) == {}


@pytest.mark.timeout(300)
@CHECKERS
def test_a_type_checker_complains_of_each_wrong_use_and_of_nothing_else(
    check: Callable[[str, Path], Complaints], tmp_path: Path
) -> None:
    wrong = lines_with("wrong", "wrong.py")
    assert len(wrong) >= 65
    complaints = check("wrong.py", tmp_path)
    assert sorted(complaints) == sorted(wrong), complaints
    (of_handler,) = (text for line, text in complaints.items() if wrong[line].endswith("another result than declared"))
    assert "Job[Summarise]" in of_handler
    assert "Summary" in of_handler
    assert "int" in of_handler


def test_what_type_checkers_call_right_can_be_declared_when_it_runs() -> None:
    spec = importlib.util.spec_from_file_location("aiqueue_typing_right", CODE / "right.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    assert {"summarise", "measure", "count", "sort", "page"} <= {each.model.aiq_kind for each in module.worker.handlers}
    assert module.Sort[int].aiq_result == list[int]
