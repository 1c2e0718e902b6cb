"""What went wrong at a provider, in a few kinds that say what to do next."""

from __future__ import annotations

import email.utils
import json
import math
import re
import time
from collections.abc import Mapping
from typing import Any, Final, Literal, get_args

from ..codec.secret_paths import MASK

Kind = Literal[
    "rate_limited", "overloaded", "timeout", "server", "connection", "broken_stream", "refused", "context_length",
    "auth", "content_policy", "late",
]  # fmt: skip
RETRYABLE: Final = frozenset({"rate_limited", "overloaded", "timeout", "server", "connection", "broken_stream", "late"})
_ANSWERED: Final = frozenset({"rate_limited", "overloaded", "timeout", "server"})  # by a response, which may say when
TEXT_CHARS_MAX: Final = 300
RETRY_AFTER_MAX_S: Final = 24 * 3600.0  # after a 429: quotas are by the day at most
OUTAGE_WAIT_MAX_S: Final = 600.0  # after other errors: an outage may end before its estimate
_BILLED_STATUS = frozenset(
    {408, 502, 504, 520, 522, 524}
)  # of a proxy that has heard no answer: the model may have run


_WRITTEN: Final = re.compile(
    rf"({'|'.join(each.replace('_', ' ') for each in get_args(Kind))})(?: \(status (\d{{3}})\))?: (.*)", re.DOTALL
)


class ProviderError(Exception):
    """A call that failed. `str()` is one line, and no key stands in it.

    - `kind`: rate_limited (429), overloaded (503, 529), timeout, server (other 5xx), connection (nothing answers, or
      the connection broke), broken_stream (it broke after its first chunk): the same call can succeed later.
      refused (400 and others), context_length, auth (the key or the account is refused, or has no money),
      content_policy: it cannot. late: it could not be sent in time (`ProviderCall.start_within_s`), and was not.
    - `status`: the HTTP status; None if there was none.
    - `retry_after_s`: how long the provider asks to wait, see `wait_of`. None: it does not say.
    - `may_be_billed`: whether the provider may bill the call: it got the request, and what it did then is not known.
    """

    def __init__(
        self,
        kind: Kind,
        text: str,
        *,
        status: int | None = None,
        retry_after_s: float | None = None,
        may_be_billed: bool = False,
    ) -> None:
        self.text = _to_line(text)
        super().__init__(kind, self.text)
        self.kind: Kind = kind
        self.status = status
        self.retry_after_s = retry_after_s
        self.may_be_billed = may_be_billed

    def __str__(self) -> str:
        status = f" (status {self.status})" if self.status is not None else ""
        wait = f"; retry after {self.retry_after_s:g} s" if self.retry_after_s is not None else ""
        return f"{self.kind.replace('_', ' ')}{status}: {self.text}{wait}"

    @classmethod
    def parse(cls, text: str) -> ProviderError | None:
        """Return the error that `str` has made this text of, such as a dead letter's; None if it was none.

        Behind it there may be the reasons of fallbacks.
        """
        found = _WRITTEN.match(text)
        if found is None:
            return None
        kind: Any = found[1].replace(" ", "_")
        return cls(kind, found[3], status=int(found[2]) if found[2] else None)

    @property
    def is_retryable(self) -> bool:
        """Whether the same call can succeed later."""
        return self.kind in RETRYABLE

    @property
    def pauses(self) -> bool:
        """Whether the provider asks to send no call of this model for `retry_after_s`, above 0."""
        return self.kind in ("rate_limited", "overloaded") and bool(self.retry_after_s)


def _to_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= TEXT_CHARS_MAX else line[: TEXT_CHARS_MAX - 1] + "…"


_KEY_LIKE = re.compile(r"\b(?:sk|pk|rk|key|xai|gsk|AIza)[-_][A-Za-z0-9*_-]{6,}|\bAIza[A-Za-z0-9_-]{20,}|\bBearer\s+\S+")


