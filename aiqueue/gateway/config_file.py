"""Read gateway.toml. Every fault is one line with the file and the key."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from .. import subjects
from ..config import Settings
from ..errors import TopologyError
from ..topology import tables
from .budgets import Budget
from .config import ATTEMPTS, LIMIT_FIELDS, GatewayConfig, ModelConfig, ProviderConfig, ProviderKind
from .gateway_keys import BUDGET_KEYS, MODEL_KEYS, PRICE_KEYS, PROVIDER_KEYS
from .prices import MICROS, Price
from .requests import is_refused_option

FILE: Final = "gateway.toml"
VARIABLE: Final = "AIQUEUE_GATEWAY"
OPENAI_URL: Final = "https://api.openai.com/v1"
_NEW_LIMIT_HOSTS: Final = ("api.openai.com", ".azure.com")  # their reasoning models refuse max_tokens
ATTEMPTS_MAX: Final = 20  # failed calls of a request
PRICE_MAX: Final = Decimal(1_000_000)  # USD for a million tokens
BUDGET_MAX: Final = Decimal(1_000_000_000)


def load(path: str | Path | None = None, settings: Settings | None = None) -> GatewayConfig:
    """Read gateway.toml: `path`, else the environment variable AIQUEUE_GATEWAY, else the directory of the setting
    `streams`. `settings`: those of a client; None: those in force. Raises TopologyError, in one line with file and key,
    and SettingsError.
    """
    streams = None
    if not path and not os.environ.get(VARIABLE):
        streams = (Settings.load() if settings is None else settings).streams
    try:
        found = tables.load_file(path, name=FILE, variable=VARIABLE, streams=streams, parse=parse)
    except TopologyError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise TopologyError(error.file, "", "no such file: write tables [[provider]] and [[model]] into it") from None
    if found is None:
        problem = f"not found: set {VARIABLE} to its path, or put it into a directory and set `streams` to that"
        raise TopologyError(FILE, "", problem)
    return found


def parse(file: str, text: str) -> GatewayConfig:
    """Parse the text of a gateway.toml. `file`: its path, which relative `key_file` paths start from.

    Raises TopologyError, in one line with file and key.
    """
    return tables.parse_file(file, text, _read_file)


def _read_file(file: str, raw: dict[str, Any]) -> GatewayConfig:
    tables.check_known("", raw, ("provider", "model", "budget"), secrets=_SECRETS)
    providers: dict[str, ProviderConfig] = {}
    for where, table in tables.list_tables(raw, "provider"):
        provider = _read_provider(where, table, Path(file).parent)
        tables.add_new(providers, where, "name", provider.name, provider)
    models: dict[str, ModelConfig] = {}
    for where, table in tables.list_tables(raw, "model"):
        model = _read_model(where, table, providers)
        tables.add_new(models, where, "name", model.name, model)
    for number, model in enumerate(models.values(), 1):
        _check_fallbacks(f"model {number}", model, models)
    budgets: dict[str, Budget] = {}
    for where, table in tables.list_tables(raw, "budget"):
        budget = _read_budget(where, table)
        tables.add_new(budgets, where, "tenant", budget.tenant, budget)
    return GatewayConfig(file, providers, models, budgets)


# -- tables

_SECRETS = "a key never stands in this file: give key_env or key_file"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MODEL_NAME = re.compile(r"[A-Za-z0-9_./:@+-]{1,256}")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_URL = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(:[0-9]{1,5})?(/[A-Za-z0-9._~/-]*)?")
_NOT_SHOWN = ("base_url", "key_env")  # where people write secrets by mistake
_OPTION = re.compile(r"[A-Za-z0-9_]{1,64}")


def _read_provider(where: str, table: dict[str, Any], home: Path) -> ProviderConfig:
    tables.check_known(where, table, PROVIDER_KEYS, secrets=_SECRETS)
    read = tables.TableReader(where, table, hidden=_NOT_SHOWN)
    kind: ProviderKind = read.choice("kind", ("openai", "litellm"))
    env, path = read.text("key_env", _VARIABLE_NAME, "the name of an environment variable"), read.text("key_file")
    if env is not None and path is not None:
        raise tables.WrongKey(f"{where}.key_file", "key_env is given too: give one of them")
    media_urls = read.flag("media_urls")
    if media_urls and kind == "litellm":  # it fetches them in the worker's own network
        raise tables.WrongKey(
            f"{where}.media_urls", "is only for providers of the kind openai, which fetch URLs themselves"
        )
    options = read.names("options", _OPTION, "names of options")
    for each in options:
        if is_refused_option(each):
            raise tables.WrongKey(
                f"{where}.options", f"{each} cannot be allowed: it would let a request choose who is called"
            )
    url = read.text("base_url", _URL, 'a URL without a query, such as "https://host/v1"')
    host = urlsplit(url or OPENAI_URL).hostname or ""
    takes_new = kind == "openai" and host.endswith(_NEW_LIMIT_HOSTS)
    return ProviderConfig(
        name=read.required("name", _NAME, "1 to 64 characters of A-Z a-z 0-9 _ -"),
        kind=kind,
        base_url=url.rstrip("/") if url else OPENAI_URL if kind == "openai" else None,
        key_env=env,
        key_file=None if path is None else home / Path(path).expanduser(),
        media_urls=media_urls,
        options=frozenset(options),
        connections=read.count("connections", 10_000) or 100,
        limit_field=read.choice("limit_field", (*LIMIT_FIELDS, "none"), LIMIT_FIELDS[takes_new]),
    )


def _read_model(where: str, table: dict[str, Any], providers: Mapping[str, ProviderConfig]) -> ModelConfig:
    tables.check_known(where, table, MODEL_KEYS, secrets=_SECRETS)
    read = tables.TableReader(where, table)
    characters = "1 to 256 characters of A-Z a-z 0-9 _ . / : @ + -"
    name = read.required("name", _MODEL_NAME, characters)
    provider = providers.get(read.required("provider"))
    if provider is None:
        known = ", ".join(providers) or "none"
        raise tables.WrongKey(f"{where}.provider", f"there is no such [[provider]]; known: {known}")
    upstream = read.text("upstream", _MODEL_NAME, characters) or name
    if upstream.lower().startswith("aiqueue/"):
        raise tables.WrongKey(f"{where}.upstream", f"{upstream} would call this queue again: name a provider's model")
    kind: Literal["chat", "embedding"] = read.choice("kind", ("chat", "embedding"), "chat")
    context, output = read.count("context", 100_000_000), read.count("max_output_tokens", 10_000_000)
    if kind == "chat" and (context is None or output is None):
        missing = "context" if context is None else "max_output_tokens"
        raise tables.WrongKey(
            f"{where}.{missing}", f"is missing: how many tokens {name} takes at most decides what is reserved"
        )
    share = table.get("tokens_per_byte", 1)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0.1 <= share <= 1:
        raise tables.WrongKey(
            f"{where}.tokens_per_byte", f"must be a number from 0.1 to 1, not {tables.shown_value(share)}"
        )
    first_s, total_s = read.duration("first_token_timeout", 60.0), read.duration("timeout", 600.0)
    if first_s > total_s and "first_token_timeout" in table:
        raise tables.WrongKey(f"{where}.first_token_timeout", "is above timeout, which ends a call")
    return ModelConfig(
        name=name,
        provider=provider,
        upstream=upstream,
        kind=kind,
        context=context,
        max_output_tokens=output,
        tokens_per_byte=float(share),
        price=_read_price(f"{where}.price", table["price"], kind) if "price" in table else None,
        fallbacks=read.names("fallbacks", _MODEL_NAME, "names of models"),
        attempts=read.count("attempts", ATTEMPTS_MAX) or ATTEMPTS,
        first_token_s=min(first_s, total_s),
        total_s=total_s,
    )


def _read_price(where: str, table: Any, kind: str) -> Price:
    if not isinstance(table, dict):
        raise tables.WrongKey(
            where, "must be USD for a million tokens: { input = 0.15, output = 0.6, cached_input = 0.075 }"
        )
    tables.check_known(where, table, PRICE_KEYS, secrets=_SECRETS)
    read = tables.TableReader(where, table)
    amounts = {name: read.amount(name, PRICE_MAX) for name in PRICE_KEYS}
    if amounts["output"] is None and kind == "embedding":
        amounts["output"] = Decimal(0)
    for name in ("input", "output"):
        if amounts[name] is None:
            raise tables.WrongKey(
                f"{where}.{name}", "is missing: give USD for a million tokens, 0 if they cost nothing"
            )
    return Price.of(*(amounts[name] for name in PRICE_KEYS))


def _check_fallbacks(where: str, model: ModelConfig, models: Mapping[str, ModelConfig]) -> None:
    for each in model.fallbacks:
        other = models.get(each)
        if other is None or each == model.name or other.kind != model.kind:
            why = "there is no such [[model]]" if other is None else "is this model" if other is model else ""
            raise tables.WrongKey(
                f"{where}.fallbacks", f"{each}: {why or f'is of the kind {other.kind if other else None}'}"
            )


def _read_budget(where: str, table: dict[str, Any]) -> Budget:
    tables.check_known(where, table, BUDGET_KEYS, secrets=_SECRETS)
    read = tables.TableReader(where, table)
    tenant = read.required("tenant")
    if tenant != "*" and not subjects.TOKEN.fullmatch(tenant):
        raise tables.WrongKey(
            f"{where}.tenant", f'must be a tenant, or "*" for each tenant by itself, not {tables.shown_value(tenant)}'
        )
    read.choice("currency", ("USD",), "USD")
    month = read.amount("month", BUDGET_MAX)
    if month is None:
        raise tables.WrongKey(f"{where}.month", "is missing: how many USD the tenant may spend in a month")
    if "when_spent" not in table:
        return Budget(tenant, int(month * MICROS))
    return Budget(tenant, int(month * MICROS), read.choice("when_spent", ("refuse", "park")))
