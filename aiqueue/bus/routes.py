"""What a subject means: a queue of jobs, an inbox, requests for results, or plain NATS."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from .. import subjects
from ..errors import BadInput
from ..topology import Family, Topology

SUBJECT_CHARS_MAX = 1_000  # the server closes a connection whose control line is longer than 4 KiB
_TOKEN = re.compile(r"[^\s.\x00-\x1f\x7f]+")
_ALL = ("*", ">")
ROOT = "ai"  # the first token of the wire contract's subjects; no other subject may begin with it
SERVER_STORED = ("$JS.", "$KV.", "$O.")  # the server answers messages on these subjects


class Route(NamedTuple):
    """Where a subject leads.

    - "work": jobs of the family. `last` is a priority, "" on the bare subject.
    - "inbox": mail. `last` is an agent, "" on the bare subject.
    - "answers": requests for results of the family.
    - "plain": subjects of the users' own, and those of journals, dead letters, parked jobs, checkpoints and usage. No
      family.

    `tenant` and `last` are ``*`` for all, in a subscription.
    """

    role: Literal["work", "inbox", "answers", "plain"]
    family: Family | None = None
    tenant: str = ""
    last: str = ""


PLAIN = Route("plain")


def route_of_publish(topology: Topology, subject: str) -> Route:
    """Return where a publish or request to `subject` leads.

    Raises BadInput for a malformed subject of a family, and for one that begins with ``ai.`` and has no meaning.
    """
    tokens = _split(subject)
    if any(each in _ALL for each in tokens):
        raise BadInput(f"subject {subject!r} has a wildcard: publish to one subject, such as ai.agent.tasks.acme")
    if (family := _answered_family(topology, tokens)) is not None:
        return Route("answers", family, subjects.token("tenant", tokens[3]))
    family = _family(topology, tokens)
    if family is None:
        _require_known(topology, subject, tokens)
        return PLAIN
    if len(tokens) not in (4, 5):
        raise BadInput(f"subject {subject!r} is no subject of {family.name}: use {_forms(family)}")
    tenant, last = subjects.token("tenant", tokens[3]), "".join(tokens[4:])
    if family.role == "inbox":
        return Route("inbox", family, tenant, subjects.token("agent", last) if last else "")
    if last and last not in family.priorities:
        raise BadInput(f"{family.name} has no priority {last!r}: use one of {', '.join(family.priorities)}")
    return Route("work", family, tenant, last)


def route_of_subscription(topology: Topology, subject: str, queue: str) -> Route:
    """Return where a subscription leads. Without a queue, subjects of jobs and mail are observed: plain NATS.

    Raises BadInput.
    """
    tokens = _split(subject)
    if not isinstance(queue, str) or (queue and not all(map(_TOKEN.fullmatch, queue.split(".")))):
        raise BadInput(f'queue must be the name of a queue group, such as "agent.workers", not {queue!r}')
    if ">" in tokens[:-1]:
        raise BadInput(f"subject {subject!r}: `>` can only be its last token")
    if (family := _answered_family(topology, tokens)) is not None:
        if tokens[3] == ">":
            root = family.journal
            raise BadInput(
                f"subject {subject!r}: subscribe to {root}.* to answer requests, or to {root}.*.* to observe"
            )
        return Route("answers", family, tokens[3] if tokens[3] == "*" else subjects.token("tenant", tokens[3]))
    family = _family(topology, tokens) if queue else None
    if family is not None:
        return _queue_route(family, subject, tokens[3:])
    covered = next((each for each in topology.families.values() if _covers(tokens, each)), None)
    if queue and covered is not None:
        raise BadInput(
            f"subject {subject!r} covers {covered.name}, and a queue takes the messages of one family: subscribe to "
            f"{_forms(covered)}, or leave out the queue to observe"
        )
    _require_known(topology, subject, tokens)
    return PLAIN


def is_stored(topology: Topology, subject: str) -> bool:
    """Whether the server stores what is published on this subject, and answers it with a PubAck."""
    if subject.startswith(SERVER_STORED):
        return True
    return subject.startswith(f"{ROOT}.") and _overlaps(subject.split("."), _stored(topology))


def check_request(topology: Topology, route: Route, subject: str) -> None:
    """Raise BadInput, which says what to call, if the answer to a request on this subject would be a PubAck."""
    family = route.family
    if route.role == "inbox" and family is not None:
        raise BadInput(
            f"{subject} takes mail, and its readers answer by mail: publish to it, or await the reply with "
            "`Agent.request`"
        )
    if route.role == "work" and family is not None:
        tenant = route.tenant
        answers = f"; or request {family.journal}.{tenant}" if family.reply_within_s else ""
        raise BadInput(
            f"{subject} takes jobs, and answers no requests: publish the job, and await its result with `(await "
            f'nats_client.client.job(published.id, family="{family.name}", tenant="{tenant}")).result()`{answers}'
        )
    if is_stored(topology, subject) and subject.startswith(f"{ROOT}."):
        raise BadInput(f"{subject} is written by workers, and answers no requests: subscribe to it to observe")


def _queue_route(family: Family, subject: str, rest: list[str]) -> Route:
    """Return the route of a subscription with a queue to a family's subject, by the tokens behind the family."""
    if rest in ([">"], ["*"], ["*", "*"], ["*", ">"]):
        return Route(_role(family), family, "*")
    if len(rest) not in (1, 2):
        raise BadInput(f"subject {subject!r} is no subject of {family.name}: use {_forms(family)}")
    tenant = rest[0] if rest[0] == "*" else subjects.token("tenant", rest[0])
    last = "" if len(rest) == 1 or rest[1] in _ALL else rest[1]
    if last and family.role == "work":
        raise BadInput(
            f"subject {subject!r}: a queue takes all priorities of its jobs: subscribe to ai.{family.name}.{tenant}"
        )
    return Route(_role(family), family, tenant, last)


