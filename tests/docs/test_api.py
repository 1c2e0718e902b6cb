"""The pages of the API have all public names, each with a sentence of its own."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from tools.docs import api, public
from tools.docs.api import Group, Name


def test_every_public_name_method_property_and_field_has_a_sentence_of_its_own() -> None:
    assert len(public.names()) > 200
    assert api.gaps(public.names()) == []


@dataclass
class Documented:
    """A class for a test; `named` is said here."""

    field: int = 0
    told: int = 0
    """Number that a test reads."""

    def bare(self) -> None: ...

    def named(self) -> None: ...

    def fine(self) -> None:
        """Do what is fine."""

    @property
    def fast(self) -> bool:
        """Fast."""
        return True

    def _private(self) -> None: ...


class Undocumented: ...


def test_a_name_method_property_or_field_without_a_sentence_is_found() -> None:
    found = [Name("m", "Documented", Documented, Documented.__doc__ or ""), Name("m", "Undocumented", Undocumented, "")]
    assert api.gaps(found) == ["m.Documented.bare", "m.Documented.fast", "m.Documented.field", "m.Undocumented"]


def test_every_public_name_of_a_public_module_is_on_a_page() -> None:
    assert public.unlisted() == []


def test_no_name_is_on_two_pages() -> None:
    paths = [each.path for each in public.names()]
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize("group", public.GROUPS, ids=lambda group: group.file)
def test_a_page_has_a_sentence_and_a_section_for_each_of_its_names(group: Group) -> None:
    page = api.render(group)
    for each in group.listed():
        assert f"\n### {each.name}\n\n`from {each.module} import {each.name}`\n" in page
        row = next(line for line in page.splitlines() if line.startswith(f"| `{each.name}` | "))
        assert len(row.split("|")[2].split()) > 1


def test_a_docstring_with_code_becomes_markdown() -> None:
    doc = """Do it, with ``code``::

        first()

        second()

    Then more.
    """
    assert api.paragraphs(doc) == "Do it, with `code`:\n\n```text\nfirst()\n\nsecond()\n```\n\nThen more."


def test_a_signature_has_plain_defaults_and_is_wrapped_where_it_is_long() -> None:
    def call(self: object, a: int, b: str = "x", *, c: object = object, **more: int) -> None: ...

    assert api.signature(call, "call") == "call(a, b='x', *, c=…, **more)"
    assert api.signature(call, "c" * 99).count("\n") == 6


@pytest.mark.parametrize("group", public.GROUPS, ids=lambda group: group.file)
def test_what_a_page_says_to_see_is_public(group: Group) -> None:
    seen = re.findall(r"\b(?:[Ss]ee|[Aa]s of|one of|as in) `(?:aiqueue\.)?([A-Z]\w*)", api.render(group))
    assert set(seen) <= {each.name for each in public.names()}
