"""The keys of gateway.toml: what each means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ..topology import FileKey

PROVIDER_KEYS: Final[Mapping[str, FileKey]] = {
    "name": FileKey("Name that models give as `provider`."),
    "kind": FileKey("How the provider is called: an OpenAI-compatible endpoint directly, every other one by litellm."),
    "base_url": FileKey(
        "Endpoint, without a query.", "`openai`: `https://api.openai.com/v1`; `litellm`: known to litellm"
    ),
    "key_env": FileKey(
        "Environment variable that has the key. Without it and `key_file`, `openai` sends no key, and litellm looks "
        "for "
        "one in its own variables.",
        "none",
    ),
    "key_file": FileKey(
        "File that has the key; a relative path starts from the directory of gateway.toml. Not beside `key_env`.",
        "none",
    ),
    "media_urls": FileKey(
        "Whether requests may name images, files and earlier spoken answers by URL or id, which the provider fetches. "
        "Only for `openai`.",
        "false",
    ),
    "options": FileKey(
        'Fields of requests that are passed on beside OpenAI\'s common ones, such as `["top_k", "service_tier"]`. '
        "Fields "
        "that would choose a host, a key or a price cannot be allowed.",
        "none",
    ),
    "connections": FileKey(
        "How many connections each worker process has to the provider, and so how many calls under way. Further calls "
        "wait.",
        "100",
    ),
    "limit_field": FileKey(
        "Field in which the provider gets the limit of a completion, whether a request has `max_tokens` or "
        "`max_completion_tokens`. "
        '`"none"`: as the request gives it.',
        '`"max_completion_tokens"` for `openai` at `api.openai.com` and `*.azure.com`, else `"max_tokens"`',
    ),
}
MODEL_KEYS: Final[Mapping[str, FileKey]] = {
    "name": FileKey("Name that requests give as `model`."),
    "provider": FileKey("Name of a `[[provider]]`."),
    "upstream": FileKey(
        "Name that the provider has for the model; for `litellm` with litellm's prefix, such as "
        '`"anthropic/claude-sonnet-4-5"`.',
        "`name`",
    ),
    "kind": FileKey("What the model answers: chats with text, or texts with vectors.", '"chat"'),
    "context": FileKey("How many tokens prompt and completion have together at most.", 'none; required for `"chat"`'),
    "max_output_tokens": FileKey(
        "How many tokens a completion has at most. A request with a higher limit is refused. For a request without a "
        "limit, this number is reserved, and sent as the limit. So it may be below the provider's own maximum, but not "
        'with `limit_field = "none"`, where nothing is sent. A number up to half of `context` is always sent. A number '
        "above half is sent if it and the prompt fit into `context` together. If they do not fit, nothing is sent, and "
        "all of `context` is reserved.",
        'none; required for `"chat"`',
    ),
    "tokens_per_byte": FileKey(
        "How many tokens a byte of a prompt is reckoned as, for limits and budgets. 1 is never too low. Less holds "
        "only "
        "for texts like those that you have measured: English has about 0.3.",
        "1",
    ),
    "price": FileKey(
        "What tokens cost: a table of the keys below. If tokens of one kind have several prices (audio, reasoning, "
        "long "
        'prompts), give the highest. Without a service tier: with `service_tier = "priority"` and the like the price '
        "is "
        "unknown.",
        "that of litellm's price map",
    ),
    "fallbacks": FileKey(
        "Other models of the file, of the same kind, which are called in this order when this one has failed for good.",
        "none",
    ),
    "attempts": FileKey(
        "How many calls of a request may end in timeouts, 5xx and the like before the fallbacks are called, 1 to 20. 5 "
        "take some 11 seconds where nobody answers, 2 some 1 second. A 429 or 503 counts apart: 50 of them.",
        "5",
    ),
    "first_token_timeout": FileKey("How long a stream may take until its first chunk; at most `timeout`.", '"60s"'),
    "timeout": FileKey("How long a call may take. Streams above 15 minutes may lose chunks.", '"10m"'),
}
PRICE_KEYS: Final[Mapping[str, FileKey]] = {  # in the order of `Price.of`
    "input": FileKey("USD for a million tokens of the prompt; 0 if they cost nothing."),
    "output": FileKey(
        "USD for a million tokens of the completion; 0 if they cost nothing.", 'none; required for `"chat"`'
    ),
    "cached_input": FileKey(
        "USD for a million tokens of the prompt that the provider has read from its cache.", "`input`"
    ),
    "cache_write": FileKey(
        "USD for a million tokens of the prompt that the provider has put into its cache. The default is reserved only "
        "for requests with `cache_control`. Set this price for a provider that fills its cache without being asked, "
        "and charges for that.",
        "twice `input`",
    ),
}
BUDGET_KEYS: Final[Mapping[str, FileKey]] = {
    "tenant": FileKey('A tenant; `"*"`: each tenant that has no budget of its own.'),
    "month": FileKey("USD that the tenant's calls may cost in a month (UTC)."),
    "currency": FileKey("Currency of the budget: there is only one.", '"USD"'),
    "when_spent": FileKey(
        "What becomes of a request that the budget has no room for: a dead letter, or the request waits for the next "
        "month.",
        '"refuse"',
    ),
}
