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
FILES = ("right.py", "wrong.py")
Complaints = dict[int, str]  # by line


def check_with_mypy(tmp_path: Path) -> dict[str, Complaints]:
    cache = (
        ROOT / ".mypy_cache" / "of-users"
    )  # not that of `make lint`: with other options each would discard the other's
    ran = subprocess.run(
        [
            sys.executable, "-m", "mypy", "--strict", "--config-file", "", "--cache-dir", str(cache),
            "--no-error-summary", "--hide-error-context", *FILES,
        ],
        cwd=CODE, env={"MYPYPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode in (0, 1), ran.stdout + ran.stderr
    found: dict[str, Complaints] = {name: {} for name in FILES}
    for file, line, text in re.findall(r"^(.+?):(\d+): error: (.*)$", ran.stdout, re.MULTILINE):
        assert file in found, ran.stdout
        found[file][int(line)] = found[file].get(int(line), "") + text
    return found


def check_with_pyright(tmp_path: Path) -> dict[str, Complaints]:
    if importlib.util.find_spec("basedpyright") is None:
        pytest.skip("basedpyright is not installed: `make test` installs it")
    include = [str(CODE / name) for name in FILES]
    project = {
        "include": include, "extraPaths": [str(ROOT)], "typeCheckingMode": "standard",
        "reportUnnecessaryComparison": "error",  # as in strict mode: of a state that there is not
    }  # fmt: skip
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
    assert report["summary"]["filesAnalyzed"] == len(FILES)
    found: dict[str, Complaints] = {name: {} for name in FILES}
    for each in report["generalDiagnostics"]:
        if each["severity"] == "error":
            complaints, line = found[Path(each["file"]).name], each["range"]["start"]["line"] + 1
            complaints[line] = complaints.get(line, "") + each["message"]
    return found


CHECKERS = pytest.mark.parametrize(
    "check", [pytest.param(check_with_mypy, id="mypy"), pytest.param(check_with_pyright, id="pyright")]
)


def lines_with(mark: str, name: str) -> dict[int, str]:
    lines = enumerate((CODE / name).read_text().splitlines(), 1)
    return {number: line for number, line in lines if f"# {mark}:" in line}


@pytest.mark.timeout(300)
@CHECKERS
def test_a_type_checker_complains_of_each_wrong_use_and_of_no_right_one(
    check: Callable[[Path], dict[str, Complaints]], tmp_path: Path
) -> None:
    """Both files in one run: most of its time goes into aiqueue and what that imports."""
    wrong = lines_with("wrong", "wrong.py")
    assert len(wrong) >= 65
    assert len(lines_with("right", "right.py")) >= 65
    found = check(tmp_path)
    assert found["right.py"] == {}
    complaints = found["wrong.py"]
    assert sorted(complaints) == sorted(wrong), complaints
    (of_handler,) = (text for line, text in complaints.items() if wrong[line].endswith("another result than declared"))
    assert "Job[Summarise, " in of_handler
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
