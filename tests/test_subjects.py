"""Tokens, subjects and ids."""

from __future__ import annotations

import base64
import functools
import operator
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiqueue import subjects
from aiqueue.errors import InvalidToken

GOOD = st.from_regex(r"\A[A-Za-z0-9_-]{1,64}\Z")
BAD_SIGN = st.characters().filter(lambda c: not (c.isascii() and (c.isalnum() or c in "_-")))


@given(GOOD)
def test_every_text_of_the_allowed_characters_is_a_token(text: str) -> None:
    assert subjects.token("tenant", text) == text


@given(st.text(max_size=30), BAD_SIGN, st.text(max_size=30))
def test_a_text_with_any_other_character_is_refused_naming_what_it_was_for(before: str, sign: str, after: str) -> None:
    with pytest.raises(InvalidToken, match=r"^tenant ") as caught:
        subjects.token("tenant", before + sign + after)
    assert caught.value.what == "tenant"
    assert caught.value.value == before + sign + after
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value", ["", "a.b", "*", ">", "a b", "a\n", "\n", "a\x00", "é", "\u0661", "a/b", "x" * 65, None, 5, b"acme", True]
)
def test_what_could_break_a_subject_is_refused(value: object) -> None:
    with pytest.raises(InvalidToken, match="unique key"):
        subjects.token("unique key", value)


def test_the_refusal_of_a_huge_text_stays_short() -> None:
    with pytest.raises(InvalidToken) as caught:
        subjects.token("tenant", "x" * 1_000_000)
    assert len(str(caught.value)) < 250
    assert "1000000" in str(caught.value)


def test_a_subject_is_never_built_of_a_bad_tenant() -> None:
    with pytest.raises(InvalidToken):
        subjects.work("agent.tasks", "acme.>")


def test_normal_jobs_go_to_the_guides_bare_subject_and_others_to_their_lane() -> None:
    assert subjects.work("agent.tasks", "acme") == "ai.agent.tasks.acme"
    assert subjects.work("agent.tasks", "acme", "high") == "ai.agent.tasks.acme.high"


@given(GOOD, st.from_regex(r"\A[a-z0-9]{1,16}\Z"))
def test_a_lane_is_read_back_from_its_subject(tenant: str, priority: str) -> None:
    lane = subjects.parse_lane(subjects.lane("rag.ingest", tenant, priority))
    assert lane == ("rag.ingest", tenant, priority, "")


@given(GOOD, st.from_regex(r"\A[a-z0-9]{1,16}\Z"), st.text(min_size=1))
def test_the_lane_of_a_limited_key_is_read_back_whatever_the_key_is(tenant: str, priority: str, key: str) -> None:
    token = subjects.hashed(key)
    lane = subjects.Lane("rag.ingest", tenant, priority, token)
    assert subjects.parse_lane(subjects.lane(*lane)) == lane
    assert subjects.parse_hint(subjects.hint(lane)) == lane
    assert subjects.work(*lane) == subjects.lane(*lane)


@pytest.mark.parametrize("subject", ["", "ai.agent.tasks.acme", "x.agent.tasks.acme.high", "ai.a.b.c.d.e.f"])
def test_other_subjects_are_no_lanes(subject: str) -> None:
    assert subjects.parse_lane(subject) is None


def test_ids_are_tokens_of_one_length_and_none_comes_twice() -> None:
    ids = [subjects.new_id() for _ in range(20_000)]
    assert len(set(ids)) == len(ids)
    assert {len(each) for each in ids} == {26}
    assert all(subjects.TOKEN.fullmatch(each) for each in ids)


def test_an_id_made_in_a_later_millisecond_sorts_behind() -> None:
    ids = []
    for _ in range(20):
        ids.append(subjects.new_id())
        started_ms = time.time_ns() // 1_000_000
        while time.time_ns() // 1_000_000 == started_ms:
            pass
    assert ids == sorted(ids)


def test_an_id_is_sixteen_bytes_of_which_six_are_the_time() -> None:
    before = time.time_ns() // 1_000_000
    made = [base64.b32hexdecode(subjects.new_id().upper() + "======") for _ in range(1_000)]
    assert all(len(each) == 16 for each in made)
    assert all(before <= int.from_bytes(each[:6], "big") <= time.time_ns() // 1_000_000 for each in made)
    for byte in range(6, 16):  # every bit of the rest comes both ways
        every = [each[byte] for each in made]
        assert functools.reduce(operator.or_, every) == 255
        assert functools.reduce(operator.and_, every) == 0


def test_a_forked_process_makes_ids_of_its_own() -> None:
    script = (
        "import os, sys\nfrom aiqueue import subjects\nsubjects.new_id()\n"
        "child = os.fork() == 0\nids = ' '.join(subjects.new_id()[10:] for _ in range(10)) + '\\n'\n"
        "os.write(1, ids.encode())\nchild or os.wait()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=30)
    assert len(set(done.stdout.split())) == 20


@given(st.text())
def test_a_foreign_key_always_becomes_the_same_token(key: str) -> None:
    made = subjects.foreign_id(key)
    assert subjects.TOKEN.fullmatch(made)
    assert made == subjects.foreign_id(key)


@given(GOOD)
def test_a_foreign_key_that_is_a_token_stays_as_it_is(key: str) -> None:
    assert subjects.foreign_id(key) == key


@given(st.text(), st.text())
def test_different_foreign_keys_become_different_ids(one: str, other: str) -> None:
    assert (one == other) == (subjects.foreign_id(one) == subjects.foreign_id(other))


def test_a_lone_surrogate_is_a_foreign_key_like_any_other() -> None:
    assert subjects.TOKEN.fullmatch(subjects.foreign_id("\ud800"))


PLACE = st.tuples(st.sampled_from(["agent.tasks", "a.b", "a-b.c_d"]), GOOD, GOOD, GOOD | st.just(""))


@given(PLACE, PLACE)
def test_message_ids_differ_wherever_family_tenant_key_or_move_does(
    one: tuple[str, ...], other: tuple[str, ...]
) -> None:
    assert (one == other) == (subjects.msg_id(*one) == subjects.msg_id(*other))
