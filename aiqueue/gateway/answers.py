"""What a request is answered with, in OpenAI's shape or the short form; and a completion that is made of its chunks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from .providers import Usage

CHOICES_MAX: Final = 128
TOOL_CALLS_MAX: Final = 1_024
DEPTH_MAX: Final = 48  # of what a provider sends, in containers: a result has 64 at most, and stands in others
PLAIN_BYTES_MAX: Final = 4_000  # of JSON: then no number in it has too many digits to be stored
TOKENS_MAX: Final = 10**9  # a larger number of tokens is no number of tokens, and its cost could not be stored

HEAD: Final = ("id", "created", "model", "system_fingerprint", "service_tier")  # of a chunk and a completion
_CONTAINERS = frozenset({dict, list})
# names of the same number in a usage's prompt_tokens_details
_CACHE_WRITES = ("cache_creation_tokens", "cache_write_tokens", "cache_creation_input_tokens")
_GROWING = frozenset({"content", "refusal", "reasoning", "reasoning_content"})  # of a delta: texts that come in parts


class Bill(NamedTuple):
    """What stands beside an answer in its object `aiqueue`.

    `cost`: USD; None: the price is not known. `possibly_billed`: calls before this one of which the provider may have
    billed some, though their answers were lost. `attempts`: how many calls there were. `fallback_of`: the model that
    was asked for, if another one has answered.
    """

    provider: str
    """Name of the provider that has answered."""
    model: str
    """Name of the model that has answered."""
    cost: float | None = None
    possibly_billed: int = 0
    attempts: int = 1
    fallback_of: str | None = None


def answer_of(
    answer: Mapping[str, Any], bill: Bill, *, request_id: str, model: str, reply_form: str = "openai"
) -> dict[str, Any]:
    """Return the result of a request: the provider's answer with an object `aiqueue` beside it, see `shallow`.

    `model`: as the client named it. `reply_form` "short": ``{request_id, response, tokens, cost, model}`` with the
    text of the first choice, and the same `aiqueue`.
    """
    about = {"request_id": request_id, **{name: value for name, value in bill._asdict().items() if value is not None}}
    if reply_form != "short":
        return {**shallow(answer), "model": model, "aiqueue": about}
    usage = usage_of(answer)
    return {
        "request_id": request_id,
        "response": text_of(answer),
        "tokens": None if usage is None else usage.total_tokens,
        "cost": bill.cost,
        "model": model,
        "aiqueue": about,
    }


def shallow(value: Any, levels: int = DEPTH_MAX) -> Any:
    """Return JSON with what is nested deeper than so many levels as text, in JSON: so it can be stored. Else as it is.

    A provider's answer has a few levels; its fields of any shape, such as the arguments of a tool call as an object,
    have as many as the model likes.
    """
    kind = type(value)
    if kind is list:
        if _CONTAINERS.isdisjoint(map(type, value)):  # the quick way, because it may be an embedding
            return value if levels else _as_text(value)
        return [shallow(each, levels - 1) for each in value] if levels else _as_text(value)
    if kind is dict:
        return {name: shallow(each, levels - 1) for name, each in value.items()} if levels else _as_text(value)
    return value


def _as_text(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "…"


def text_of(answer: Mapping[str, Any]) -> str:
    """Return the text of the first choice of a completion; empty if it has none, as for a call of a tool."""
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    message = first.get("message") if isinstance(first, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    return content if isinstance(content, str) else ""


def usage_of(answer: Mapping[str, Any]) -> Usage | None:
    """Return the usage in an answer or a chunk; None if it has none that can be believed."""
    usage = answer.get("usage")
    if not isinstance(usage, Mapping):
        return None
    prompt, completion = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens") or 0)
    if prompt is None or completion is None:
        return None
    total = _count(usage.get("total_tokens"))
    if total is not None:  # some providers count the tokens of reasoning only here
        completion = max(completion, total - prompt)
    details = usage.get("prompt_tokens_details")
    details = details if isinstance(details, Mapping) else {}
    cached = _count(details.get("cached_tokens")) or _count(usage.get("prompt_cache_hit_tokens")) or 0
    counts = [*(_count(details.get(name)) for name in _CACHE_WRITES), _count(usage.get("cache_creation_input_tokens"))]
    written = next(filter(None, counts), 0)
    cached = min(cached, prompt)
    return Usage(prompt, completion, cached, min(written, prompt - cached))


def _count(value: Any) -> int | None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= TOKENS_MAX
    return value if is_count else None


class PlainChunk(dict[str, Any]):
    """A chunk that was read from JSON of at most PLAIN_BYTES_MAX bytes and DEPTH_MAX containers: it can be stored as it
    is, without a look at what it holds.
    """


def from_chunks(chunks: Iterable[dict[str, Any]], choices: int = 1) -> dict[str, Any] | None:
    """Return the completion of so many choices of all its chunks; None if they are not all there, see `is_whole`."""
    made = Completion(choices)
    for each in chunks:
        made.add(each)
    return made.whole() if made.is_whole else None


class Completion:
    """A `chat.completion` that grows with its chunks. What a chunk has that is not OpenAI's is kept or passed over.

    `choices`: how many were asked for.
    """

    def __init__(self, choices: int = 1) -> None:
        self._asked = choices
        self._head: dict[str, Any] = {}
        self._missing = [*HEAD]  # in the head
        self._has_end = False  # of a choice
        self._choices: dict[int, _Choice] = {}
        self._usage: Any = None

    def add(self, chunk: dict[str, Any]) -> None:
        """Add the next chunk."""
        for name in self._missing:
            if chunk.get(name) is not None:
                self._head[name] = chunk[name]
                self._missing = [each for each in self._missing if each != name]
        if chunk.get("usage") is not None:
            self._usage = chunk["usage"]
        choices = chunk.get("choices")
        for each in choices if isinstance(choices, list) else ():
            index = each.get("index", 0) if isinstance(each, dict) else None
            if isinstance(index, int) and 0 <= index < CHOICES_MAX:
                choice = self._choices.get(index)
                if choice is None:
                    choice = self._choices[index] = _Choice()
                choice.add(each)
                self._has_end = self._has_end or choice.finish_reason is not None

    @property
    def is_finished(self) -> bool:
        """Whether there is a choice, and each one has its `finish_reason`."""
        return self._has_end and all(each.finish_reason is not None for each in self._choices.values())

    @property
    def is_whole(self) -> bool:
        """Whether it is finished and no choice can follow: as many as were asked for are there, or the usage is."""
        return self.is_finished and (len(self._choices) >= self._asked or self._usage is not None)

    @property
    def usage(self) -> Usage | None:
        """The usage that the last chunk had."""
        return usage_of({"usage": self._usage})

    def whole(self) -> dict[str, Any]:
        """Return the completion as far as it has come."""
        choices = [self._choices[index].whole(index) for index in sorted(self._choices)]
        made = {"id": "", "created": int(time.time()), "model": "", **self._head}
        made |= {"object": "chat.completion", "choices": choices}
        return made if self._usage is None else {**made, "usage": self._usage}


class _Choice:
    def __init__(self) -> None:
        self.finish_reason: Any = None
        self._message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
        self._texts: dict[str, list[str]] = {}
        self._tool_calls: dict[int, dict[str, Any]] = {}
        self._logprobs: dict[str, list[Any]] = {}

    def add(self, choice: dict[str, Any]) -> None:
        if choice.get("finish_reason") is not None:
            self.finish_reason = choice["finish_reason"]
        if isinstance(logprobs := choice.get("logprobs"), dict):
            for name, values in logprobs.items():
                if isinstance(values, list):
                    self._logprobs.setdefault(name, []).extend(values)
        delta = choice.get("delta")
        for name, value in delta.items() if isinstance(delta, dict) else ():
            if name in _GROWING and isinstance(value, str):
                self._texts.setdefault(name, []).append(value)
            elif name == "tool_calls" and isinstance(value, list):
                for each in value:
                    self._add_tool_call(each)
            elif value is not None:
                self._message[name] = value

    def _add_tool_call(self, part: Any) -> None:
        if not isinstance(part, dict):
            return
        index = part.get("index", len(self._tool_calls))
        if not isinstance(index, int) or not 0 <= index < TOOL_CALLS_MAX:
            return
        call = self._tool_calls.setdefault(index, {})
        for name, value in part.items():
            if name == "index" or value is None:
                continue
            if isinstance(value, dict):
                inner = call.get(name)
                if not isinstance(inner, dict):
                    inner = call[name] = {}
                for key, text in value.items():
                    known = inner.get(key)
                    inner[key] = known + text if isinstance(known, str) and isinstance(text, str) else text
            else:
                call[name] = value

    def whole(self, index: int) -> dict[str, Any]:
        message = {**self._message, **{name: "".join(parts) for name, parts in self._texts.items()}}
        if self._tool_calls:
            message["tool_calls"] = [self._tool_calls[each] for each in sorted(self._tool_calls)]
        choice = {"index": index, "message": message, "finish_reason": self.finish_reason}
        return {**choice, "logprobs": self._logprobs or None}
