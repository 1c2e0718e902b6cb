"""Documents by path or URL. Nothing is read unless its root or host is allowed.

What a job names is hostile: a path may lead out of its root by `..` or a symlink, also one that is made meanwhile, and
a name may be resolved to a private address. So a path is opened component by component, none of which may be a symlink,
and a connection is made to the very address that was checked.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from ..errors import SettingsError
from .errors import FetchFailed, FetchRefused
from .fetched import Collecting, Fetched, FetchLimits, too_large

if TYPE_CHECKING:
    from .url_fetching import Resolver

_PIECE = 256 * 1024
# Not the threads of the event loop: a root on a network that does not answer would hold up all else.
_READERS = ThreadPoolExecutor(8, thread_name_prefix="aiqueue-rag-paths")
_DIRECTORY = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


async def read_path(path: str, roots: Sequence[str | Path], *, limits: FetchLimits | None = None) -> Fetched:
    """Read a file below one of the `roots`, which are absolute; an empty list allows nothing.

    Raises FetchRefused for a path that is not allowed, is no regular file, does not exist or is too large; FetchFailed
    for a fault that may pass.
    """
    return await asyncio.get_running_loop().run_in_executor(_READERS, _read_path, path, roots, limits or FetchLimits())


async def find_size(path: str, roots: Sequence[str | Path], *, limits: FetchLimits) -> int:
    """Return how many bytes a file below one of the `roots` has now. Raises as `read_path`."""
    return await asyncio.get_running_loop().run_in_executor(_READERS, _find_size, path, roots, limits)


async def fetch_url(
    url: str,
    hosts: Sequence[str],
    *,
    private_hosts: Sequence[str] = (),
    limits: FetchLimits | None = None,
    resolver: Resolver | None = None,
) -> Fetched:
    """Read a document by HTTP or HTTPS from one of the `hosts`; an empty list allows nothing.

    A host is "docs.example.com", for the scheme's own port, or "docs.example.com:8443". All its addresses must be
    public. `private_hosts` may have private ones and those of this machine. Redirects are followed to allowed hosts
    only. `resolver`: an aiohttp resolver in place of the system's.

    Raises FetchRefused for what is not allowed or will never be (as 404); FetchFailed for what may pass (no connection,
    a timeout, 408, 425, 429, 5xx); SettingsError if aiohttp is missing.
    """
    try:
        from . import url_fetching  # noqa: PLC0415  (aiohttp is loaded where it is needed)
    except ImportError as error:
        raise SettingsError(f"documents by URL need aiohttp ({error}): pip install 'aiqueue[rag]'") from None
    rules = url_fetching.HostRules(hosts, private_hosts)
    return await url_fetching.fetch(url, rules, limits or FetchLimits(), resolver)


def _read_path(path: str, roots: Sequence[str | Path], limits: FetchLimits) -> Fetched:
    root, parts = _below(path, roots)
    collecting = Collecting(path, limits.size_bytes_max)
    try:
        with open(_open_below(path, root, parts, limits.size_bytes_max), "rb", buffering=0) as file:
            while piece := file.read(_PIECE):
                collecting.add(piece)
        return collecting.finish(parts[-1])
    except OSError as error:
        collecting.close()
        raise _error_of(path, error) from error
    except BaseException:
        collecting.close()
        raise


def _find_size(path: str, roots: Sequence[str | Path], limits: FetchLimits) -> int:
    root, parts = _below(path, roots)
    try:
        with open(_open_below(path, root, parts, limits.size_bytes_max), "rb", buffering=0) as file:
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        raise _error_of(path, error) from error


def _below(path: str, roots: Sequence[str | Path]) -> tuple[Path, list[str]]:
    """Return the root that a path is below, and the names from there. Only by their texts: nothing is looked up."""
    if not roots:
        raise FetchRefused(path, "documents by path are off: list the directory in `roots` of this tenant in rag.toml")
    if "\0" in path or not path.startswith("/"):
        raise FetchRefused(path, "a path must begin with / and hold no NUL character")
    if ".." in PurePath(path).parts:
        raise FetchRefused(path, "a path must not hold '..'")
    for root in sorted(map(Path, roots), key=lambda each: len(each.parts), reverse=True):
        if not root.is_absolute():
            raise SettingsError(f"the root {str(root)!r} must be absolute")
        with contextlib.suppress(ValueError):
            names = PurePath("/" + path.lstrip("/")).relative_to(root).parts
            if not names:
                raise FetchRefused(path, "it is a directory: give a file")
            return root, list(names)
    raise FetchRefused(path, "it is outside of the roots of this tenant: add its directory to `roots` in rag.toml")


def _open_below(path: str, root: Path, names: list[str], size_bytes_max: int) -> int:
    """Open a regular file below a root, following no symlink below it, and return its descriptor. Raises OSError.

    Each directory is opened within the one before, so that renaming or linking meanwhile cannot lead outside.
    """
    try:
        directory = os.open(root, _DIRECTORY)
    except OSError as error:
        why = f"its root {root} cannot be opened on {socket.gethostname()}: {error.strerror}"
        raise FetchFailed(path, why, waits=True) from error
    try:
        for name in names[:-1]:
            try:
                inner = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENOTDIR):
                    raise FetchRefused(
                        path, f"{name!r} is a symlink or no directory: give the file's own path"
                    ) from None
                raise
            os.close(directory)
            directory = inner
        _refuse_unless_file(path, os.stat(names[-1], dir_fd=directory, follow_symlinks=False), size_bytes_max)
        descriptor = os.open(names[-1], _FILE, dir_fd=directory)
    finally:
        os.close(directory)
    try:
        _refuse_unless_file(path, os.fstat(descriptor), size_bytes_max)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _refuse_unless_file(path: str, found: os.stat_result, size_bytes_max: int) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise FetchRefused(path, "it is a symlink: give the file's own path")
    if stat.S_ISDIR(found.st_mode):
        raise FetchRefused(path, "it is a directory: give a file")
    if not stat.S_ISREG(found.st_mode):
        raise FetchRefused(path, "it is a device, pipe or socket: give a file")
    if found.st_size > size_bytes_max:
        raise too_large(path, size_bytes_max)


def _error_of(path: str, error: OSError) -> FetchRefused | FetchFailed:
    match error.errno:
        case errno.ENOENT:
            return FetchRefused(path, "there is no such file")
        case errno.EACCES | errno.EPERM:
            return FetchRefused(path, "this process may not read it: change the file's permissions")
        case errno.ELOOP:
            return FetchRefused(path, "it is a symlink: give the file's own path")
        case errno.ENAMETOOLONG | errno.ENOTDIR | errno.EINVAL:
            return FetchRefused(path, f"it is not the path of a file: {error.strerror}")
    return FetchFailed(path, f"it cannot be read: {error.strerror}")
