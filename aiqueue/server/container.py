"""Whether this process runs in a container whose file system, and with it an embedded server's data, ends with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

KUBERNETES = "KUBERNETES_SERVICE_HOST"  # in the environment of each container of a pod
_MARKS = (Path("/.dockerenv"), Path("/run/.containerenv"))  # of Docker, and of Podman
_LAYERED = ("overlay", "aufs", "fuse.fuse-overlayfs")  # file systems of an image and a layer of changes
_MOUNTS = Path("/proc/self/mountinfo")


def find_container(directory: Path, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return why the data of `directory` would end with a container, such as "/.dockerenv exists"; None if not.

    A directory of a volume, or of the host, is not the container's. In Kubernetes all are: a pod that is replaced gets
    other volumes, unless someone says which.
    """
    if environment.get(KUBERNETES):
        return f"{KUBERNETES} is set"
    if not _is_in_root_file_system(directory):
        return None
    kind, source, top = _read_root_mount(_MOUNTS)
    if kind in _LAYERED:
        return f"the root file system is of the type {kind}"
    # images of virtual machines are made from those of containers, with their marks: these have a disk of their own
    marks = [each for each in _MARKS if each.exists()]
    return f"{marks[0]} exists" if marks and kind and not (source.startswith("/dev/") and top == "/") else None


def _is_in_root_file_system(directory: Path) -> bool:
    there = next((each for each in (directory, *directory.parents) if each.exists()), Path("/"))
    return there.stat().st_dev == Path("/").stat().st_dev


def _read_root_mount(mounts: Path) -> tuple[str, str, str]:
    """Return type, source and topmost directory of the root file system; empty ones outside Linux."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "", "", ""
    found = ("", "", "")
    for line in lines:  # 27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
        mount, _, system = line.partition(" - ")
        fields, (kind, source, *_) = mount.split(" "), (*system.split(" "), "", "")
        if len(fields) > 4 and fields[4] == "/":  # a later mount covers earlier ones
            found = kind, source, fields[3]
    return found
