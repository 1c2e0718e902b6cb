"""The reference of the errors has all of them, each with a sentence, a remedy, and where to import it from."""

from __future__ import annotations

import importlib
from functools import cache

import aiqueue.errors
from tools.docs import errors, public
from tools.docs.api import Name
from tools.docs.errors import PublicError
from tools.docs.remedies import REMEDIES


# Both read all of aiqueue: not when this file is collected, as each process of a test run does.
@cache
def listed() -> list[PublicError]:
    return errors.list_errors(public.names())


@cache
def page() -> str:
    return errors.render(listed(), REMEDIES)


class NoSentence(aiqueue.errors.AIQueueError):
    pass


class Fine(aiqueue.errors.AIQueueError):
    """Something went wrong there."""


def public_error(kind: type[Exception]) -> PublicError:
    return PublicError(kind, "aiqueue.errors", kind.__doc__ or "", ())


def test_every_error_has_a_sentence_and_a_remedy_of_its_own() -> None:
    assert len(listed()) > 50
    assert errors.gaps(listed(), REMEDIES) == []


def test_an_error_without_a_sentence_or_remedy_and_a_remedy_without_an_error_are_found() -> None:
    faulty = [public_error(NoSentence), public_error(Fine)]
    remedies = {"NoSentence": "Do this and that.", "Fine": "fine", "Gone": "Do this and that."}
    assert errors.gaps(faulty, remedies) == ["NoSentence", "Fine: remedy", "Gone: no such error"]


def test_every_error_class_of_the_package_is_public_or_said_to_be_internal() -> None:
    assert errors.unlisted(listed()) == []
    assert errors.unlisted(listed(), internal=()) == sorted(errors.INTERNAL)


def test_every_error_is_importable_where_its_page_says() -> None:
    for each in listed():
        section = page().partition(f"\n## {each.name}\n")[2].partition("\n## ")[0]
        assert f"`from {each.module} import {each.name}`" in section
        assert getattr(importlib.import_module(each.module), each.name) is each.kind
        assert "- Raised by: `" in section or "- Raised by: what" in section or each.name == "AIQueueError"


def test_the_page_draws_the_tree_of_the_classes() -> None:
    assert "├── BadInput\n│   ├── InvalidToken\n" in page()
    assert page().count("── ") == len([each for each in listed() if each.kind.__bases__[0].__name__ in page()])


def test_what_raises_an_error_is_taken_from_the_docstrings_of_public_calls() -> None:
    def call() -> None:
        """Do it. Raises Conflict, JobFailed if the other was first. NotFound is another matter."""

    found = errors.list_errors([Name("m", "call", call, call.__doc__ or "")], ["aiqueue.errors"])
    assert [each.name for each in found if each.raised_by == ("call",)] == ["Conflict", "JobFailed"]
