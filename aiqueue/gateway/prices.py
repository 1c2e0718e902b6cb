"""What model calls cost. Amounts are whole micro-dollars (millionths of a US dollar, `…_micros`), rounded up."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Context, Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NamedTuple, Self

from ..errors import BadInput

MICROS = 1_000_000  # of a dollar
DIGITS_MAX = 30
USD_MAX = 1_000_000_000  # of one amount
PRICE_MAX = 1_000_000  # of a million tokens
MAP_FILE = "model_prices_and_context_window_backup.json"
_MODES = ("chat", "completion", "responses", "embedding")
CACHE_WRITE_DEAREST = 2  # times the input: what a provider takes at most for a token that it puts into its cache
PLAIN_TIERS = (None, "default", "auto", "standard")  # of a request: what they cost is the price without a tier
_TIERS = {None: "", "default": "", "auto": "", "standard": "", "priority": "_priority", "flex": "_flex"}
_ABOVE = re.compile(r"input_cost_per_token_above_(\d{1,6})k_tokens")
_EXACT = Context(prec=60)


class PriceUnknown(BadInput):
    """A call of a tenant with a budget, and nobody knows what it would cost. `tier`: the service tier that it asks for,
    if the price is known without.
    """

    def __init__(self, tenant: str, model: str, tier: str = "") -> None:
        problem = f"tenant {tenant} has a budget, and the price of model {model} "
        if tier:
            problem += f"in gateway.toml is not that of service_tier {tier[:64]!r}: ask for it without service_tier"
        else:
            problem += "is unknown: give the model a price in gateway.toml"
        super().__init__(problem)
        self.tenant, self.model = tenant, model


def parse_usd(value: object, most: int = USD_MAX) -> Decimal:
    """Return dollars from a number or a text such as "12.50", from 0 to `most`. Raises ValueError."""
    found = Decimal("NaN")
    if not isinstance(value, bool) and isinstance(value, int | float | str | Decimal):
        with contextlib.suppress(InvalidOperation):
            found = Decimal(str(value))
    if not (found.is_finite() and 0 <= found <= most) or len(found.as_tuple().digits) > DIGITS_MAX:
        raise ValueError(f"must be an amount of US dollars from 0 to {most:,}, not {value!r:.80}")
    return found


def to_micros(usd: Decimal) -> int:
    """Return an amount of dollars in micro-dollars, rounded up."""
    return _ceil(_EXACT.multiply(usd, Decimal(MICROS)))


def format_usd(micros: int) -> str:
    """Return micro-dollars as text: "$1,234.50"; with as many digits as needed, and at least two: "$0.000012"."""
    whole, part = divmod(abs(micros), MICROS)
    digits = f"{part:06d}".rstrip("0").ljust(2, "0")
    return f"{'-' if micros < 0 else ''}${whole:,}.{digits}"


def _ceil(value: Decimal) -> int:
    return int(value.to_integral_value(ROUND_CEILING))


class Rates(NamedTuple):
    """US dollars a million tokens, which are micro-dollars a token.

    `cached`: of prompt tokens that the provider has read from its cache. `cache_write`: of those that it has put there.
    """

    input: Decimal
    output: Decimal
    cached: Decimal
    cache_write: Decimal

    def cost(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int, cache_write_tokens: int) -> int:
        parts = (
            (self.input, prompt_tokens - cached_tokens - cache_write_tokens),
            (self.output, completion_tokens),
            (self.cached, cached_tokens),
            (self.cache_write, cache_write_tokens),
        )
        return _ceil(sum((_EXACT.multiply(rate, Decimal(tokens)) for rate, tokens in parts), Decimal(0)))


@dataclass(frozen=True, slots=True)
class Price:
    """What tokens of a model cost.

    `above`: the rates of calls whose prompt has more tokens than a number, as (number, rates), lowest first.
    `bounds_cache_writes`: whether the bound of a call counts that its whole prompt may be put into the cache.
    """

    rates: Rates
    """What a token costs, by its type."""
    above: tuple[tuple[int, Rates], ...] = ()
    bounds_cache_writes: bool = True

    @classmethod
    def of(cls, input: object, output: object, cached: object = None, cache_write: object = None) -> Self:  # noqa: A002
        """Return a price from US dollars a million tokens, as numbers or texts. Raises ValueError.

        `cached`: None: as the input. `cache_write`: None: twice the input, the most that a provider takes, which a
        bound counts only after `bounding_cache_writes`.
        """
        given, answered = (parse_usd(each, PRICE_MAX) for each in (input, output))
        read = given if cached is None else parse_usd(cached, PRICE_MAX)
        written = given * CACHE_WRITE_DEAREST if cache_write is None else parse_usd(cache_write, PRICE_MAX)
        return cls(Rates(given, answered, read, written), bounds_cache_writes=cache_write is not None)

    def bounding_cache_writes(self) -> Self:
        """Return this price with bounds for a call whose whole prompt may be put into the cache."""
        return self if self.bounds_cache_writes else replace(self, bounds_cache_writes=True)

    def cost_micros(
        self, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0, cache_write_tokens: int = 0
    ) -> int:
        """Return what a call has cost. `cached_tokens` and `cache_write_tokens` are parts of `prompt_tokens`."""
        prompt = max(0, prompt_tokens)
        cached = min(max(0, cached_tokens), prompt)
        written = min(max(0, cache_write_tokens), prompt - cached)
        rates = self.rates
        for tokens, each in self.above:
            if prompt > tokens:
                rates = each
        return rates.cost(prompt, max(0, completion_tokens), cached, written)

    def bound_micros(self, prompt_tokens_max: int, completion_tokens_max: int) -> int:
        """Return what a call costs at most that uses at most so many tokens, of whatever kind; see
        `bounds_cache_writes`.
        """
        reached = [self.rates, *(rates for tokens, rates in self.above if prompt_tokens_max > tokens)]
        prompt = max(max(each.input, each.cached) for each in reached)
        if self.bounds_cache_writes:
            prompt = max(prompt, *(each.cache_write for each in reached))
        dearest = Rates(prompt, max(each.output for each in reached), Decimal(0), Decimal(0))
        return dearest.cost(max(0, prompt_tokens_max), max(0, completion_tokens_max), 0, 0)


class KnownModel(NamedTuple):
    """What the price map says of a model. None: the map does not say."""

    price: Price | None
    context: int | None  # tokens of prompt and completion together, or of the prompt
    max_output_tokens: int | None


class PriceMap:
    """The bundled price map of the package litellm, read as a file: litellm is not imported.

    It takes some 20 MB while it is held.
    """

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self._entries = entries

    @classmethod
    def load(cls, file: Path | None = None) -> Self:
        """Read the map, by default of the installed litellm; an empty one if that is not installed, or has none."""
        file = find_map_file() if file is None else file
        if file is None:
            return cls({})
        try:
            entries = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return cls({})
        return cls(entries if isinstance(entries, dict) else {})

    def find(
        self, model: str, provider: str | None = None, *, service_tier: str | None = None, audio: bool = False
    ) -> KnownModel:
        """Return what is known of a provider's model, such as ("gpt-4o", "openai") or ("anthropic/claude-sonnet-4-5").

        - `provider`: litellm's name of it. A model that somebody else serves under the same name is not found.
        - `service_tier`: as in a request: "priority" and "flex" have prices of their own.
        - `audio`: the request or its answer may contain audio, whose tokens can cost more.
        - The price of a model that also charges by request is None.
        """
        entry = self._entry(model, provider)
        if entry is None:
            return KnownModel(None, None, None)
        price = None
        if service_tier in _TIERS and not entry.get("input_cost_per_request"):
            price = _price(entry, _TIERS[service_tier], audio=audio)
        output = _tokens(entry.get("max_output_tokens")) or _tokens(entry.get("max_tokens"))
        return KnownModel(price, _tokens(entry.get("max_input_tokens")), output)

    def _entry(self, model: str, provider: str | None) -> Mapping[str, Any] | None:
        head, _, rest = model.partition("/")
        if provider is None and rest:
            provider, names = head, [model, rest]
        else:
            names = [f"{provider}/{model}", model, rest if head == provider else model]
        for name in names:
            entry = self._entries.get(name)
            if not isinstance(entry, dict) or entry.get("mode") not in _MODES:
                continue
            served_by = str(entry.get("litellm_provider") or "")
            if provider is None or served_by == provider or served_by.startswith((f"{provider}_", f"{provider}-")):
                return entry
        return None


def find_map_file() -> Path | None:
    """Return the file of the installed litellm's price map, None if there is none."""
    try:
        spec = importlib.util.find_spec("litellm")
    except (ImportError, ValueError):
        return None
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (file := Path(place) / MAP_FILE).is_file():
            return file
    return None


