"""All other providers, called by litellm. It is imported when the first call is made, or by `warm_up`."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from .answers import Completion, usage_of
from .call_limits import CallLimit, CallState, StreamEnd
from .config import ProviderConfig
from .provider_errors import RETRYABLE, Kind, ProviderError, bills, kind_of, scrub, wait_of
from .providers import OnChunk, ProviderCall, Reply

_importing = threading.Lock()


class LitellmProvider:
    """A provider of the kind "litellm". litellm's own retries, fallbacks and callbacks are off.

    litellm takes 4 s to import and 2 ms of CPU for a call: in a worker, `warm_up` imports it before the first job.
    """

    def __init__(self, config: ProviderConfig) -> None:
        """Raises BadInput if the key is missing, and ModuleNotFoundError if litellm is not installed."""
        if importlib.util.find_spec("litellm") is None:
            raise ModuleNotFoundError("litellm is not installed", name="litellm")
        self._config = config
        self._key = config.read_key()
        self._room = asyncio.Semaphore(config.connections)  # below litellm's own limits, where a call would wait unseen

    def __repr__(self) -> str:
        return f"<LitellmProvider {self._config.name}>"

    async def warm_up(self) -> None:
        """Import litellm, in a thread."""
        await asyncio.to_thread(load_litellm)

    async def chat(self, call: ProviderCall, on_chunk: OnChunk | None = None) -> Reply:
        """See `Provider.chat`."""
        body = {name: value for name, value in call.body.items() if name not in ("stream", "stream_options")}
        if on_chunk is None:
            return await self._call_whole("acompletion", call, body)
        options = {**(call.body.get("stream_options") or {}), "include_usage": True}
        return await self._call_streamed(call, {**body, "stream": True, "stream_options": options}, on_chunk)

    async def embed(self, call: ProviderCall) -> Reply:
        """See `Provider.embed`."""
        return await self._call_whole("aembedding", call, call.body)

    async def close(self) -> None:
        """Do nothing: litellm's connections are shared by all its providers, see `close_litellm`."""

    async def _call_whole(self, function: str, call: ProviderCall, body: dict[str, Any]) -> Reply:
        state, started = CallState(), time.monotonic()
        litellm = await _loaded()
        async with CallLimit(self._config.name, call.total_s, state), self._connection(call, started):
            answer = _plain(await self._send(getattr(litellm, function), call, body, state))
        return Reply(answer, usage_of(answer), time.monotonic() - started)

    async def _call_streamed(self, call: ProviderCall, body: dict[str, Any], on_chunk: OnChunk) -> Reply:
        state, made, started = CallState(), Completion(call.choices), time.monotonic()
        litellm = await _loaded()
        first_s = 0.0
        try:
            async with CallLimit(self._config.name, call.total_s, state), AsyncExitStack() as held:
                async with CallLimit(self._config.name, call.first_token_s, state, "the first chunk"):
                    await held.enter_async_context(self._connection(call, started))
                    stream = await self._send(litellm.acompletion, call, body, state)
                    chunk = await self._next(stream, state, made)
                first_s = time.monotonic() - started
                try:
                    async with StreamEnd() as end:
                        while chunk is not None:
                            state.begun = True
                            made.add(chunk)
                            if made.is_whole:
                                end.begin()
                            await on_chunk(chunk)
                            chunk = await self._next(stream, state, made)
                finally:
                    await _close(stream)
        except ProviderError as error:
            if error.kind != "timeout" or not made.is_whole:  # else only its usage is missing
                raise
        if not made.is_finished:
            raise self._broken(state)
        return Reply(made.whole(), made.usage, time.monotonic() - started, first_s)

    @asynccontextmanager
    async def _connection(self, call: ProviderCall, started: float) -> AsyncIterator[None]:
        """Hold one of the provider's connections. Raises ProviderError if there is none in time."""
        within_s, has_room = call.start_within_s, False
        left_s = None if within_s is None else within_s - (time.monotonic() - started)
        if left_s is None or left_s > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    has_room = await self._room.acquire()
        if not has_room:
            text = f"{self._config.name}: no connection within {within_s:.1f} s"
            raise ProviderError("late", text, may_be_billed=False)
        try:
            yield
        finally:
            self._room.release()

    async def _send(self, function: Any, call: ProviderCall, body: dict[str, Any], state: CallState) -> Any:
        ours: dict[str, Any] = {"num_retries": 0, "max_retries": 0, "timeout": call.total_s, "caching": False}
        if self._key is not None:
            ours["api_key"] = self._key
        if self._config.base_url is not None:
            ours["api_base"] = self._config.base_url
        state.sent = True
        try:
            return await function(model=call.model.upstream, **body, **ours)
        except Exception as error:  # noqa: BLE001  (litellm raises anything)
            raise from_litellm(error, provider=self._config.name, key=self._key) from None

    async def _next(self, stream: Any, state: CallState, made: Completion) -> dict[str, Any] | None:
        """Return the next chunk; None at the end."""
        try:
            return _chunk(await anext(stream))
        except StopAsyncIteration:
            return None
        except Exception as error:  # noqa: BLE001  (as above)
            if made.is_whole:  # only its usage is missing
                return None
            await _close(stream)
            raise from_litellm(error, provider=self._config.name, key=self._key, begun=state.begun) from None
        except BaseException:
            await _close(stream)
            raise

    def _broken(self, state: CallState) -> ProviderError:
        kind: Kind = "broken_stream" if state.begun else "server"
        return ProviderError(kind, f"{self._config.name}: the stream ended too early", may_be_billed=True)


