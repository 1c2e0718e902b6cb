"""What a call costs: exact, rounded up, and never above its bound; prices of litellm's map, without litellm."""

from __future__ import annotations

import json
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiqueue.gateway import (
    Budget,
    GatewayConfig,
    GatewayRequest,
    ModelConfig,
    Price,
    PriceMap,
    PriceUnknown,
    ProviderConfig,
    format_usd,
    parse_usd,
    to_micros,
)
from aiqueue.gateway.model_prices import ModelPrices
from aiqueue.gateway.prices import Rates, find_map_file
from aiqueue.gateway.runtime import CallPlan, plan_call

TOKENS = st.integers(0, 3_000_000)
RATE = st.decimals(0, 1000, allow_nan=False, allow_infinity=False, places=9)
RATES = st.builds(Rates, RATE, RATE, RATE, RATE)
PRICES = st.builds(
    lambda rates, above: Price(rates, tuple(sorted(above.items()))),
    RATES,
    st.dictionaries(st.integers(1, 2_000_000), RATES, max_size=3),
)

MAP: dict[str, Any] = {
    "sample_spec": {"mode": "one of: chat", "input_cost_per_token": 0.0, "output_cost_per_token": 0.0},
    "gpt-4o": {
        "litellm_provider": "openai", "mode": "chat", "max_input_tokens": 128000, "max_output_tokens": 16384,
        "input_cost_per_token": 2.5e-06, "output_cost_per_token": 1e-05, "cache_read_input_token_cost": 1.25e-06,
        "input_cost_per_token_priority": 4.25e-06, "output_cost_per_token_priority": 1.7e-05,
    },
    "gemini-pro": {
        "litellm_provider": "vertex_ai-language-models", "mode": "chat", "max_tokens": 65535,
        "input_cost_per_token": 1.25e-06, "output_cost_per_token": 1e-05, "input_cost_per_audio_token": 4e-06,
        "input_cost_per_token_above_200k_tokens": 2.5e-06, "output_cost_per_token_above_200k_tokens": 1.5e-05,
        "cache_read_input_token_cost": 1.25e-07,
    },
    "claude": {
        "litellm_provider": "anthropic", "mode": "chat",
        "input_cost_per_token": 3e-06, "output_cost_per_token": 1.5e-05, "cache_creation_input_token_cost": 3.75e-06,
        "cache_creation_input_token_cost_above_1hr": 6e-06, "cache_read_input_token_cost": 3e-07,
    },
    "groq/llama": {
        "litellm_provider": "groq", "mode": "chat", "input_cost_per_token": 1e-07, "output_cost_per_token": 2e-07,
    },
    "dashscope/qwen": {
        "litellm_provider": "dashscope", "mode": "chat",
        "tiered_pricing": [
            {"input_cost_per_token": 5e-08, "output_cost_per_token": 4e-07, "range": [0, 256000.0]},
            {"input_cost_per_token": 2.5e-07, "output_cost_per_token": 2e-06, "range": [256000.0, 1000000.0]},
        ],
    },
    "embed": {"litellm_provider": "openai", "mode": "embedding", "input_cost_per_token": 2e-08, "max_tokens": 8191},
    "by-request": {
        "litellm_provider": "perplexity", "mode": "chat", "input_cost_per_token": 1e-06, "output_cost_per_token": 1e-06,
        "input_cost_per_request": 0.005,
    },
    "by-second": {"litellm_provider": "bedrock", "mode": "chat", "input_cost_per_second": 0.01},
    "thinker": {
        "litellm_provider": "dashscope", "mode": "chat", "input_cost_per_token": 1e-06, "output_cost_per_token": 1e-06,
        "output_cost_per_reasoning_token": 4e-06,
    },
    "picture": {"litellm_provider": "openai", "mode": "image_generation", "input_cost_per_token": 1e-06},
    "odd": {"litellm_provider": "openai", "mode": "chat", "input_cost_per_token": "1", "output_cost_per_token": True},
    "not a table": 3,
}  # fmt: skip


@pytest.fixture
def price_map(tmp_path: Path) -> PriceMap:
    (tmp_path / "map.json").write_text(json.dumps(MAP))
    return PriceMap.load(tmp_path / "map.json")


@given(RATES, TOKENS, TOKENS, TOKENS, TOKENS)
def test_a_cost_is_exact_and_rounded_up_to_a_whole_micro_dollar(
    rates: Rates, prompt: int, completion: int, cached: int, written: int
) -> None:
    cached = min(cached, prompt)
    written = min(written, prompt - cached)
    exact = Fraction(rates.input) * (prompt - cached - written) + Fraction(rates.output) * completion
    exact += Fraction(rates.cached) * cached + Fraction(rates.cache_write) * written
    assert 0 <= Price(rates).cost_micros(prompt, completion, cached, written) - exact < 1


@given(PRICES, TOKENS, TOKENS, TOKENS, TOKENS, TOKENS, TOKENS)
def test_no_call_costs_more_than_the_bound_of_its_tokens(
    price: Price, prompt_max: int, completion_max: int, prompt: int, completion: int, cached: int, written: int
) -> None:
    cost = price.cost_micros(min(prompt, prompt_max), min(completion, completion_max), cached, written)
    assert cost <= price.bound_micros(prompt_max, completion_max)


