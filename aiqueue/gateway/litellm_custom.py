"""The custom provider that litellm calls: each call is a job, whose answer or chunks are litellm's objects again.

The client lives on an event loop of its own, in a thread: litellm is called from code with and without asyncio, and
from several event loops in turn.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import litellm

from .. import subjects
from ..client import Handle, SyncClient, connect_sync
from ..errors import AIQueueError, JobFailed, Unavailable
from ..payload import SteppedGenerator, parse_message
from .answers import usage_of
from .api_key_store import PREFIX
from .api_keys import ApiKeys, KeyCredit
from .client import Gateway
from .config import GatewayConfig
from .litellm_chunks import ChunkReader, ordered
from .litellm_errors import NoApiKey, NotAllowed, to_litellm
from .requests import EmbeddingRequest, GatewayRequest
from .runtime import Request

ROUTED_MAX: Final = 10_000  # calls of a Router whose ids are kept for their retries
_NOT_SENT: Final = frozenset({"extra_body", "max_retries", "stream"})  # options that are for the library
_NOT_KEPT: Final = frozenset({"provider_specific_fields"})  # of a message, which litellm adds to answers
_CLOSED: Final = "the connection was closed during the call"

T = TypeVar("T")


@dataclass(slots=True)
class _DoorClient:
    """What is open in this process."""

    sync: SyncClient
    gateway: Gateway
    keys: ApiKeys | None = None
    opening_keys: asyncio.Lock = field(default_factory=asyncio.Lock)
    pid: int = field(default_factory=os.getpid)

    async def api_keys(self) -> ApiKeys:
        async with self.opening_keys:
            if self.keys is None:
                keys = ApiKeys(self.sync.on_loop)
                await keys.start()
                self.keys = keys
            return self.keys

    def close(self) -> None:
        if self.keys is not None:
            with contextlib.suppress(AIQueueError):
                self.sync.submit(self.keys.close()).result()
        self.sync.close()


@dataclass(frozen=True, slots=True)
class _Call:
    """A call as litellm makes it. `token`: what was given as `api_key`."""

    request: Request
    token: str
    priority: str
    timeout_s: float | None


class GatewayLLM(litellm.CustomLLM):  # type: ignore[misc]  # litellm has no types where it is not installed
    """litellm's provider ``aiqueue``, see `register`.

    A retry of litellm gets the answer of the first call, which is made once: the request's id is made of litellm's id
    for the call. Whoever leaves a call, or lets it time out, does not stop it.
    """

    def __init__(
        self, *, tenant: str | None, priority: str, config: GatewayConfig | None, connection: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self._tenant = None if tenant is None else subjects.token("tenant", tenant)
        self._priority, self._config, self._connection = priority, config, dict(connection)
        self._lock = threading.Lock()
        self._opened: _DoorClient | None = None
        self._routed: OrderedDict[tuple[str, str], str] = OrderedDict()

    def close(self) -> None:
        """Disconnect. Safe twice. The next call connects again."""
        with self._lock:
            opened, self._opened = self._opened, None
        if opened is not None and opened.pid == os.getpid():
            opened.close()

    # -- what litellm calls

    def completion(self, *, model: str, **given: Any) -> Any:
        return self._run(model, lambda opened: self._complete(opened, model, given))

    async def acompletion(self, *, model: str, **given: Any) -> Any:
        return await self._run_async(model, lambda opened: self._complete(opened, model, given))

    def embedding(self, *, model: str, **given: Any) -> Any:
        return self._run(model, lambda opened: self._embed(opened, model, given))

    async def aembedding(self, *, model: str, **given: Any) -> Any:
        return await self._run_async(model, lambda opened: self._embed(opened, model, given))

    def streaming(self, *, model: str, **given: Any) -> Iterator[Any]:
        chunks = SteppedGenerator(self._stream(model, given))
        try:
            while (chunk := self._run(model, lambda _: chunks.next())) is not None:
                yield chunk
        finally:
            with contextlib.suppress(Exception):
                self._run(model, lambda _: chunks.close())

    async def astreaming(self, *, model: str, **given: Any) -> AsyncIterator[Any]:
        chunks = SteppedGenerator(self._stream(model, given))
        try:
            while (chunk := await self._run_async(model, lambda _: chunks.next())) is not None:
                yield chunk
        finally:
            with contextlib.suppress(Exception):
                await self._run_async(model, lambda _: chunks.close())

    # -- from the caller's thread to the client's event loop

    def _run(self, model: str, work: Callable[[_DoorClient], Coroutine[Any, Any, T]]) -> T:
        try:
            opened = self._open()
            future = opened.sync.submit(work(opened))
            try:
                return future.result()
            except concurrent.futures.CancelledError:
                raise Unavailable(_CLOSED, maybe_stored=True) from None
            except BaseException:  # a signal handler's, while this thread waits; a call that has ended stays as it is
                future.cancel()
                raise
        except AIQueueError as error:
            raise to_litellm(error, model) from None

    async def _run_async(self, model: str, work: Callable[[_DoorClient], Coroutine[Any, Any, T]]) -> T:
        try:
            opened = self._opened
            if opened is None or opened.pid != os.getpid():
                opened = await asyncio.to_thread(self._open)
            try:
                return await asyncio.wrap_future(opened.sync.submit(work(opened)))
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                raise Unavailable(_CLOSED, maybe_stored=True) from None
        except AIQueueError as error:
            raise to_litellm(error, model) from None

    def _open(self) -> _DoorClient:
        """Connect, once in each process. Raises what `connect` and `Gateway` raise."""
        with self._lock:
            if self._opened is None or self._opened.pid != os.getpid():
                sync = connect_sync(**self._connection).open()
                try:
                    gateway = Gateway(sync.on_loop, self._config, needs_keys=False)
                except BaseException:
                    sync.close()
                    raise
                self._opened = _DoorClient(sync, gateway)
            return self._opened

    # -- on the client's event loop

    async def _complete(self, opened: _DoorClient, model: str, given: Mapping[str, Any]) -> Any:
        call = self._read_call(GatewayRequest, model, given, messages=_plain(given["messages"]))
        answer = await self._answer(opened, call)
        response = litellm.ModelResponse(**answer)
        response._hidden_params["response_cost"] = answer["aiqueue"].get("cost")
        return response

    async def _embed(self, opened: _DoorClient, model: str, given: Mapping[str, Any]) -> Any:
        answer = await self._answer(opened, self._read_call(EmbeddingRequest, model, given, input=given["input"]))
        response = litellm.EmbeddingResponse(**{name: answer.get(name) for name in ("model", "data", "usage")})
        response._hidden_params["response_cost"] = answer["aiqueue"].get("cost")
        return response

    async def _answer(self, opened: _DoorClient, call: _Call) -> dict[str, Any]:
        handle, credit = await self._enqueue(opened, call)
        with _settling(credit) as settle:
            answer = await handle.result(call.timeout_s)
            settle(answer)
        return answer

    async def _stream(self, model: str, given: Mapping[str, Any]) -> AsyncGenerator[Any, None]:
        messages = _plain(given["messages"])
        call = self._read_call(GatewayRequest, model, given, messages=messages, stream=True)
        assert self._opened is not None
        handle, credit = await self._enqueue(self._opened, call)
        reader = ChunkReader(handle, call.timeout_s)
        with _settling(credit) as settle:
            async with aclosing(ordered(reader.read())) as chunks:
                async for chunk in chunks:
                    yield litellm.types.utils.ModelResponseStream(**{**chunk, "model": model})
            settle(reader.answer)

    async def _enqueue(self, opened: _DoorClient, call: _Call) -> tuple[Handle[dict[str, Any]], KeyCredit]:
        tenant, key, credit = self._tenant, None, KeyCredit()
        if call.token.startswith(PREFIX):
            keys = await opened.api_keys()
            key = keys.find(call.token)
            if key is None:
                raise NoApiKey("the API key is not known, or is revoked")
            if not key.allows(call.request.model) or not key.allows_priority(call.priority):
                wanted = f"model {call.request.model[:80]!r} with priority {call.priority[:40]!r}"
                raise NotAllowed(f"API key {key.id} may not use {wanted}")
            tenant = key.tenant
            opened.gateway.check(call.request, tenant=tenant, api_key=key)  # before it counts
            credit = await keys.admit(key, tokens=opened.gateway.tokens_at_most(call.request))
        elif tenant is None:
            raise NoApiKey('whose request is this? Give a tenant\'s API key, api_key="aiq-…", or register(tenant="…")')
        try:
            handle = await opened.gateway.enqueue(call.request, tenant=tenant, priority=call.priority, api_key=key)
        except BaseException:
            credit.settle(0)
            raise
        return handle, credit

    def _read_call(
        self, kind: type[GatewayRequest | EmbeddingRequest], model: str, given: Mapping[str, Any], **fields: Any
    ) -> _Call:
        """Return what litellm asks for. Raises DecodeError, in one line, for what is no request."""
        options = given.get("optional_params") or {}
        sent = {name: value for name, value in options.items() if name not in _NOT_SENT}
        request = parse_message(kind, {**sent, **(options.get("extra_body") or {}), **fields, "model": model})
        if request.request_id is None:
            request = request.model_copy(update={"request_id": self._request_id(given, request.fingerprint())})
        told = {str(name).lower(): value for name, value in (given.get("headers") or {}).items()}
        priority = str(told.get("priority") or self._priority)
        return _Call(request, str(given.get("api_key") or ""), priority, _seconds(given.get("timeout")))

    def _request_id(self, given: Mapping[str, Any], fingerprint: str) -> str:
        """Return the id of a request: the same one for a retry of litellm.

        A Router gives each retry another call id, and the same trace id; but callers may give one trace id to several
        calls. So a retry has the id of the last call of the same trace that asked the same.
        """
        told = given.get("logging_obj")
        call = getattr(told, "litellm_call_id", None) or subjects.new_id()
        own = f"litellm-{call}-{fingerprint[:16]}"
        params = given.get("litellm_params") or {}
        metadata = params.get("metadata") or params.get("litellm_metadata") or {}
        retries = metadata.get("attempted_retries") if isinstance(metadata, Mapping) else None
        trace = getattr(told, "litellm_trace_id", None)
        if retries is None or not trace:
            return own
        route = str(trace), fingerprint
        if retries and route in self._routed:
            return self._routed[route]
        self._routed[route] = own
        self._routed.move_to_end(route)
        if len(self._routed) > ROUTED_MAX:
            self._routed.popitem(last=False)
        return own


@contextlib.contextmanager
def _settling(credit: KeyCredit) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Lend what settles a credit by the answer. A request that has failed counts no tokens, one that is left all."""

    def settle(answer: Mapping[str, Any]) -> None:
        usage = usage_of(answer)
        credit.settle(None if usage is None else usage.total_tokens)

    try:
        yield settle
    except JobFailed:
        credit.settle(0)
        raise
    finally:
        credit.settle(None)


def _plain(messages: Any) -> list[dict[str, Any]]:
    """Return messages without what litellm adds to answers, which come back as messages."""
    plain = [each if isinstance(each, dict) else each.model_dump() for each in messages]
    return [
        {name: value for name, value in each.items() if value is not None and name not in _NOT_KEPT} for each in plain
    ]


def _seconds(timeout: Any) -> float | None:
    """Return a timeout of litellm's: a number, or httpx's for several phases. None: no limit."""
    found = getattr(timeout, "read", timeout)
    return None if found is None else float(found)
