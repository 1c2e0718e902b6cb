"""What `make dist` builds: both install into an empty venv, and the demo runs there."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from ..support import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(*words: str | Path, cwd: Path, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AIQUEUE_", "NATS_", "PYTHON"))}
    ran = subprocess.run(
        [str(each) for each in words], cwd=cwd, env=kept | environment, capture_output=True, text=True, check=False,
        timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, which is made from a clone: what is not committed must not matter."""
    clone, out = tmp_path_factory.mktemp("clone") / "aiqueue", tmp_path_factory.mktemp("dist")
    run("git", "clone", "-q", ROOT, clone, cwd=out)
    tools = out / "tools"
    run(sys.executable, "-m", "venv", tools, cwd=out)
    run(tools / "bin/pip", "install", "-q", "build", cwd=out)
    run(tools / "bin/python", "-m", "build", "--outdir", out, clone, cwd=out)
    return out


def test_the_sdist_has_all_that_a_packager_needs(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {
        "pyproject.toml",
        "Makefile",
        "LICENSE",
        "Dockerfile",
        "tests/conftest.py",
        "docs/get-started/first-job.md",
    } <= names
    assert "deploy/kubernetes/worker.yaml" in names
    assert not any(part.startswith((".venv", ".aiqueue", "__pycache__")) for name in names for part in name.split("/"))


def test_the_wheel_has_the_package_its_types_and_its_stream_files_alone(built: Path) -> None:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as file:
        names = set(file.namelist())
    assert {"aiqueue/py.typed", "aiqueue/streams/agent_tasks.toml"} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"aiqueue"}


@pytest.mark.parametrize("pattern", ["*.whl", "*.tar.gz"])
def test_it_installs_into_an_empty_venv_and_the_demo_runs_there(built: Path, pattern: str, tmp_path: Path) -> None:
    (path,) = built.glob(pattern)
    venv, here = tmp_path / "venv", tmp_path / "here"
    here.mkdir()
    run(sys.executable, "-m", "venv", venv, cwd=here)
    run(venv / "bin/pip", "install", "-q", path, cwd=here)
    said = run(venv / "bin/aiqueue", "demo", cwd=here, NO_COLOR="1")
    assert "dead letter" in said
    assert run(venv / "bin/aiqueue", "--version", cwd=here).startswith("aiqueue 0.")
