"""Where the stream files are: the bundled ones, and those of a user's own directory."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from ..errors import TopologyError

LIMITS_FILE = "limits.toml"  # no stream file: the rules of limits
OPTIONAL = "optional"  # below the bundled files: those of families that are declared only by name
_OTHER_FILES = (LIMITS_FILE, "gateway.toml", "rag.toml")  # which lie beside the streams


def bundled_directory() -> Path:
    """Return the directory of the bundled files: inside the package if installed, else in the root of the checkout."""
    here = Path(__file__).resolve().parent.parent
    for directory in (here / "streams", here.parent / "streams"):
        if directory.is_dir():
            return directory
    raise TopologyError(str(here / "streams"), "", "the bundled stream files are missing: reinstall aiqueue")


def list_directories(*directories: Path) -> list[Path]:
    """Return the directories of stream files and rules of limits: the bundled one, and the given ones."""
    bundled = bundled_directory()
    return [bundled, *(each for each in directories if each.resolve() != bundled.resolve())]


def list_files(directory: Path) -> list[Path]:
    """List the stream files of a directory, sorted by name. Skips hidden files, which editors create, and the rules of
    limits, models of the gateway and settings of retrieval, which lie beside the streams.
    """
    if not directory.is_dir():
        raise TopologyError(str(directory), "", "no such directory")
    files = sorted(path for path in directory.glob("*.toml") if not path.name.startswith("."))
    if not files:
        raise TopologyError(str(directory), "", "contains no *.toml file")
    return [path for path in files if path.name not in _OTHER_FILES]


def read_text(path: Path) -> str:
    """Return the text of a stream file. Raises TopologyError."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise TopologyError(str(path), "", f"cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TopologyError(str(path), "", f"is not UTF-8 (byte {error.start})") from None


@lru_cache(maxsize=1)
def read_optional() -> tuple[tuple[str, str], ...]:
    """Return the names and texts of the bundled files that are declared only by name."""
    return tuple((str(path), read_text(path)) for path in list_files(bundled_directory() / OPTIONAL))
