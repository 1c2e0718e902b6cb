"""Which files are documents, what filters and metadata mean, and what a watched directory has changed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from aiqueue.cli.rag.arguments import parse_metadata, parse_where
from aiqueue.cli.rag.files import FoundFile, Patterns, find_files
from aiqueue.cli.rag.watch import Changes, Watched
from aiqueue.errors import BadInput


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["lang=en"], {"lang": "en"}),
        (["year=2020", "draft=false", "score=0.5", "none=null", "text=", "id=0123", "x=NaN"],
         {"year": 2020, "draft": False, "score": 0.5, "none": None, "text": "", "id": "0123", "x": "NaN"}),
        (["tag=a", "tag=2", "tag=c=d"], {"tag": ["a", 2, "c=d"]}),
        (["list=[1,2]"], {"list": "[1,2]"}),
        (None, {}),
    ],
)  # fmt: skip
def test_metadata_are_texts_numbers_and_booleans_and_a_repeated_key_is_a_list(given: Any, expected: Any) -> None:
    assert parse_metadata(given) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["lang=en"], {"lang": {"in": ["en"]}}),
        (["tag=a", "tag=b"], {"tag": {"in": ["a", "b"]}}),
        (["year>=2020", "year<2024", "lang!=de"], {"year": {"gte": 2020, "lt": 2024}, "lang": {"ne": "de"}}),
        (["a>b=c"], {"a": {"gt": "b=c"}}),
        (["lang==en", "tag=<b>"], {"lang": {"in": ["en"]}, "tag": {"in": ["<b>"]}}),
        ([], None),
    ],
)
def test_a_filter_has_alternatives_of_a_key_and_bounds(given: list[str], expected: Any) -> None:
    assert parse_where(given) == expected


@pytest.mark.parametrize("given", [["lang"], ["=en"], ["year=>2020"], ["year=< -1"], ["year>1", "year>2"]])
def test_what_is_no_filter_is_told_with_what_to_give(given: list[str]) -> None:
    with pytest.raises(BadInput, match=r"--where '.*': "):
        parse_where(given)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.md", "a/one.md", "a/two.txt", ".hidden/x.md", "a/.hidden.md"):
        path = tmp_path / "docs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    os.mkfifo(tmp_path / "docs/pipe.md")
    (tmp_path / "docs/link.md").symlink_to("b.md")
    (tmp_path / "docs/gone.md").symlink_to("nowhere")
    (tmp_path / "docs/loop").symlink_to(tmp_path / "docs")
    return tmp_path / "docs"


def test_documents_are_the_regular_files_that_are_not_hidden_by_their_paths(tree: Path) -> None:
    problems: list[tuple[str, str]] = []
    found = find_files([tree], Patterns(), None, lambda *problem: problems.append(problem))
    assert [each.document_id for each in found] == ["a/one.md", "a/two.txt", "b.md", "link.md"]
    assert problems == [("gone.md", "cannot be read: No such file or directory")]
    assert found[0].size == len("a/one.md")


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (Patterns(["*.txt"]), ["a/two.txt"]),
        (Patterns(["a/*"]), ["a/one.md", "a/two.txt"]),
        (Patterns(["one.md", "b.md"]), ["a/one.md", "b.md"]),
        (Patterns(["a/*"], ["*.md"]), ["a/two.txt"]),
        (Patterns([], ["*.md"]), ["a/two.txt"]),
    ],
)
def test_a_pattern_is_of_the_name_or_of_the_path(tree: Path, patterns: Patterns, expected: list[str]) -> None:
    (tree / "gone.md").unlink()
    assert [each.document_id for each in find_files([tree], patterns, None, pytest.fail)] == expected


def test_the_id_of_a_file_is_its_name_or_its_path_below_the_base(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree.parent)
    one = Path("docs/a/one.md")
    assert [each.document_id for each in find_files([one], Patterns(), None, pytest.fail)] == ["one.md"]
    assert [each.document_id for each in find_files([one], Patterns(), Path("docs"), pytest.fail)] == ["a/one.md"]
    (other := tree.parent / "one.md").write_text("other")
    with pytest.raises(BadInput, match=r"are both document 'one.md'.*--base"):
        find_files([one, other], Patterns(), None, pytest.fail)
    with pytest.raises(BadInput, match="is not within --base"):
        find_files([other], Patterns(), tree, pytest.fail)
    with pytest.raises(BadInput, match="cannot read 'nothing': No such file"):
        find_files([Path("nothing")], Patterns(), None, pytest.fail)


def test_a_name_that_is_not_unicode_is_an_id_that_can_be_sent(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("x")
    (found,) = find_files([tmp_path], Patterns(), None, pytest.fail)
    assert found.document_id == "caf\ufffd.txt"
    assert found.path.read_text() == "x"


def files(**states: int) -> dict[str, FoundFile]:
    return {key: FoundFile(key, Path(key), 1, changed) for key, changed in states.items()}


def ids(changes: Changes) -> tuple[list[str], list[str]]:
    return [each.document_id for each in changes.files], changes.gone


def test_a_watched_file_is_taken_once_it_stays_the_same_and_is_gone_when_it_is_deleted() -> None:
    watched = Watched()
    changes = watched.look(files(a=1, b=1))
    assert ids(changes) == (["a", "b"], [])
    watched.note(changes)
    assert ids(watched.look(files(a=1, b=2))) == ([], [])
    changes = watched.look(files(a=1, b=2))
    assert ids(changes) == (["b"], [])
    assert ids(watched.look(files(a=1, b=2))) == (["b"], [])  # not noted: it failed for now
    watched.note(changes)
    assert ids(watched.look(files(a=1, b=2))) == ([], [])
    changes = watched.look(files(b=2))
    assert ids(changes) == ([], ["a"])
    watched.note(changes)
    assert ids(watched.look(files(b=2))) == ([], [])


def test_a_file_that_is_deleted_after_it_failed_for_now_is_gone_since_its_job_may_be_stored() -> None:
    watched = Watched()
    watched.begin(watched.look(files(a=1)))
    assert ids(watched.look(files(a=1))) == (["a"], [])
    assert ids(watched.look({})) == ([], ["a"])


def test_what_cannot_be_read_for_now_is_not_gone() -> None:
    watched = Watched()
    watched.note(watched.look(files(a=1) | {"d/b": FoundFile("d/b", Path("d/b"), 1, 1)}))
    assert ids(watched.look({}, ["d"])) == ([], ["a"])
    assert ids(watched.look({}, ["d/b", "a"])) == ([], [])
    assert ids(watched.look({}, ["."])) == ([], [])
