"""The reference of the settings has all of them, each with a sentence of its own."""

from __future__ import annotations

from typing import Literal

import pydantic

from aiqueue.config import Settings
from tools.docs import settings


class _Settings(pydantic.BaseModel):
    named: int = pydantic.Field(3, ge=1, le=9)
    """How many there are."""
    bare: str = ""
    repeated: Literal["a", "b"] = "a"
    """Repeated."""


def test_every_setting_has_a_sentence_of_its_own() -> None:
    assert settings.gaps(Settings) == []


def test_a_setting_without_a_sentence_is_found() -> None:
    assert settings.gaps(_Settings) == ["bare", "repeated"]


def test_a_setting_is_shown_with_its_variable_values_and_default() -> None:
    page = settings.render(_Settings)
    assert "| `named` | `AIQUEUE_NAMED` | whole number, from 1, to 9 | `3` | How many there are. |" in page
    assert "| `repeated` | `AIQUEUE_REPEATED` | `a` or `b` | `a` | Repeated. |" in page
    assert "| `claim_check` | `AIQUEUE_CLAIM_CHECK` | size, from 0 | `256KiB` |" in settings.render(Settings)
