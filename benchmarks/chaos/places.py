"""Places that can be harmed: a disk of its own that can be filled, and a link that can be cut. Both need root."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Self

BALLAST = "ballast"
COMMAND_S = 10


class Impossible(Exception):
    """This machine does not let us make the place; the text says why."""


class Disk:
    """A tmpfs of `size_mib` on `directory`, unmounted on leaving. Raises Impossible."""

    def __init__(self, directory: Path, size_mib: int) -> None:
        self.directory = directory
        self._size_mib = size_mib

    def __enter__(self) -> Self:
        _demand_root("mounting a small disk")
        self.directory.mkdir(parents=True, exist_ok=True)
        _do("mount", "-t", "tmpfs", "-o", f"size={self._size_mib}m", "tmpfs", str(self.directory))
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Impossible):
            _do("umount", "--lazy", str(self.directory))

    def fill(self) -> None:
        """Leave no room at all."""
        file = os.open(self.directory / BALLAST, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        block = bytes(2**20)
        try:
            while block:
                try:
                    os.write(file, block)
                except OSError:
                    block = block[: len(block) // 2]
        finally:
            os.close(file)

    def free(self) -> None:
        (self.directory / BALLAST).unlink(missing_ok=True)


class Link:
    """A network namespace behind a veth pair. `host` is this side's address, where servers are to listen; programs
    started with `prefix` before their command live on the other side. Raises Impossible.
    """

    def __init__(self) -> None:
        name = secrets.token_hex(3)
        self._space, self._here, self._there = f"chaos-{name}", f"ch{name}a", f"ch{name}b"
        net = secrets.randbelow(64) * 4
        self.host, self._far = f"192.0.2.{net + 1}", f"192.0.2.{net + 2}"  # addresses kept for documentation

    @property
    def prefix(self) -> list[str]:
        return ["ip", "netns", "exec", self._space]

    def __enter__(self) -> Self:
        _demand_root("a network namespace")
        try:
            _do("ip", "netns", "add", self._space)
            _do("ip", "link", "add", self._here, "type", "veth", "peer", "name", self._there, "netns", self._space)
            _do("ip", "address", "add", f"{self.host}/30", "dev", self._here)
            _do(*self.prefix, "ip", "address", "add", f"{self._far}/30", "dev", self._there)
            _do(*self.prefix, "ip", "link", "set", "lo", "up")
            _do(*self.prefix, "ip", "link", "set", self._there, "up")
            self.heal()
        except Impossible:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for command in (("ip", "link", "delete", self._here), ("ip", "netns", "delete", self._space)):
            with contextlib.suppress(Impossible):
                _do(*command)

    def cut(self) -> None:
        """Nothing goes through, and neither side is told."""
        _do("ip", "link", "set", self._here, "down")

    def heal(self) -> None:
        _do("ip", "link", "set", self._here, "up")


def _demand_root(what: str) -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        raise Impossible(f"{what} needs Linux and root")


def _do(*command: str) -> None:
    if shutil.which(command[0]) is None:
        raise Impossible(f"there is no command {command[0]}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    if done.returncode:
        raise Impossible(f"{' '.join(command)}: {done.stderr.strip()}")
