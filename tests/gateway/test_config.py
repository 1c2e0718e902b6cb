"""gateway.toml: what is read, what is refused and how, and where keys come from. No server."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiqueue.errors import BadInput, TopologyError
from aiqueue.gateway import Budget, GatewayConfig, GatewayRequest, Price, load, upstream_body
from aiqueue.gateway.config_file import parse
from aiqueue.gateway.model_prices import ModelPrices
from aiqueue.gateway.runtime import plan_call

PROVIDER = '[[provider]]\nname = "p"\nkind = "openai"\n'
MODEL = '[[model]]\nname = "m"\nprovider = "p"\ncontext = 8_000\nmax_output_tokens = 1_000\n'
WHOLE = """
[[provider]]
name = "openai"
kind = "openai"
key_env = "GATEWAY_TEST_KEY"

[[provider]]
name = "local"
kind = "openai"
base_url = "http://127.0.0.1:8000/v1/"
options = ["top_k"]
media_urls = true
connections = 8

[[provider]]
name = "anthropic"
kind = "litellm"
key_file = "keys/anthropic"

[[model]]
name = "small"
provider = "openai"
upstream = "gpt-4o-mini"
context = 128_000
max_output_tokens = 16_384
price = { input = 0.15, output = 0.6, cached_input = 0.075 }
fallbacks = ["claude"]
first_token_timeout = "20s"
timeout = "2m"

[[model]]
name = "claude"
provider = "anthropic"
upstream = "anthropic/claude-sonnet-4"
context = 200_000
max_output_tokens = 64_000

[[model]]
name = "embed"
provider = "local"
kind = "embedding"
price = { input = 0.02 }

[[budget]]
tenant = "*"
month = 10

