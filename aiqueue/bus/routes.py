"""What a subject means: a queue of jobs, an inbox, requests for results, or plain NATS."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from .. import subjects
from ..errors import BadInput
from ..topology import Family, Topology

SUBJECT_CHARS_MAX = 1_000  # the server closes a connection whose control line is longer than 4 KiB
_TOKEN = re.compile(r"[^\s.\x00-\x1f\x7f]+")
_ALL = ("*", ">")


class Route(NamedTuple):
    """Where a subject leads.

    - "work": jobs of the family. `last` is a priority, "" on the bare subject.
    - "inbox": mail. `last` is an agent, "" on the bare subject.
    - "answers": requests for results of the family.
    - "plain": everything else; it has no family.

    `tenant` and `last` are ``*`` for all, in a subscription.
    """

    role: Literal["work", "inbox", "answers", "plain"]
    family: Family | None = None
    tenant: str = ""
    last: str = ""


PLAIN = Route("plain")


def route_of_publish(topology: Topology, subject: str) -> Route:
    """Return where a publish or request to `subject` leads. Raises BadInput for a malformed subject of a family."""
    tokens = _split(subject)
    if any(each in _ALL for each in tokens):
        raise BadInput(f"subject {subject!r} has a wildcard: publish to one subject, such as ai.agent.tasks.acme")
    if (family := _answered_family(topology, tokens)) is not None:
        return Route("answers", family, subjects.token("tenant", tokens[3]))
    family = _family(topology, tokens)
    if family is None:
        return PLAIN
    if len(tokens) not in (4, 5):
        raise BadInput(f"subject {subject!r} is none of {family.name}: use {_forms(family)}")
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
        return Route("answers", family, tokens[3] if tokens[3] == "*" else subjects.token("tenant", tokens[3]))
    if not queue:
        return PLAIN
    family = _family(topology, tokens)
    if family is not None:
        return _queue_route(family, subject, tokens[3:])
    covered = next((each for each in topology.families.values() if _covers(tokens, each)), None)
    if covered is not None:
        raise BadInput(
            f"subject {subject!r} covers {covered.name}, and a queue takes the messages of one family: subscribe to "
            f"{_forms(covered)}, or leave out the queue to observe"
        )
    return PLAIN


def _queue_route(family: Family, subject: str, rest: list[str]) -> Route:
    """Return the route of a subscription with a queue to a family's subject, by the tokens behind the family."""
    if rest in ([">"], ["*"], ["*", "*"], ["*", ">"]):
        return Route(_role(family), family, "*")
    if len(rest) not in (1, 2):
        raise BadInput(f"subject {subject!r} is none of {family.name}: use {_forms(family)}")
    tenant = rest[0] if rest[0] == "*" else subjects.token("tenant", rest[0])
    last = "" if len(rest) == 1 or rest[1] in _ALL else rest[1]
    if last and family.role == "work":
        raise BadInput(
            f"subject {subject!r}: a queue takes all priorities of its jobs: subscribe to ai.{family.name}.{tenant}"
        )
    return Route(_role(family), family, tenant, last)


def _split(subject: str) -> list[str]:
    """Return the tokens of a subject. Raises BadInput if it has a token that is empty or holds a space."""
    tokens = subject.split(".") if isinstance(subject, str) else []
    if not tokens or not all(map(_TOKEN.fullmatch, tokens)) or len(subject) > SUBJECT_CHARS_MAX:
        raise BadInput(
            f"subject must be tokens without spaces, joined by dots, such as ai.agent.tasks.acme, not "
            f"{str(subject)[:80]!r}"
        )
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
