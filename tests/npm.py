"""Packages of npm that tests need: what the lock file of a directory names, installed into its `node_modules`.

No lock file names a registry. Without node, npm or a registry there is a reason, with which tests skip.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import time
from pathlib import Path

INSTALL_S = 40.0  # below the time limit of a test, whose first one waits for it
NODE_MIN = 20
COMMAND = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=0", "--fetch-timeout=10000"]


def problem(directory: Path) -> str:
    """Why the packages of a directory are not there, after a try to install them; "" where they are."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        return "there is no node, or no npm"
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    major = version.strip().removeprefix("v").split(".")[0]
    if not major.isdigit() or int(major) < NODE_MIN:
        return f"node is {version.strip() or 'of no known version'}, and {NODE_MIN} or newer is needed"
    try:
        return _install_alone(directory)
    except OSError as error:
        return f"its packages cannot be installed: {error}"


def _install_alone(directory: Path) -> str:
    """Test processes that run beside each other install one after the other; what went wrong while one waited is not
    tried again by it.
    """
    begun, end = time.time(), time.monotonic() + INSTALL_S
    with (directory / ".install").open("a+") as lock:  # in .gitignore
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    return "another process has been installing its packages for too long"
                time.sleep(0.05)
        lock.seek(0)
        at, _, found = lock.read().partition(" ")
        if found and float(at) >= begun:
            return found
        found = _install(directory)
        lock.truncate(0)
        lock.write(f"{time.time()} {found}")
        return found


def _install(directory: Path) -> str:
    lockfile = directory / "package-lock.json"
    mark = directory / "node_modules" / ".installed"
    if mark.exists() and mark.read_text() == lockfile.read_text():
        return ""
    try:
        done = subprocess.run(
            COMMAND, cwd=directory, capture_output=True, text=True, timeout=INSTALL_S, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"npm has not installed its packages within {INSTALL_S:g} s"
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("npm error")]
        return f"npm does not install its packages: {(lines or ['no word'])[0]}"
    mark.write_text(lockfile.read_text())
    return ""