def check_reply(reply: str) -> None:
    """Raise BadInput unless a reply subject is one subject. It becomes part of a line of the protocol as it is."""
    if any(each in _ALL for each in _split(reply, "reply")):
        raise BadInput(f'reply must be one subject, such as "answers.acme", not {str(reply)[:80]!r}')


def _split(subject: str, what: str = "subject") -> list[str]:
    """Return the tokens of a subject. Raises BadInput if it has a token that is empty, or holds a space or a wildcard
    beside other characters.
    """
    tokens = subject.split(".") if isinstance(subject, str) else []
    if not tokens or not all(map(_TOKEN.fullmatch, tokens)):
        raise BadInput(
            f"{what} must be tokens without spaces, joined by dots, such as ai.agent.tasks.acme, not "
            f"{str(subject)[:80]!r}"
        )
    if len(subject) > SUBJECT_CHARS_MAX:
        raise BadInput(f"{what} must have at most {SUBJECT_CHARS_MAX:,} characters, not {len(subject):,}")
    if any(each not in _ALL and ("*" in each or ">" in each) for each in tokens):
        raise BadInput(f"{what} {subject!r}: a wildcard, `*` or `>`, must be a token of its own, as in orders.*")
    return tokens


def _family(topology: Topology, tokens: list[str]) -> Family | None:
    """Return the family whose subjects begin with these tokens."""
    return topology.families.get(".".join(tokens[1:3])) if tokens[0] == "ai" else None


def _answered_family(topology: Topology, tokens: list[str]) -> Family | None:
    """Return the family whose results are requested on this subject."""
    if len(tokens) != 4:
        return None
    root = ".".join(tokens[:3])
    return next((each for each in topology.work_families if each.reply_within_s and each.journal == root), None)


@functools.lru_cache(maxsize=16)
def _stored(topology: Topology) -> tuple[list[str], ...]:
    """Return the tokens of all subjects of the wire contract that a stream stores, with ``*`` for what is variable."""
    forms: list[str] = subjects.usage_filters()
    for family in topology.families.values():
        bare = f"{ROOT}.{family.name}.*"
        forms += [bare, *(f"{bare}.{each}" for each in family.priorities or ("*",)), subjects.dead(family.name)]
        if family.role == "work":
            lane = subjects.Lane(family.name, "*", "*")
            forms += [subjects.lane(*lane[:2], each, "*") for each in family.priorities if family.limit_key]
            forms += [subjects.parked(lane, is_due=each) for each in (False, True)]
            forms.append(subjects.checkpoints(family.name, "*", "*", "*"))
        if family.journal:
            forms.append(subjects.journal(family.journal, "*", "*"))
    return tuple(each.split(".") for each in forms)


