"""A virtual environment for each peer, below .bench/venvs of the project: made once, and again when its pins change."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from .catalogue import Peer
from .processes import Failed

ROOT = Path(__file__).resolve().parents[2]
VENVS = ROOT / ".bench" / "venvs"
ADAPTERS = Path(__file__).parent / "adapters"
INSTALL_S = 900.0
OURS = "aiqueue"


def python(peer: Peer, say: Callable[[str], None]) -> Path:
    """The Python that has the peer's packages, made if need be. Raises Failed with the reason, in one line.

    For aiqueue and raw nats-py it is this one, where it has uvloop.
    """
    if peer.venv == OURS and importlib.util.find_spec("uvloop") is not None:
        return Path(sys.executable)
    pins = ADAPTERS / f"{peer.venv}.txt"
    directory = VENVS / peer.venv
    made, program = directory / ".installed", directory / "bin" / "python"
    if made.exists() and made.read_text() == pins.read_text() and program.exists():
        return program
    say(f"{peer.name}: installing its packages")
    _do(sys.executable, "-m", "venv", "--clear", str(directory))
    pip = (str(program), "-m", "pip", "--quiet", "--disable-pip-version-check", "install")
    _do(*pip, "--requirement", str(pins))
    made.write_text(pins.read_text())
    return program


def version(program: Path, package: str) -> str:
    """The version of an installed distribution."""
    ask = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"
    return _do(str(program), "-c", ask, package).strip()


def _do(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    except subprocess.TimeoutExpired:
        raise Failed(f"{' '.join(command[1:4])}: not done within {INSTALL_S:g} s") from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise Failed((errors or ["it said nothing"])[-1][:200])
    return done.stdout