def test_a_price_is_in_dollars_a_million_tokens() -> None:
    price = Price.of(2.5, "10", cached=1.25)
    assert price.cost_micros(1_000_000, 100_000) == 3_500_000
    assert price.cost_micros(1_000_000, 0, cached_tokens=1_000_000) == 1_250_000
    assert price.cost_micros(1, 0) == 3  # 2.5 micro-dollars
    assert Price.of(0, 0).cost_micros(1000, 1000) == 0
    assert price.cost_micros(-5, -5, -5) == 0
    assert price.cost_micros(10, 0, cached_tokens=99) == 13  # what a provider says wrongly costs no negative rest


def test_a_prompt_above_a_number_of_tokens_has_the_rates_for_it(price_map: PriceMap) -> None:
    price = price_map.find("gemini-pro", "vertex_ai").price
    assert price is not None
    assert price.cost_micros(200_000, 1_000) == 250_000 + 10_000
    assert price.cost_micros(200_001, 1_000) == 500_003 + 15_000
    assert price.bound_micros(200_000, 1_000) == 260_000
    assert price.bound_micros(200_001, 1_000) == 515_003


@pytest.mark.parametrize(
    ("model", "provider", "input_rate"),
    [
        ("gpt-4o", "openai", "2.5"), ("openai/gpt-4o", None, "2.5"), ("openai/gpt-4o", "openai", "2.5"),
        ("groq/llama", None, "0.1"), ("llama", "groq", "0.1"), ("gpt-4o", None, "2.5"),
        ("gpt-4o", "my-own-server", None), ("my-own-server/gpt-4o", None, None), ("unheard-of", None, None),
        ("dashscope/qwen", None, "0.05"), ("claude", "anthropic", "3"), ("embed", "openai", "0.02"),
        ("by-request", "perplexity", None), ("by-second", "bedrock", None), ("picture", "openai", None),
        ("odd", "openai", None), ("not a table", None, None), ("sample_spec", None, None),
    ],
)  # fmt: skip
def test_the_map_has_a_price_only_for_what_that_provider_serves_by_the_token(
    price_map: PriceMap, model: str, provider: str | None, input_rate: str | None
) -> None:
    price = price_map.find(model, provider).price
    assert (None if price is None else price.rates.input) == (None if input_rate is None else Decimal(input_rate))


def test_the_dearer_of_several_prices_of_a_token_is_taken(price_map: PriceMap) -> None:
    claude, thinker = price_map.find("claude", "anthropic").price, price_map.find("thinker", "dashscope").price
    assert claude is not None
    assert claude.rates == Rates(Decimal(3), Decimal(15), Decimal("0.3"), Decimal(6))
    assert claude.bound_micros(1000, 0) == 6000
    assert thinker is not None
    assert thinker.rates.output == 4
    audio = price_map.find("gemini-pro", "vertex_ai", audio=True).price
    assert audio is not None
    assert (audio.rates.input, audio.rates.cached) == (4, 4)


def test_a_service_tier_has_its_own_price_or_none(price_map: PriceMap) -> None:
    dear = price_map.find("gpt-4o", "openai", service_tier="priority").price
    assert dear is not None
    assert dear.rates[:2] == (Decimal("4.25"), 17)
    assert price_map.find("gpt-4o", "openai", service_tier="flex").price is None
    assert price_map.find("gpt-4o", "openai", service_tier="scale").price is None
    assert price_map.find("gpt-4o", "openai", service_tier="auto").price == price_map.find("gpt-4o", "openai").price


def test_a_large_prompt_of_a_service_tier_costs_no_less_than_that_of_no_tier() -> None:
    rates = {"input_cost_per_token": 3e-05, "input_cost_per_token_flex": 1.5e-05, "output_cost_per_token_flex": 9e-05}
    above = {"input_cost_per_token_above_272k_tokens": 6e-05, "output_cost_per_token_above_272k_tokens": 2.7e-04}
    entry = {"litellm_provider": "openai", "mode": "chat", "output_cost_per_token": 1.8e-04, **rates, **above}
    price = PriceMap({"gpt": entry}).find("gpt", "openai", service_tier="flex").price
    assert price is not None
    assert price.cost_micros(272_000, 0) == 272_000 * 15
    assert price.cost_micros(272_001, 1) == price.bound_micros(272_001, 1) == 272_001 * 60 + 270


def test_what_is_put_into_the_cache_costs_the_dearest_rate_that_the_map_states() -> None:
    rates = {"input_cost_per_token": 1e-05, "output_cost_per_token": 5e-05, "cache_creation_input_token_cost": 1.25e-05}
    entry = {"litellm_provider": "openai", "mode": "chat", **rates}
    entry["cache_creation_input_token_cost_above_12hr"] = 2.5e-05
    price = PriceMap({"gpt": entry}).find("gpt", "openai").price
    assert price is not None
    assert price.rates.cache_write == 25


