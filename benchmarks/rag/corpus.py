"""The documents that are searched: Debian's packages of documentation where they are, else the project's own.

Of the packages every page is taken but those that only list the others: an index repeats each heading of the corpus.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ENV = "AIQUEUE_RAG_CORPUS"
PACKAGES = ("python3.11-doc", "sqlite3-doc", "postgresql-doc-15")
LISTS = (
    "genindex*.html", "py-modindex.html", "contents.html", "search.html", "bookindex.html", "keyword_index.html",
    "doc_*_crossref.html", "sitemap.html", "requirements.html",
)  # fmt: skip
OWN = "aiqueue"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Page:
    """A file of the corpus. `path`: within its package."""

    package: str
    path: str
    file: Path

    @property
    def document_id(self) -> str:
        return f"{self.package}/{self.path}"


@contextmanager
def pages(given: Path | None, scratch: Path) -> Iterator[list[Page]]:
    """The pages, in a fixed order. `given`: a directory of unpacked packages or of .deb files; None: what the variable
    AIQUEUE_RAG_CORPUS names, else the project's own. `scratch`: where packages are unpacked for the time being.
    """
    where = given or (Path(os.environ[ENV]) if os.environ.get(ENV) else None)
    if where is None:
        yield _own()
        return
    unpacked = scratch / "packages"
    try:
        yield [page for package in PACKAGES for page in _of_package(package, where, unpacked)]
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)


def _own() -> list[Page]:
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    return [Page(OWN, str(each.relative_to(ROOT)), each) for each in sorted(files)]


def _of_package(package: str, where: Path, unpacked: Path) -> list[Page]:
    root = where / package
    if not root.is_dir():
        archives = sorted(where.glob(f"{package}_*.deb"))
        if not archives:
            raise RuntimeError(
                f"{where} has neither {package}/ nor {package}_*.deb: get it by `apt-get download {package}`"
            )
        root = unpacked / package
        root.mkdir(parents=True)
        subprocess.run(["dpkg-deb", "-x", archives[-1], root], check=True)
    files = sorted(each for each in root.rglob("*.html") if each.is_file() and not each.is_symlink())
    return [Page(package, str(each.relative_to(root)), each) for each in files if not _is_list(each)]


def _is_list(file: Path) -> bool:
    return any(fnmatch.fnmatch(file.name, pattern) for pattern in LISTS)
