"""What counts as a sentence of its own, and where it is found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import pytest

from tools.docs.sentences import (
    attribute_sentences,
    docstring_items,
    first_sentence,
    is_sentence,
    own_doc,
    sentence_about,
)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Print JSON.", "--json"),
        ("Bytes of all lanes", "max_bytes"),
        ("None for jobs without one.", "deadline"),
    ],
)
def test_a_text_with_a_stop_or_of_three_words_that_adds_a_word_to_the_name_is_a_sentence(text: str, name: str) -> None:
    assert is_sentence(text, name)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("", "tenant"), ("  ", "tenant"), ("tenant", "tenant"), ("Tenant.", "tenant"),
        ("The tenant.", "tenant"), ("the job id", "job_id"), ("Id of the job", "job_id"),
        ("max bytes", "max_bytes"), ("The queue full.", "QueueFull"), ("a text", "name"),
    ],
)  # fmt: skip
def test_a_name_that_is_repeated_is_no_sentence(text: str, name: str) -> None:
    assert not is_sentence(text, name)


@dataclass
class _Inner:
    """A class.

    `first`: text of the first, with a `name`: inside. `second`, `third`: what two have in common.
    - `fourth`: the fourth one,
      on two lines. `seventh`,
      `eighth`: of both, beside the `ninth`.
    - **a word**: what it means for the `ninth`
    """

    first: int
    second: int
    third: int
    fourth: int
    fifth: int
    """Text below the fifth.

    It has two paragraphs."""
    sixth: int


class _Outer(_Inner):
    sixth: int
    """Text of the sixth, in a subclass."""


class _Plain(TypedDict):
    key: int
    """Text of a key."""


class _Wider(_Plain):
    more: int
    """Text of another key."""


class _Made(NamedTuple):
    n: int


def test_sentences_stand_below_attributes_and_in_the_docstring_of_their_class() -> None:
    assert attribute_sentences(_Outer) == {
        "first": "text of the first, with a `name`: inside.",
        "second": "what two have in common.",
        "third": "what two have in common.",
        "fourth": "the fourth one, on two lines.",
        "seventh": "of both, beside the `ninth`.",
        "eighth": "of both, beside the `ninth`.",
        "fifth": "Text below the fifth. It has two paragraphs.",
        "sixth": "Text of the sixth, in a subclass.",
    }
    assert attribute_sentences(_Wider) == {"key": "Text of a key.", "more": "Text of another key."}


def test_an_item_ends_where_the_next_one_or_its_paragraph_ends() -> None:
    assert docstring_items("One. `a`: of a. `b` and `c`: of both.\n\nMore.") == {
        "a": "of a.", "b": "of both.", "c": "of both.",
    }  # fmt: skip


def test_a_list_says_nothing_of_the_names_inside_its_items() -> None:
    doc = "It has a `name`.\n\n- **ready**: after `wait_s`\n- `first`: with `wait_s`\n\n`second`: of `wait_s`."
    assert sentence_about(doc, "name") == "It has a `name`."
    assert sentence_about(doc, "wait_s") == ""
    assert sentence_about(f"{doc} Then `wait_s` ends.", "wait_s") == "Then `wait_s` ends."


@pytest.mark.parametrize(
    ("doc", "first"),
    [
        ("One. Two.", "One."),
        ("One\nline: 0.1 to 3. Two", "One line: 0.1 to 3."),
        ("Whole `a.b` text", "Whole `a.b` text"),
        ("One.\n\nTwo", "One."),
        (None, ""),
    ],
)
def test_the_first_sentence_ends_with_its_stop(doc: str | None, first: str) -> None:
    assert first_sentence(doc) == first


def test_a_docstring_that_python_makes_is_none() -> None:
    assert own_doc(_Made) == ""
    assert own_doc(_Inner).startswith("A class.")
    assert own_doc(_Outer) == ""