def test_what_is_put_into_the_cache_costs_twice_the_input_where_a_price_does_not_say() -> None:
    price = Price.of(3, 15)
    assert price.cost_micros(100, 0, 0, 100) == 600
    assert price.bound_micros(100, 0) == 300
    assert price.bounding_cache_writes().bound_micros(100, 0) == 600
    assert Price.of(3, 15, cache_write="3.75").bound_micros(100, 0) == 375


class TestOfModels:
    PROVIDER = ProviderConfig("p", "openai", options=frozenset({"service_tier"}))
    PRICED = ModelConfig("m", PROVIDER, "gpt-4o", context=8_000, max_output_tokens=1_000, price=Price.of(3, 15))
    CONFIG = GatewayConfig("gateway.toml", {"p": PROVIDER}, {"m": PRICED}, {"acme": Budget("acme", 1_000_000)})

    def plan(self, tenant: str = "acme", **fields: Any) -> CallPlan:
        asked = {"model": "m", "messages": [{"role": "user", "content": "x" * 960}], "max_tokens": 1, **fields}
        request = GatewayRequest.model_validate(asked)
        return plan_call(request, "m", tenant, self.CONFIG, ModelPrices(self.CONFIG.models.values()))

    @pytest.mark.parametrize("tier", ["priority", "flex", "scale", 1])
    def test_the_price_of_the_file_is_not_that_of_a_service_tier(self, tier: object) -> None:
        assert self.plan("globex", service_tier=tier).price is None
        with pytest.raises(PriceUnknown, match=r"gateway.toml is not that of service_tier .*: ask for it without"):
            self.plan(service_tier=tier)

    @pytest.mark.parametrize("tier", ["default", "auto", "standard"])
    def test_the_price_of_the_file_is_that_of_the_plain_tiers(self, tier: str) -> None:
        assert self.plan(service_tier=tier).price == self.PRICED.price

    MARK: ClassVar[dict[str, Any]] = {"cache_control": {"type": "ephemeral"}}
    TOOL: ClassVar[dict[str, Any]] = {"type": "function", "function": {"name": "f", "description": "x" * 960, **MARK}}

    @pytest.mark.parametrize(
        "field",
        [
            {"messages": [{"role": "user", "content": "x" * 960, **MARK}]},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 960, **MARK}]}]},
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "x" * 960, **MARK}]}]},
            {"messages": [{"role": "assistant", "thinking_blocks": [{"thinking": "x" * 960, **MARK}]}]},
            {"tools": [TOOL]},  # litellm takes it to the tool itself
        ],
    )
    def test_a_request_that_fills_the_cache_reserves_what_that_costs(self, field: dict[str, Any]) -> None:
        plan = self.plan(**field)
        assert plan.bound_micros == 6 * plan.prompt_tokens_max + 15
        assert self.plan().bound_micros == 3 * 1_000 + 15


def test_the_map_tells_the_sizes_of_models(price_map: PriceMap) -> None:
    assert price_map.find("gpt-4o", "openai")[1:] == (128_000, 16_384)
    assert price_map.find("embed", "openai")[1:] == (None, 8191)
    assert price_map.find("unheard-of") == (None, None, None)


@pytest.mark.parametrize("content", [None, "", "[]", "{"])
def test_without_a_map_no_price_is_known(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "map.json").write_text(content)
    assert PriceMap.load(tmp_path / "map.json").find("gpt-4o", "openai") == (None, None, None)


@pytest.mark.skipif(find_map_file() is None, reason="litellm is not installed")
def test_the_installed_map_is_read_without_importing_litellm() -> None:
    code = (
        "import sys; from aiqueue.gateway import PriceMap; found = PriceMap.load().find('gpt-4o', 'openai');"
        "print(float(found.price.rates.input), found.max_output_tokens, 'litellm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2.5", "16384", "False"]


@pytest.mark.parametrize("value", ["", "x", "-1", -0.01, float("nan"), "inf", True, None, [1], 10**10, "0." + "1" * 40])
def test_what_is_no_amount_of_dollars_is_refused_in_one_line(value: object) -> None:
    with pytest.raises(ValueError, match=r"must be an amount of US dollars from 0 to 1,000,000,000, not ") as caught:
        parse_usd(value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("micros", "text"),
    [(0, "$0.00"), (12, "$0.000012"), (10_500_000, "$10.50"), (1_234_567_890, "$1,234.56789"), (-5_000, "-$0.005")],
)
def test_amounts_are_shown_with_all_their_digits(micros: int, text: str) -> None:
    assert format_usd(micros) == text


def test_dollars_become_micro_dollars_rounded_up() -> None:
    assert to_micros(parse_usd("10.50")) == 10_500_000
    assert to_micros(parse_usd(0.1)) == 100_000
    assert to_micros(parse_usd("0.0000001")) == 1


def test_an_unknown_price_says_where_to_give_one() -> None:
    assert str(PriceUnknown("acme", "m")) == (
        "tenant acme has a budget, and the price of model m is unknown: give the model a price in gateway.toml"
    )