[[budget]]
tenant = "acme"
month = 99.5
currency = "USD"
when_spent = "park"
"""


UNBUDGETED = WHOLE.partition("[[budget]]")[0]
LLAMA = MODEL.replace('"p"', '"local"').replace('"m"', '"llama"')
AS_IT_IS = MODEL.replace('"m"', '"as-it-is"')


def problem_of(text: str) -> str:
    with pytest.raises(TopologyError) as caught:
        parse("gateway.toml", text)
    return str(caught.value)


def test_a_whole_file_is_read() -> None:
    config = parse("/etc/gateway.toml", WHOLE)
    small, claude, embed = (config.find_model(each) for each in ("small", "claude", "embed"))
    assert (small.upstream, small.context, small.max_output_tokens) == ("gpt-4o-mini", 128_000, 16_384)
    assert small.price == Price.of("0.15", "0.6", "0.075")
    assert (small.first_token_s, small.total_s, small.fallbacks) == (20.0, 120.0, ("claude",))
    assert (small.provider.base_url, claude.provider.base_url) == ("https://api.openai.com/v1", None)
    assert claude.provider.key_file == Path("/etc/keys/anthropic")
    assert (embed.upstream, embed.kind, embed.provider.base_url) == ("embed", "embedding", "http://127.0.0.1:8000/v1")
    assert (embed.provider.media_urls, embed.provider.connections) == (True, 8)
    assert embed.price == Price.of("0.02", 0)
    assert config.budget_of("acme") == Budget("acme", 99_500_000, "park")
    assert config.budget_of("other") == Budget("*", 10_000_000, "refuse")
    assert parse("gateway.toml", PROVIDER + MODEL).budget_of("acme") is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[[model", "gateway.toml: is not TOML"),
        ("[models]", "gateway.toml: models: unknown key; did you mean model?"),
        ("[provider]\nname = 'p'", "gateway.toml: provider: must be tables: write [[provider]]"),
        ("[[provider]]\nname = 'p'", 'provider 1.kind: is missing: "openai" or "litellm"'),
        ("[[provider]]\nkind = 'azure'", 'provider 1.kind: must be "openai" or "litellm", not "azure"'),
        ("[[provider]]\nkind = 'openai'", "provider 1.name: is missing"),
        (PROVIDER + "api_key = 'sk-secret'", "provider 1.api_key: unknown key; a key never stands in this file"),
        (PROVIDER + "key_env = 'sk-secret'", "provider 1.key_env: must be the name of an environment variable"),
        (PROVIDER + "key_env = 'A'\nkey_file = 'b'", "provider 1.key_file: key_env is given too"),
        (PROVIDER + "base_url = 'http://me:secret@host/v1'", "provider 1.base_url: must be a URL without a query"),
        (PROVIDER + "base_url = 'file:///etc/passwd'", "provider 1.base_url: must be a URL"),
        (PROVIDER + "options = ['api_base']", "provider 1.options: api_base cannot be allowed"),
        (PROVIDER + "limit_field = 'max'", 'provider 1.limit_field: must be "max_tokens" or "max_completion_tokens"'),
        (PROVIDER + "media_urls = 1", "provider 1.media_urls: must be true or false, not 1"),
        (PROVIDER.replace("openai", "litellm") + "media_urls = true", "provider 1.media_urls: is only for providers"),
        (PROVIDER + PROVIDER, "provider 2.name: there is one of the name p already"),
        (PROVIDER + "[[model]]\nname = 'm'\nprovider = 'q'", "model 1.provider: there is no such [[provider]]; known"),
        (PROVIDER + "[[model]]\nname = 'm'\nprovider = 'p'", "model 1.context: is missing"),
        (PROVIDER + MODEL + "upstream = 'aiqueue/m'", "model 1.upstream: aiqueue/m would call this queue again"),
        (PROVIDER + MODEL.replace('"m"', '"AIQueue/m"'), "model 1.upstream: AIQueue/m would call this queue again"),
        (PROVIDER + MODEL + "fallbacks = ['n']", "model 1.fallbacks: n: there is no such [[model]]"),
        (PROVIDER + MODEL + "fallbacks = ['m']", "model 1.fallbacks: m: is this model"),
        (PROVIDER + MODEL + "fallbacks = ['e']\n[[model]]\nname = 'e'\nprovider = 'p'\nkind = 'embedding'",
         "model 1.fallbacks: e: is of the kind embedding"),
        (PROVIDER + MODEL + "tokens_per_byte = 2", "model 1.tokens_per_byte: must be a number from 0.1 to 1, not 2"),
        (PROVIDER + MODEL + "tokens_per_byte = nan", "model 1.tokens_per_byte: must be a number from 0.1 to 1"),
        (PROVIDER + MODEL + "timeout = '0s'", 'model 1.timeout: must be a duration up to 1d, such as "30s", not "0s"'),
        (PROVIDER + MODEL + "first_token_timeout = '2m'\ntimeout = '1m'", "first_token_timeout: is above timeout"),
        (PROVIDER + MODEL + "price = { input = -1 }", "model 1.price.input: must be a number from 0 to 1,000,000"),
        (PROVIDER + MODEL + "price = { input = nan }", "model 1.price.input: must be a number"),
        (PROVIDER + MODEL + "price = { output = 1 }", "model 1.price.input: is missing"),
        (PROVIDER + MODEL + "price = { input = 1 }", "model 1.price.output: is missing: give USD for a million tokens"),
        (PROVIDER + MODEL + "price = { input = 1, output = 1, cache_write = -1 }", "1.price.cache_write: must be"),
        (PROVIDER + MODEL + "price = 5", "model 1.price: must be USD for a million tokens"),
        (PROVIDER + MODEL + "max_ouput_tokens = 5", "unknown key; did you mean max_output_tokens?"),
        ("[[budget]]\ntenant = 'a.b'\nmonth = 1", "budget 1.tenant: must be a tenant"),
        ("[[budget]]\ntenant = 'a'", "budget 1.month: is missing"),
        ("[[budget]]\ntenant = 'a'\nmonth = true", "budget 1.month: must be a number"),
        ("[[budget]]\ntenant = 'a'\nmonth = 1\ncurrency = 'EUR'", 'budget 1.currency: must be "USD", not "EUR"'),
        ("[[budget]]\ntenant = 'a'\nmonth = 1\nwhen_spent = 'stop'", 'budget 1.when_spent: must be "refuse" or "park"'),
    ],
)  # fmt: skip
def test_a_fault_is_one_line_with_file_and_key(text: str, problem: str) -> None:
    said = problem_of(text)
    assert problem in said
    assert said.startswith("gateway.toml: ")
    assert "\n" not in said
    assert (
        "secret" not in said.replace("sk-secret", "secret") or "api_key" in said
    )  # the URL's password is not repeated


def test_a_price_has_a_rate_for_what_is_put_into_the_cache() -> None:
    text = PROVIDER + MODEL + "price = { input = 3, output = 15, cached_input = 0.3, cache_write = 3.75 }"
    price = parse("gateway.toml", text).find_model("m").price
    assert price == Price.of(3, 15, "0.3", "3.75")
    assert price.cost_micros(100, 0, 0, 100) == 375


def test_an_unknown_model_or_one_of_another_kind_is_refused_with_what_there_is() -> None:
    config = parse("gateway.toml", WHOLE)
    with pytest.raises(BadInput, match=r"unknown model 'smal'; did you mean small\?"):
        config.find_model("smal")
    with pytest.raises(BadInput, match=r"unknown model 'zzz'; models of the gateway: claude, embed, small"):
        config.find_model("zzz")
    with pytest.raises(BadInput, match="model embed is for embeddings, not for chat completions"):
        config.find_model("embed", "chat")


def test_the_file_is_named_by_the_environment_or_lies_beside_the_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AIQUEUE_STREAMS", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TopologyError, match=r"gateway.toml: not found: set AIQUEUE_GATEWAY to its path"):
        load()
    streams = tmp_path / "streams"
    streams.mkdir()
    monkeypatch.setenv("AIQUEUE_STREAMS", str(streams))
    with pytest.raises(TopologyError, match=r"streams/gateway\.toml: no such file"):
        load()
    (streams / "gateway.toml").write_text(PROVIDER + MODEL)
    assert load().file == str(streams / "gateway.toml")
    (tmp_path / "other.toml").write_bytes(b"\xff")
    monkeypatch.setenv("AIQUEUE_GATEWAY", str(tmp_path / "other.toml"))
    with pytest.raises(TopologyError, match=r"other\.toml: cannot be read"):
        load()


def test_a_key_is_read_from_the_environment_or_a_file_and_shown_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse(str(tmp_path / "gateway.toml"), WHOLE)
    by_env, by_file, none = (config.providers[each] for each in ("openai", "anthropic", "local"))
    monkeypatch.setenv("GATEWAY_TEST_KEY", " sk-by-env\n")
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "anthropic").write_text("sk-by-file\n")
    assert [each.read_key() for each in (by_env, by_file, none)] == ["sk-by-env", "sk-by-file", None]
    assert "sk-by" not in repr(config)


@pytest.mark.parametrize("key", ["", "  ", "sk-two\nlines", "sk-\u00e9"])
def test_a_key_that_is_none_is_refused_without_being_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_TEST_KEY", key)
    with pytest.raises(BadInput, match=r"provider openai.*GATEWAY_TEST_KEY") as caught:
        parse("gateway.toml", WHOLE).providers["openai"].read_key()
    assert "sk-" not in str(caught.value)


def test_a_key_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"the key cannot be read from the file .*keys/anthropic: no such file"):
        parse(str(tmp_path / "gateway.toml"), WHOLE).providers["anthropic"].read_key()


class TestUpstreamBody:
    CONFIG = parse("gateway.toml", UNBUDGETED + LLAMA + PROVIDER + "limit_field = 'none'\n" + AS_IT_IS)

    def body(self, model: str, config: GatewayConfig = CONFIG, **fields: object) -> dict[str, object]:
        hello = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
        return upstream_body(GatewayRequest.model_validate({**hello, **fields}), config.find_model(model))

    def test_an_allowed_option_stands_beside_the_fields(self) -> None:
        assert self.body("llama", top_k=5)["top_k"] == 5
        assert self.body("claude", thinking={"type": "disabled"})["thinking"] == {"type": "disabled"}
        assert "model" not in self.body("llama")

    @pytest.mark.parametrize(("model", "option"), [("small", "top_k"), ("llama", "thinking"), ("small", "store")])
    def test_an_option_of_another_provider_is_refused_by_name(self, model: str, option: str) -> None:
        with pytest.raises(BadInput, match=f"option '{option}' is not allowed for provider (openai|local); allowed: "):
            self.body(model, **{option: 1})

    @pytest.mark.parametrize(
        ("model", "asked", "sent"),
        [
            ("small", {"max_tokens": 5}, {"max_completion_tokens": 5}),
            ("llama", {"max_completion_tokens": 5}, {"max_tokens": 5}),
            ("llama", {"max_completion_tokens": 5, "max_tokens": 6}, {"max_tokens": 6}),
            ("claude", {"max_completion_tokens": 5}, {"max_tokens": 5}),
            ("small", {}, {"max_completion_tokens": 16_384}),
            ("llama", {}, {"max_tokens": 1_000}),
            ("as-it-is", {"max_completion_tokens": 5}, {"max_completion_tokens": 5}),
            ("as-it-is", {}, {}),
        ],
    )
    def test_the_limit_of_a_completion_is_always_sent_in_the_field_that_the_provider_heeds(
        self, model: str, asked: dict[str, int], sent: dict[str, int]
    ) -> None:
        hello = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
        request = GatewayRequest.model_validate({**hello, **asked})
        body = plan_call(request, model, "acme", self.CONFIG, ModelPrices(())).body
        assert {name: value for name, value in body.items() if name.startswith("max_")} == sent

    def test_media_by_url_are_only_for_providers_that_may_fetch_them(self) -> None:
        content = [{"type": "image_url", "image_url": {"url": "http://evil.example/x.png"}}]
        messages = [{"role": "user", "content": content}]
        assert self.body("llama", messages=messages)["messages"] == messages
        for model in ("small", "claude"):
            with pytest.raises(BadInput, match="named by a URL or id, which provider"):
                self.body(model, messages=messages)
