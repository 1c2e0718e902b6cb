"""Which files of a directory are documents, and their ids: the paths relative to it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from ...errors import BadInput


class FoundFile(NamedTuple):
    """A file that is a document. `size`: bytes, when it was found."""

    document_id: str
    path: Path
    size: int
    changed_ns: int

    @property
    def name(self) -> str:
        """The file's own name, as the id has it."""
        return self.document_id.rpartition("/")[2]


Problem = Callable[[str, str], None]  # (id, why) of a file or directory that cannot be read


class Patterns(NamedTuple):
    """Which files of directories are wanted, by patterns of their ids or names. `wanted`: empty: all but the others."""

    wanted: Sequence[str] = ()
    excluded: Sequence[str] = ()

    def match(self, document_id: str) -> bool:
        """Return whether a file of this id is wanted."""
        name = document_id.rpartition("/")[2]

        def fits(patterns: Sequence[str]) -> bool:
            return any(fnmatchcase(document_id, each) or fnmatchcase(name, each) for each in patterns)

        return not fits(self.excluded) and (not self.wanted or fits(self.wanted))


def find_files(places: Sequence[Path], patterns: Patterns, base: Path | None, on_problem: Problem) -> list[FoundFile]:
    """Return the documents in directories and of single files, in the order of their ids.

    A file's id is its path relative to its directory in `places`, or for a file that stands there itself its name;
    with `base` its path relative to that. Of directories, hidden files and directories are passed over, and so is what
    is no regular file; links to directories are not followed. `patterns`: of ids.

    Raises BadInput if a place does not exist, is not within `base`, or if two files have the same id.
    """
    found: dict[str, FoundFile] = {}
    for place in places:
        try:
            mode = place.stat().st_mode
        except OSError as error:
            raise BadInput(f"cannot read {str(place)!r}: {error.strerror}") from None
        is_directory = stat.S_ISDIR(mode)
        if not is_directory and not stat.S_ISREG(mode):
            raise BadInput(f"{str(place)!r} is neither a file nor a directory")
        start = _resolved_base(place, base) or (place if is_directory else place.parent)
        for path in _walk(place, start, on_problem) if is_directory else (place,):
            document_id = _id_of(path, start)
            if is_directory and not patterns.match(document_id):
                continue
            each = _to_file(path, document_id, on_problem)
            if each is None:
                continue
            other = found.setdefault(each.document_id, each)
            if other.path != each.path:
                raise BadInput(
                    f"{str(other.path)!r} and {str(each.path)!r} are both document {each.document_id!r}: ingest them "
                    "by a directory above both, or give it as --base"
                )
    return [found[key] for key in sorted(found)]


def _resolved_base(place: Path, base: Path | None) -> Path | None:
    """Return the base in the form that `place` begins with. Raises BadInput if it does not."""
    if base is None:
        return None
    inner, outer = _absolute(place), _absolute(base)
    if not inner.is_relative_to(outer):
        raise BadInput(f"{str(place)!r} is not within --base {str(base)!r}")
    return outer


def _walk(place: Path, start: Path, on_problem: Problem) -> Iterator[Path]:
    def tell(error: OSError) -> None:
        on_problem(_id_of(Path(error.filename), start), f"cannot be read: {error.strerror}")

    for directory, names, files in os.walk(place, onerror=tell):
        names[:] = sorted(each for each in names if not each.startswith("."))
        for each in sorted(files):
            if not each.startswith("."):
                yield Path(directory, each)


def _to_file(path: Path, document_id: str, on_problem: Problem) -> FoundFile | None:
    try:
        about = path.stat()
    except OSError as error:
        on_problem(document_id, f"cannot be read: {error.strerror}")
        return None
    if not stat.S_ISREG(about.st_mode):
        return None
    return FoundFile(document_id, path, about.st_size, about.st_mtime_ns)


def _id_of(path: Path, start: Path) -> str:
    relative = _absolute(path).relative_to(_absolute(start)).as_posix()
    return relative.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100  (resolve() would follow links)
