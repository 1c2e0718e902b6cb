"""Whether data would end with a container. The last test makes a root file system as containers have."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aiqueue.server import container, find_container

from ..support import ROOT

DOCKER = """\
1 0 0:30 / / rw,relatime - overlay overlay rw,lowerdir=/l/A:/l/B,upperdir=/d/diff
2 1 0:31 / /proc rw - proc proc rw
3 1 8:1 /srv/data /data rw - ext4 /dev/sda1 rw
"""
VIRTUAL_MACHINE = "27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard\n22 27 0:21 / /proc rw - proc proc rw"
DOCKER_ON_BTRFS = "1 0 0:30 /var/lib/docker/btrfs/subvolumes/5f /  rw - btrfs /dev/sda2 rw".replace("/  rw", "/ rw")
REMOUNTED = f"{VIRTUAL_MACHINE}\n40 27 0:30 / / rw - overlay overlay rw"


@pytest.mark.parametrize(
    ("mounts", "found"),
    [
        (DOCKER, ("overlay", "overlay", "/")),
        (VIRTUAL_MACHINE, ("ext4", "/dev/vda", "/")),
        (DOCKER_ON_BTRFS, ("btrfs", "/dev/sda2", "/var/lib/docker/btrfs/subvolumes/5f")),
        (REMOUNTED, ("overlay", "overlay", "/")),
        ("nothing of the kind\n", ("", "", "")),
    ],
)
def test_the_root_file_system_is_the_last_one_mounted_there(
    tmp_path: Path, mounts: str, found: tuple[str, str, str]
) -> None:
    (tmp_path / "mountinfo").write_text(mounts)
    assert container._read_root_mount(tmp_path / "mountinfo") == found
    assert container._read_root_mount(tmp_path / "none") == ("", "", "")


@pytest.mark.parametrize(
    ("mounts", "marked", "found"),
    [
        (DOCKER, False, "the root file system is of the type overlay"),
        (VIRTUAL_MACHINE, True, None),
        (VIRTUAL_MACHINE, False, None),
        (DOCKER_ON_BTRFS, True, "{mark} exists"),
        (DOCKER_ON_BTRFS, False, None),
        ("1 0 0:9 / / rw - 9p none rw", True, "{mark} exists"),
        ("", True, None),
    ],
)
def test_a_mark_counts_unless_the_root_is_a_disk_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounts: str, *, marked: bool, found: str | None
) -> None:
    mark = tmp_path / ".dockerenv"
    if marked:
        mark.touch()
    (tmp_path / "mountinfo").write_text(mounts)
    monkeypatch.setattr(container, "_MARKS", (mark,))
    monkeypatch.setattr(container, "_MOUNTS", tmp_path / "mountinfo")
    assert find_container(Path("/"), {}) == (found and found.format(mark=mark))


def test_in_kubernetes_every_directory_is_the_containers(tmp_path: Path) -> None:
    found = find_container(tmp_path, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    assert found == "KUBERNETES_SERVICE_HOST is set"


LAYERED = """
set -e
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
cd "$1/root"
mount --rbind /proc proc
mkdir -p volume before
mount -t tmpfs tmpfs volume
pivot_root . before
cd /
exec "$2" -c "
from pathlib import Path
from aiqueue.server import find_container
print(find_container(Path('/app/.aiqueue'), {}), find_container(Path('/volume/.aiqueue'), {}), sep='|')
"
"""


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or shutil.which("unshare") is None, reason="mounts file systems"
)
def test_the_layer_of_changes_is_the_containers_and_a_volume_is_not(tmp_path: Path) -> None:
    done = subprocess.run(
        ["unshare", "--mount", "/bin/sh", "-c", LAYERED, "sh", str(tmp_path), sys.executable],
        capture_output=True, text=True, check=False, timeout=30, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if done.returncode and ("permitted" in done.stderr or "unknown filesystem" in done.stderr):
        pytest.skip(f"this user cannot mount an overlay: {done.stderr.strip()}")
    assert done.stdout == "the root file system is of the type overlay|None\n", done.stderr
