"""The committed pages of docs/reference are those that the code makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.docs import __main__ as tool


def test_the_committed_reference_is_what_the_tool_writes() -> None:
    assert sorted(tool.differing()) == [], f"run `{tool.COMMAND}` and commit docs/reference"


def test_a_page_that_was_changed_or_is_missing_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {"cli.md": "commands", "settings.md": "settings", "api/client.md": "a client"}
    monkeypatch.setattr(tool, "render_all", lambda: pages)
    for name, text in pages.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert tool.differing(tmp_path) == {}
    (tmp_path / "cli.md").write_text("another text")
    (tmp_path / "settings.md").unlink()
    assert sorted(tool.differing(tmp_path)) == ["cli.md", "settings.md"]


def test_check_writes_nothing_and_fails_where_a_page_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tool, "differing", lambda: {"cli.md": "text"})
    monkeypatch.setattr(tool, "DIRECTORY", tmp_path)
    assert tool.main(["reference", "--check"]) == 1
    assert list(tmp_path.iterdir()) == []
    assert tool.main(["reference"]) == 0
    assert (tmp_path / "cli.md").read_text() == "text"
    assert "python -m tools.docs reference" in capsys.readouterr().err
