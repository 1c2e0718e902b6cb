"""Questions with labels are read, and what each search finds of them is counted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from aiqueue.errors import BadInput
from aiqueue.rag import LabelledQuestion, Mode, Passage, evaluate, read_questions


def passage(document_id: str, heading: str = "", text: str = "") -> Passage:
    return Passage(document_id, 1, "", "", heading, 0, 0, None, text, 1.0, {})


async def test_hits_and_mrr_are_by_the_rank_of_the_first_right_passage() -> None:
    wrong = [passage("other.md")] * 20
    found = {
        "first": [passage("a.md"), *wrong],
        "third": [*wrong[:2], passage("a.md"), passage("a.md")],
        "tenth": [*wrong[:9], passage("a.md")],
        "eleventh": [*wrong[:10], passage("a.md")],
    }

    async def search(question: LabelledQuestion, mode: Mode, k: int) -> Sequence[Passage]:
        assert (mode, k) == ("keyword", 10)
        return found[question.text]

    scores = await evaluate([LabelledQuestion(each, ("a.md",)) for each in found], "keyword", search)
    assert (scores.questions, scores.hit_1, scores.hit_5, scores.hit_10) == (4, 0.25, 0.5, 0.75)
    assert scores.mrr == pytest.approx((1 + 1 / 3 + 1 / 10) / 4)
    assert scores.missed == ("eleventh",)


@pytest.mark.parametrize(
    ("found", "is_right"),
    [
        (passage("a.md", "Guide > install  ON Linux"), True),
        (passage("a.md", "Guide", "text\nInstall on\nLinux\nmore"), True),
        (passage("b.md", "Install on Linux"), True),
        (passage("a.md", "Install on Linux, quickly"), False),
        (passage("c.md", "Install on Linux"), False),
    ],
)
def test_a_labelled_heading_must_be_in_the_passages_path_or_text(found: Passage, is_right: bool) -> None:
    question = LabelledQuestion("q", ("a.md", "b.md"), "Install on Linux")
    assert question.is_answered_by(found) is is_right


def test_questions_are_read_with_one_document_or_several(tmp_path: Path) -> None:
    path = tmp_path / "questions.json"
    one = {"question": "one?", "document": "a.md", "note": "passed over"}
    two = {"question": "two?", "document": ["a.md", "b.md"], "heading": "H", "where": {"lang": "en"}}
    path.write_text(json.dumps([one, two]))
    assert read_questions(path) == [
        LabelledQuestion("one?", ("a.md",)), LabelledQuestion("two?", ("a.md", "b.md"), "H", {"lang": "en"}),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ([], "must be a JSON list of 1 to"),
        ({"question": "q"}, "must be a JSON list of 1 to"),
        (["q"], "question 1: must be"),
        ([{"question": "q", "document": "a"}, {"document": "a"}], "question 2: question must be a text"),
        ([{"question": "q", "document": []}], "question 1: document must be the id"),
        ([{"question": "q", "document": "a", "heading": 1}], "heading must be a text"),
        ([{"question": "q", "document": "a", "where": 1}], "question 1: where: give a mapping"),
        ([{"question": "q", "document": "a"}, {"question": "q", "document": "a", "where": {"y": {"like": 1}}}],
         "question 2: where: y: operator 'like'"),
        ([{"question": "q" * 8_193, "document": "a"}], "question 1: question must be a text of 1 to 8,192"),
        ([{"question": "q", "document": ["a", ""]}], "question 1: the id of a document is empty"),
    ],
)  # fmt: skip
def test_wrong_questions_are_one_line_with_the_question(tmp_path: Path, data: Any, problem: str) -> None:
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(data))
    with pytest.raises(BadInput, match=problem):
        read_questions(path)


def test_a_file_that_is_no_json_or_not_there_is_one_line(tmp_path: Path) -> None:
    (path := tmp_path / "questions.json").write_text("{")
    with pytest.raises(BadInput, match="is not a JSON list of questions"):
        read_questions(path)
    with pytest.raises(BadInput, match="No such file"):
        read_questions(tmp_path / "nothing.json")
