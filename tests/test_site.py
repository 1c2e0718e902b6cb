"""`make docs` builds the site, strictly, for use offline, with the pages as Markdown for language models."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from .support import ROOT

pytestmark = pytest.mark.skipif(
    not all(find_spec(each) for each in ("sphinx", "myst_parser", "furo")),
    reason="the dependency group `docs` is not installed: `make test` and `make docs` install it",
)


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Run what `make docs` runs."""
    recipe = (ROOT / "Makefile").read_text().partition("\ndocs: ")[2].partition("\n\n")[0]
    command = re.sub(r"\\\n\s*", "", re.search(r"\$\(PY\) (-m sphinx .*?)\n\t@echo", recipe, re.DOTALL)[1])
    arguments = command.replace("build/docs", str(out)).replace("build/doctrees", str(out.parent / "trees")).split()
    return subprocess.run(
        [sys.executable, *arguments], cwd=root, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of this project, built once for all processes of a test run."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    out = shared / "site/html"
    with (shared / "site.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "llms.txt").is_file():
            done = build(ROOT, out)
            assert (done.returncode, done.stderr) == (0, "")
    return out


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A project of a few pages, built by the project's own configuration."""
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    (tmp_path / "aiqueue").symlink_to(ROOT / "aiqueue")
    (tmp_path / "docs/guides").mkdir(parents=True)
    (tmp_path / "README.md").write_text("# Home\n\nThe home page. See [guides](docs/guides/README.md).\n")
    (tmp_path / "docs/guides/README.md").write_text("# Guides\n\n- [One](one.md)\n- [Two](two.md#the-end)\n")
    (tmp_path / "docs/guides/one.md").write_text("# One\n\n`aiqueue.Backoff` and `aiqueue.rag.Rag(client)` exist.\n")
    (tmp_path / "docs/guides/two.md").write_text("# Two\n\n## The end\n\nSee [the end](#the-end).\n")
    return tmp_path


def _append(name: str, text: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_text((root / name).read_text() + text)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a page that is linked is removed": (lambda root: (root / "docs/guides/two.md").unlink(), "docs/guides/two'"),
    "a link leads to no page": (_append("docs/guides/one.md", "\n[x](no-page.md)\n"), "no-page.md"),
    "a link leads to no heading of another page": (
        _append("docs/guides/one.md", "\n[x](../../README.md#not-there)\n"), "not-there",
    ),
    "a link leads to no heading of its page": (_append("docs/guides/one.md", "\n[x](#not-here)\n"), "not-here"),
    "a link leads to no file": (_append("docs/guides/one.md", "\n[x](../../aiqueue/no_file.py)\n"), "no_file.py"),
    "a picture is not there": (_append("docs/guides/one.md", "\n![x](no-picture.png)\n"), "no-picture.png"),
    "an index page lists a page that is not there": (_append("docs/guides/README.md", "- [x](no.md)\n"), "guides/no'"),
    "no index page lists a page": (lambda root: (root / "docs/guides/unlisted.md").write_text("# New\n"), "unlisted"),
    "a page names an object that is not there": (_append("docs/guides/one.md", "\n`aiqueue.Nope`\n"), "aiqueue.Nope"),
}  # fmt: skip


def test_a_small_site_without_faults_is_built(small: Path, tmp_path: Path) -> None:
    done = build(small, tmp_path / "out/html")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_build_fails_by_one_warning(small: Path, tmp_path: Path) -> None:
    make, named = FAULTS["a page names an object that is not there"]
    make(small)
    done = build(small, tmp_path / "out/html")
    assert done.returncode != 0
    assert named in done.stderr


def test_each_fault_is_a_warning_that_says_where(small: Path, tmp_path: Path) -> None:
    """All in one build: one costs 2 s of CPU, and a warning stops none (`--keep-going`)."""
    for make, _ in FAULTS.values():
        make(small)
    warnings = [each for each in build(small, tmp_path / "out/html").stderr.splitlines() if "WARNING: " in each]
    assert [fault for fault, (_, named) in FAULTS.items() if not any(named in each for each in warnings)] == []


@pytest.mark.timeout(300)
def test_every_page_of_the_docs_is_in_the_site_as_html_and_as_markdown(site: Path) -> None:
    pages = [each.relative_to(ROOT) for each in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]]
    assert len(pages) > 100
    assert [each for each in pages if not (site / each).with_suffix(".html").is_file()] == []
    assert [each for each in pages if (site / each).read_text() != (ROOT / each).read_text()] == []
    assert "url=README.html" in (site / "index.html").read_text()


class Assets(HTMLParser):
    """What a browser loads for a page, and where its links lead."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {key: value or "" for key, value in attrs}
        if tag == "a":
            self.links.append(named.get("href", ""))
        elif tag == "link":
            self.loaded.append(named.get("href", ""))
        else:
            self.loaded.append(named.get("src", ""))


@pytest.mark.timeout(300)
def test_the_site_works_offline(site: Path) -> None:
    asked = []
    for page in site.rglob("*.html"):
        assets = Assets(page.read_text())
        asked += [(page.name, each) for each in assets.loaded if urlsplit(each).netloc]
        for link in assets.links:
            path = unquote(urlsplit(link).path)
            if path and not urlsplit(link).netloc and not urlsplit(link).scheme:
                assert (page.parent / path).exists(), f"{page.relative_to(site)}: {link}"
    for style in site.rglob("*.css"):
        asked += [(style.name, each) for each in re.findall(r"url\([\"']?((?:https?:)?//[^)]+)", style.read_text())]
    assert asked == []


@pytest.mark.timeout(300)
def test_the_links_of_the_markdown_pages_lead_to_files_of_the_site(site: Path) -> None:
    dead, examples = [], 0
    for page in site.rglob("*.md"):
        if page == site / "tests/guide/guide.md":  # a text of another project, whose links lead to that project's files
            continue
        text = re.sub(r"^```.*?^```|`[^`\n]+`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)", text):
            examples += "examples/" in target
            if not (page.parent / target).exists():
                dead.append(f"{page.relative_to(site)}: {target}")
    assert dead == []
    assert examples > 10


@pytest.mark.timeout(300)
def test_llms_txt_lists_the_pages_and_llms_full_txt_has_their_text(site: Path) -> None:
    lines = (site / "llms.txt").read_text().splitlines()
    assert lines[0] == "# aiqueue"
    assert lines[2].startswith("> ")
    links = [re.fullmatch(r"- \[[^\]]+\]\(([^)]+)\): \S.+", each) for each in lines if each.startswith("- ")]
    assert all(links)
    named = [each[1] for each in links if each]
    assert len(named) == len(set(named))
    assert {"docs/get-started/first-job.md", "docs/decisions/site.md"} <= set(named)
    assert [each for each in named if not (site / each).is_file()] == []
    assert [each[3:] for each in lines if each.startswith("## ")][-1] == "Optional"  # may be left out by its readers
    full = (site / "llms-full.txt").read_text()
    assert (ROOT / "docs/get-started/first-job.md").read_text().strip() in full
    assert (ROOT / "docs/decisions/site.md").read_text().strip() not in full