async def _close(stream: Any) -> None:
    """End a stream and, with that, the provider's call."""
    for each in (stream, getattr(stream, "completion_stream", None)):
        close = getattr(each, "aclose", None) or getattr(each, "close", None)
        if close is not None:
            with contextlib.suppress(Exception):
                done = close()
                if asyncio.iscoroutine(done):
                    await done


def _plain(answer: Any) -> dict[str, Any]:
    """Return litellm's answer as plain data, in OpenAI's shape."""
    plain: dict[str, Any] = answer.model_dump(exclude_none=True, mode="json")
    for each in plain.get("choices", ()):
        each.pop("provider_specific_fields", None)
        each.get("message", {}).setdefault("content", None)
    return plain


def _chunk(chunk: Any) -> dict[str, Any]:
    """Return a chunk as plain data. That with the usage has no choices, as OpenAI's."""
    plain: dict[str, Any] = chunk.model_dump(exclude_none=True, mode="json")
    choices = plain.setdefault("choices", [])
    if "usage" in plain and not any(each.get("finish_reason") or each.get("delta") for each in choices):
        plain["choices"] = []
    return plain


# -- litellm itself


@functools.cache
def load_litellm() -> Any:
    """Import litellm so that it fetches nothing, logs no request and sends nothing to anyone else."""
    with _importing:
        os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it fetches its prices, and retries that
        litellm: Any = importlib.import_module("litellm")
        litellm.suppress_debug_info = True
        litellm.telemetry = False
        litellm.turn_off_message_logging = True
        litellm.num_retries = 0
        litellm.drop_params = False
        for name in ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy"):
            logging.getLogger(name).setLevel(logging.ERROR)
        return litellm


async def _loaded() -> Any:
    return load_litellm() if load_litellm.cache_info().currsize else await asyncio.to_thread(load_litellm)


async def close_litellm() -> None:
    """Close the connections of all providers that litellm has called in this process. May be called twice."""
    if load_litellm.cache_info().currsize:
        with contextlib.suppress(Exception):
            await load_litellm().close_litellm_async_clients()


# -- its errors

_PREFIX = re.compile(r"^(?:litellm\.)?\w*(?:Error|Timeout): (?:\w+(?: Error)?: )?(?:\w+Exception - )?")
_NO_KEY = re.compile(
    r"missing (?:credentials|\w* ?api[_ ]key)|no key is set|api[_ ]key (?:is )?(?:required|missing|not)", re.IGNORECASE
)
_NO_CONNECTION = re.compile(
    r"connection error|cannot connect to host|connection refused|name or service not known", re.IGNORECASE
)
_NOT_CONNECTED = frozenset({
    "ConnectError", "ConnectTimeout", "ClientConnectorError", "ClientConnectorDNSError", "ConnectionTimeoutError",
    "ConnectionRefusedError", "gaierror",
})  # fmt: skip
_KINDS: Mapping[str, Kind] = {
    "ContextWindowExceededError": "context_length",
    "ContentPolicyViolationError": "content_policy",
    "AuthenticationError": "auth",
    "PermissionDeniedError": "auth",
    "Timeout": "timeout",
    "APITimeoutError": "timeout",
    "MidStreamFallbackError": "broken_stream",
    "APIConnectionError": "connection",
    "UnsupportedParamsError": "refused",
}


def from_litellm(error: Exception, *, provider: str, key: str | None = None, begun: bool = False) -> ProviderError:
    """Return the error of a call by litellm. `begun`: whether the stream had a chunk before.

    Its status alone misleads: a missing key and a refused connection both are 500, and a timeout is 408.
    """
    names = [each.__name__ for each in type(error).__mro__]
    text = str(getattr(error, "original_exception", None) or error)
    status = getattr(error, "status_code", None)
    status = status if isinstance(status, int) and 100 <= status < 600 else None
    headers = _headers_of(error)
    kind = _kind_of(names, status, f"{text} {_body_of(error)}", answered=bool(headers))
    if kind in ("connection", "broken_stream") or (begun and kind in RETRYABLE):
        kind = "broken_stream" if begun else "connection"
    wait_s = wait_of(kind, headers)
    said = scrub(f"{provider}: {_PREFIX.sub('', text, count=1)}", key)
    answered = status if headers or kind not in ("connection", "timeout", "broken_stream") else None
    if headers and not begun:
        billed = bills(status)
    else:
        is_connected = not any(type(each).__name__ in _NOT_CONNECTED for each in _chain(error))
        billed = begun or (kind in RETRYABLE and is_connected)
    return ProviderError(kind, said, status=answered, retry_after_s=wait_s, may_be_billed=billed)


def _kind_of(names: list[str], status: int | None, text: str, *, answered: bool) -> Kind:
    if not answered and _NO_KEY.search(text):
        return "auth"
    if not answered and _NO_CONNECTION.search(text) and names[0] != "MidStreamFallbackError":
        return "connection"
    known = next((_KINDS[each] for each in names if each in _KINDS), None)
    if known is not None and not (known == "connection" and answered):
        return known
    return "server" if status is None else kind_of(status, text)


def _headers_of(error: Exception) -> dict[str, str]:
    """Return the headers of the provider's response; empty if there was none."""
    for found in (
        getattr(error, "litellm_response_headers", None),
        getattr(getattr(error, "response", None), "headers", None),
    ):
        if found:
            return {str(name): str(value) for name, value in dict(found).items()}
    return {}


def _body_of(error: Exception) -> str:
    """Return what the provider's response says beside litellm's text: the code of its error."""
    parts = [getattr(error, "code", None), getattr(error, "body", None)]
    with contextlib.suppress(Exception):
        parts.append(getattr(getattr(error, "response", None), "text", None))
    return " ".join(str(each) for each in parts if each)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(20):
        if error is None:
            return
        yield error
        error = getattr(error, "original_exception", None) or error.__cause__ or error.__context__