def scrub(text: str, *keys: str | None) -> str:
    """Return the text without these keys, and without what looks like a key: providers repeat them in their errors.

    Scrub a text before it is cut, or a part of a key is left. A key is found in broken lines too.
    """
    for key in keys:
        if key:
            text = re.sub(r"\s*".join(map(re.escape, key)), MASK, text)
    return _KEY_LIKE.sub(MASK, text)


def retry_after_s(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Return how many seconds a response asks to wait: `retry-after-ms`, or `Retry-After` in seconds or as a date.

    None if there is no such header, or no such number in it. At most a day. `now`: seconds since the epoch.
    """
    found = {name.lower(): value for name, value in headers.items()}
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = found.get(name)
        if value is None:
            continue
        try:
            wait_s = float(value) * unit_s
        except ValueError:
            wait_s = _until_date(value, time.time() if now is None else now)
        if math.isfinite(wait_s) and wait_s >= 0:
            return min(wait_s, RETRY_AFTER_MAX_S)
    return None


def wait_of(kind: Kind, headers: Mapping[str, str]) -> float | None:
    """Return how long a response of this kind asks to wait, at most a day for rate_limited, ten minutes for others.

    None: it does not say, or the same call cannot succeed later.
    """
    if kind not in _ANSWERED or (wait_s := retry_after_s(headers)) is None:
        return None
    return wait_s if kind == "rate_limited" else min(wait_s, OUTAGE_WAIT_MAX_S)


def _until_date(value: str, now: float) -> float:
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, TypeError, OverflowError, IndexError):
        return math.nan


_CONTEXT = re.compile(
    r"context[_ ](?:length|window)|maximum context|prompt is too long|input is too long|too many (?:input )?tokens"
    r"|exceeds? the (?:maximum|model'?s?) (?:number of )?(?:input )?(?:tokens|context)|reduce the length",
    re.IGNORECASE,
)
_POLICY = re.compile(r"content[_ ](?:filter|policy|management)|safety system|responsible[_ ]?ai", re.IGNORECASE)
_NO_MONEY = re.compile(
    r"insufficient_quota|billing_hard_limit|credit balance is too low|payment required", re.IGNORECASE
)


def kind_of(status: int, text: str) -> Kind:
    """Return the kind of an HTTP status. `text`: all that the provider says, which tells some apart."""
    if status in (401, 402, 403) or (status in (400, 429) and _NO_MONEY.search(text)):
        return "content_policy" if status == 403 and _POLICY.search(text) else "auth"
    if status == 429:
        return "rate_limited"
    if status in (425, 503, 529):
        return "overloaded"
    if status == 408:
        return "timeout"
    if status == 409 or status >= 500:
        return "server"
    if _CONTEXT.search(text):
        return "context_length"
    return "content_policy" if _POLICY.search(text) else "refused"


def from_status(
    status: int, headers: Mapping[str, str], body: bytes, *, provider: str, key: str | None = None
) -> ProviderError:
    """Return the error of an HTTP response that is no success."""
    text = body.decode("utf-8", "replace")
    kind = kind_of(status, text)
    wait_s = wait_of(kind, headers)
    said = scrub(message_of(text), key) or f"no message, {len(body):,} bytes"
    if 300 <= status < 400:
        said = "the provider redirects, which is not followed: correct base_url in gateway.toml"
    return ProviderError(kind, f"{provider}: {said}", status=status, retry_after_s=wait_s, may_be_billed=bills(status))


def bills(status: int | None) -> bool:
    """Return whether a call that ended with this status may be billed."""
    return status in _BILLED_STATUS


def message_of(text: str) -> str:
    """Return the message in the JSON body of an error, else all that the body says."""
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError):
        return "a page of HTML" if text.lstrip()[:1] == "<" else text
    said = data[0] if isinstance(data, list) and data else data  # Gemini's
    for _ in range(2):
        if isinstance(said, dict):
            said = said.get("error") or said.get("message") or said.get("detail") or said
    if isinstance(said, dict):
        said = said.get("code") or said.get("type") or said
    return said if isinstance(said, str) else _dumped(data)


def _dumped(data: Any) -> str:
    """Return JSON without escapes: a key with them is not found."""
    try:
        return json.dumps(data, ensure_ascii=False)
    except RecursionError:
        return "deep JSON"