def _overlaps(pattern: list[str], forms: Sequence[list[str]]) -> bool:
    """Whether a subject, which may have wildcards, matches a subject of these forms."""
    if pattern[-1] == ">":
        head = pattern[:-1]
        forms = [each[: len(head)] for each in forms if len(each) >= len(pattern)]
    else:
        head = pattern
    return any(
        len(head) == len(form) and all(a == b or "*" in (a, b) for a, b in zip(head, form, strict=True))
        for form in forms
    )


def _require_known(topology: Topology, subject: str, tokens: list[str]) -> None:
    """Raise BadInput, which names the nearest family, for a subject that begins with ``ai`` and has no meaning."""
    if tokens[0].lower() != ROOT:
        return
    answers = [each.journal.split(".") for each in topology.work_families if each.journal and each.reply_within_s]
    if not _overlaps(tokens, [*_stored(topology), *([*each, "*"] for each in answers)]):
        raise BadInput(
            f"subject {subject!r} is unknown: {_nearest(topology, tokens)} Subjects of your own must not begin with "
            f"`{ROOT}.`; families of your own are declared in stream files (setting `streams`)"
        )


def _nearest(topology: Topology, tokens: list[str]) -> str:
    """Return which subject was probably meant, as a sentence for an error text."""
    forms = {f"{ROOT}.{each.name}": _forms(each) for each in topology.families.values()}
    for family in topology.work_families:
        if family.journal:
            asked = f"{family.journal}.{{tenant}} or " if family.reply_within_s else ""
            forms[family.journal] = f"{asked}{family.journal}.{{tenant}}.{{{family.key or 'job_id'}}}"
    advice = topology.advice(".".join(tokens[1:3]))
    if advice and ".".join(tokens[:3]) not in forms:
        return f"{advice}."
    given = [each.lower() for each in tokens]
    close = difflib.get_close_matches(".".join(given[:3]), forms, n=1, cutoff=0.8)
    if close:
        meant = [*close[0].split("."), *tokens[3:]]
        if _answered_family(topology, meant) is not None or _overlaps(meant, _stored(topology)):
            return f"did you mean {'.'.join(meant)}?"
        return f"use {forms[close[0]]}.{advice and f' To request answers: {advice}.'}"
    last_words = {each.rpartition(".")[2]: each for each in forms}
    for word in given[1:]:
        if word in (subjects.DEAD[3:], subjects.PARKED[3:], subjects.CHECKPOINTS[3:]):
            return f"docs/reference/wire-contract.md has the forms of {ROOT}.{word}, which contain a declared family."
        if close := difflib.get_close_matches(word, last_words, n=1, cutoff=0.8):
            return f"use {forms[last_words[close[0]]]}."
    return f"the families' subjects begin with {', '.join(f'{ROOT}.{each}' for each in sorted(topology.families))}."


def _role(family: Family) -> Literal["work", "inbox"]:
    return "inbox" if family.role == "inbox" else "work"


def _forms(family: Family) -> str:
    """Return the subjects of a family, for error texts."""
    last = "{agent}" if family.role == "inbox" else "{priority}"
    return f"ai.{family.name}.{{tenant}} or ai.{family.name}.{{tenant}}.{last}"


def _covers(pattern: list[str], family: Family) -> bool:
    """Whether a pattern with wildcards matches a subject of a family."""
    open_ended = pattern[-1] == ">"
    head = (pattern[:-1] if open_ended else pattern)[:3]  # what follows may be any tenant and priority
    if not (len(pattern) <= 5 if open_ended else 4 <= len(pattern) <= 5):
        return False
    return all(each in ("*", token) for each, token in zip(head, ["ai", *family.name.split(".")], strict=False))