def _price(entry: Mapping[str, Any], tier: str, *, audio: bool) -> Price | None:
    """Return the price in an entry of the map, None if it does not state one that can be relied on."""
    steps = entry.get("tiered_pricing")
    if isinstance(steps, list) and steps:
        return None if tier else _stepped(steps)
    rates = _rates(entry, tier, "", audio=audio)
    if rates is None:
        return None
    above = []
    for thousands in sorted({int(found[1]) for key in entry if (found := _ABOVE.fullmatch(key))}):
        dearer = _rates(entry, tier, f"_above_{thousands}k_tokens", audio=audio)
        if dearer is None:
            return None
        above.append((thousands * 1000, dearer))
    return Price(rates, tuple(above))


def _stepped(steps: list[Any]) -> Price | None:
    found: list[tuple[int, Rates]] = []
    for each in steps:
        start = each.get("range") if isinstance(each, dict) else None
        rates = _rates(each, "", "", audio=False) if isinstance(each, dict) else None
        if rates is None or not isinstance(start, list) or not start or not isinstance(start[0], int | float):
            return None
        found.append((int(start[0]), rates))
    found.sort(key=lambda each: each[0])
    return Price(found[0][1], tuple(found[1:])) if found[0][0] == 0 else None


def _rates(entry: Mapping[str, Any], tier: str, above: str, *, audio: bool) -> Rates | None:
    """Return the rates of a service tier, and of prompts above a size. What they do not state is as without."""

    def rate(name: str) -> Decimal | None:
        if above and stated(name + above + tier) is None:  # the dearer one of what is stated: of the tier, of the size
            return max([each for each in (stated(name + tier), stated(name + above)) if each is not None], default=None)
        return stated(name + above + tier)

    def stated(name: str) -> Decimal | None:
        value = entry.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1:
            return _EXACT.multiply(Decimal(str(value)), Decimal(1_000_000))
        return None

    given, answered = rate("input_cost_per_token"), rate("output_cost_per_token")
    if answered is None and entry.get("mode") == "embedding":
        answered = Decimal(0)
    if given is None or answered is None:
        return None
    written = [rate("cache_creation_input_token_cost"), rate("cache_creation_input_token_cost_above_1hr")]
    written.append(rate("cache_creation_input_token_cost_above_12hr"))
    cached = rate("cache_read_input_token_cost")
    output = [answered, rate("output_cost_per_reasoning_token")]
    if audio:
        given = max(given, rate("input_cost_per_audio_token") or given)
        output.append(rate("output_cost_per_audio_token"))
    return Rates(
        given,
        max(each for each in output if each is not None),
        given if cached is None or audio else cached,
        max([each for each in written if each is not None], default=given),
    )


def _tokens(value: object) -> int | None:
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else None
