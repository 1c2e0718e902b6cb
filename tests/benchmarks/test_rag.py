"""The judges of retrieval: what they say of passages, chunks and versions that are known."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.rag import SCENARIOS, corpus, judge, labelled, main, texts, witness
from benchmarks.rag.facts import StoredChunk, hash_of
from benchmarks.rag.labelled import Question

from ..support import ROOT

ASKED = Question("how long", "p/a.html", "Time limits")
RIGHT = judge.Found("p/a.html", "Manual > Time limits", "An hour.")


def test_a_passage_answers_only_from_the_labelled_document_and_section() -> None:
    assert judge.answers(ASKED, RIGHT)
    assert judge.answers(ASKED, judge.Found("p/a.html", "Manual > 4.2. Time Limits¶", "An hour."))
    assert judge.answers(ASKED, judge.Found("p/a.html", "Manual", "Much else. Time limits: an hour."))
    assert not judge.answers(ASKED, judge.Found("p/b.html", "Manual > Time limits", "An hour."))
    assert not judge.answers(ASKED, judge.Found("p/a.html", "Manual > Sizes", "A megabyte."))
    assert judge.answers(Question("how long", "p/a.html"), judge.Found("p/a.html", "Manual > Sizes", "A megabyte."))


def test_ranks_become_shares_and_a_reciprocal_mean() -> None:
    wrong = judge.Found("p/b.html", "", "")
    assert [judge.rank(ASKED, [wrong] * n + [RIGHT]) for n in (0, 4, 9, 10)] == [1, 5, 10, 0]
    assert judge.scores([1, 2, 10, 0]) == judge.Scores(0.25, 0.5, 0.75, (1 + 1 / 2 + 1 / 10) / 4)


def test_hybrid_below_one_of_its_parts_is_a_violation() -> None:
    low, high = judge.Scores(0.1, 0.5, 0.6, 0.3), judge.Scores(0.1, 0.4, 0.6, 0.4)
    violated = [
        [
            each.name
            for each in judge.compare("set", {"keyword": low, "vector": low, "hybrid": hybrid})
            if not each.holds
        ]
        for hybrid in (low, high)
    ]
    assert violated == [[], ["set, hybrid beyond keyword, hit@5", "set, hybrid beyond vector, hit@5"]]


def stored(*texts_: str) -> Counter[StoredChunk]:
    return Counter(StoredChunk("d", number, hash_of(text)) for number, text in enumerate(texts_))


def hashes(*texts_: str) -> Counter[bytes]:
    return Counter(map(hash_of, texts_))


def test_chunks_embedded_again_are_explained_only_by_what_was_in_flight_at_a_kill() -> None:
    calm = hashes("a", "b", "c", "heading")
    lost = [(hashes("a", "b"), hashes("a"))]  # the killed worker had embedded both, and a was stored
    explained = judge.embedded(stored("a", "b", "c"), calm, hashes("a", "b", "b", "c"), lost)
    assert (explained.in_flight, explained.disturbed, explained.unexplained) == ([1], 4, 0)
    assert judge.embedded(stored("a", "b", "c"), calm, hashes("a", "b", "b", "c", "c"), lost).unexplained == 1


def test_a_text_that_stands_twice_in_the_corpus_is_not_counted() -> None:
    found = judge.embedded(stored("a", "b", "b"), hashes("a", "b", "b"), hashes("a", "b", "b", "b"), [])
    assert (found.undisturbed, found.disturbed) == (1, 1)


def test_chunks_that_were_embedded_as_other_texts_cannot_be_counted() -> None:
    with pytest.raises(RuntimeError, match="1 of 2 stored chunks were not embedded by their own text"):
        judge.embedded(stored("a", "b"), hashes("a", "title b"), hashes("a"), [])


def test_the_last_version_by_the_stream_is_the_right_one_whatever_the_order_of_the_acts() -> None:
    acts = {"d": [judge.Act(7, "mark2x"), judge.Act(9, ""), judge.Act(3, "mark1x")]}
    assert judge.wrong_versions(acts, {}) == []
    assert judge.wrong_versions(acts, {"d": ["mark2x."]}) == ["d"]
    again = {"d": [*acts["d"], judge.Act(11, "mark3x")]}
    assert judge.wrong_versions(again, {"d": ["mark3x.", "more"]}) == []
    assert [judge.wrong_versions(again, each) for each in ({}, {"d": ["mark3x.", "mark1x."]})] == [["d"], ["d"]]


def test_what_a_killed_embedder_was_given_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "t.1").write_bytes(hash_of("a") + hash_of("b") + b"cut")
    (tmp_path / "t.2").write_bytes(hash_of("a"))
    assert witness.embedded(tmp_path, "t") == hashes("a", "a", "b")
    assert witness.embedded(tmp_path, "t", 2) == hashes("a")


def test_headings_are_drawn_the_same_each_time_and_stand_once(tmp_path: Path) -> None:
    long = "Some words of its text. " * 30
    (tmp_path / "a.html").write_text(
        f"<h1>1. The first page</h1>{long}<nav><h2>Not a heading</h2>{long}</nav><h2>Stands twice</h2>{long}"
        f"<h2>Too short a text</h2>few<h2>Second of these¶</h2><p>{long}</p>"
    )
    (tmp_path / "b.md").write_text(f"# Stands twice\n{long}\n```\n# no heading\n```\n## 2024-01-01 (3.1)\n{long}")
    pages = [corpus.Page("p", each.name, each) for each in sorted(tmp_path.iterdir())]
    drawn = labelled.headings(pages)
    assert {(each.text, each.document) for each in drawn} == {
        ("The first page", "p/a.html"), ("Second of these", "p/a.html"),
    }  # fmt: skip
    assert labelled.headings(pages) == drawn


def test_every_question_is_a_sentence_of_its_own_and_names_a_page_of_a_package() -> None:
    rows = json.loads(labelled.QUESTIONS.read_text())
    assert len(rows) >= 100
    assert len({row["question"] for row in rows}) == len(rows)
    assert {row["package"] for row in rows} == set(corpus.PACKAGES)
    assert [row for row in rows if not row["document"].startswith("usr/share/doc/")] == []


def test_a_corpus_that_is_not_there_is_named_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"apt-get download python3\.11-doc"), corpus.pages(tmp_path, tmp_path):
        pass


def test_made_documents_have_their_size_and_are_the_same_each_time() -> None:
    made = [texts.document(number) for number in range(50)]
    assert all(900 <= len(each) <= 2_000 for each in made)
    assert made == [texts.document(number) for number in range(50)]
    assert len(set(made)) == 50


def test_an_unknown_scenario_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["nothing"])
    assert "choose from quality, " in capsys.readouterr().err


def test_the_help_names_every_scenario() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "rag", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert [name for name in SCENARIOS if name not in done.stdout] == []
