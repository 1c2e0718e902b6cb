"""OpenAI-compatible endpoints, called over HTTP with aiohttp. Server-sent events are passed on as they come."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any, Final

import aiohttp
import pydantic_core

from .answers import DEPTH_MAX, PLAIN_BYTES_MAX, Completion, PlainChunk, usage_of
from .call_limits import CallLimit, CallState, StreamEnd
from .config import ProviderConfig
from .event_parser import EventParser
from .provider_errors import Kind, ProviderError, from_status, kind_of, message_of, scrub
from .providers import OnChunk, ProviderCall, Reply
from .stored_chunks import as_chunks, is_whole_answer

ANSWER_BYTES_MAX: Final = 64 * 1024 * 1024
EVENT_BYTES_MAX: Final = 8 * 1024 * 1024  # an image may be in one
ERROR_BYTES_MAX: Final = 64 * 1024
LARGE_BYTES: Final = 32 * 1024
CONNECT_S: Final = 10.0
KEEP_S: Final = 4.0  # common servers close after 5 s: of a call that they meet with that, nobody knows if it ran
DONE: Final = b"[DONE]"  # in place of a chunk: the end
DRAIN_S: Final = 0.1  # how long the end of a response may take after its last event, or its connection is closed


class HttpProvider:
    """A provider of the kind "openai". Connections are kept for the next call. Redirects are not followed, and the
    proxies of the environment are not used.

    Limits: an answer of 64 MiB, an event of 8 MiB.
    """

    def __init__(self, config: ProviderConfig) -> None:
        """Raises BadInput if the key is missing. Must be called in the event loop that calls the provider."""
        self._config = config
        self._key = config.read_key()
        trace = aiohttp.TraceConfig()
        trace.on_request_headers_sent.append(_note_sent)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=config.connections, keepalive_timeout=KEEP_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": "aiqueue", **({"Authorization": f"Bearer {self._key}"} if self._key else {})},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
            trace_configs=[trace],
        )

    def __repr__(self) -> str:
        return f"<HttpProvider {self._config.name}>"

    async def chat(self, call: ProviderCall, on_chunk: OnChunk | None = None) -> Reply:
        """See `Provider.chat`."""
        body = {name: value for name, value in call.body.items() if name not in ("stream", "stream_options")}
        if on_chunk is None:
            return await self._call_whole("chat/completions", call, body, "choices")
        options = {**(call.body.get("stream_options") or {}), "include_usage": True}
        return await self._call_streamed(call, {**body, "stream": True, "stream_options": options}, on_chunk)

    async def embed(self, call: ProviderCall) -> Reply:
        """See `Provider.embed`."""
        return await self._call_whole("embeddings", call, call.body, "data")

    async def close(self) -> None:
        """Close all connections. May be called twice."""
        await self._session.close()

    async def _call_whole(self, path: str, call: ProviderCall, body: dict[str, Any], field: str) -> Reply:
        state, started = CallState(), time.monotonic()
        async with CallLimit(self._config.name, call.total_s, state):
            response = await self._post(path, call, body, state)
            try:
                answer = await self._read_whole(response, field, state)
            finally:
                response.release()
        return Reply(answer, usage_of(answer), time.monotonic() - started)

    async def _call_streamed(self, call: ProviderCall, body: dict[str, Any], on_chunk: OnChunk) -> Reply:
        state, made, started = CallState(), Completion(call.choices), time.monotonic()
        first_s = 0.0
        try:
            async with CallLimit(self._config.name, call.total_s, state):
                async with CallLimit(self._config.name, call.first_token_s, state, "the first chunk"):
                    response = await self._post("chat/completions", call, body, state)
                    reads = self._reads(response, state)
                    try:
                        chunks = await anext(reads, None)
                    except BaseException:
                        response.close()
                        raise
                first_s = time.monotonic() - started
                try:
                    async with aclosing(reads), StreamEnd() as end:
                        while chunks is not None:
                            for chunk in chunks:
                                made.add(chunk)
                                if made.is_whole:
                                    end.begin()
                                await on_chunk(chunk)
                            chunks = await anext(reads, None)
                        await _drain(response)
                finally:
                    response.close()  # keeps the connection if the response has been read to its end
        except ProviderError as error:
            if error.kind not in ("broken_stream", "timeout") or not made.is_whole:  # else only its usage is missing
                raise
        if not made.is_finished:
            raise self._error("broken_stream" if state.begun else "server", "the stream ended too early", billed=True)
        return Reply(made.whole(), made.usage, time.monotonic() - started, first_s)

    async def _post(
        self, path: str, call: ProviderCall, body: dict[str, Any], state: CallState
    ) -> aiohttp.ClientResponse:
        """Return the response, whose status is one of success. Raises ProviderError."""
        data = json.dumps({**body, "model": call.model.upstream}, ensure_ascii=False, separators=(",", ":"))
        timeout = aiohttp.ClientTimeout(total=None, connect=call.start_within_s, sock_connect=CONNECT_S)
        headers = {"Content-Type": "application/json", **({"Idempotency-Key": call.id} if call.id else {})}
        try:
            response = await self._session.post(
                f"{self._config.base_url}/{path}",
                data=data.encode("utf-8", "replace"),
                headers=headers,
                allow_redirects=False,
                timeout=timeout,
                trace_request_ctx=state,
            )
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(error, aiohttp.ConnectionTimeoutError) and call.start_within_s is not None:
                text = f"no connection within {call.start_within_s:.1f} s"
                raise self._error("late", text, billed=False) from None
            raise self._broken(error, state) from None
        if 200 <= response.status < 300:
            return response
        try:
            said = await self._read(response, ERROR_BYTES_MAX, state, cut=True)
        finally:
            response.release()
        raise from_status(response.status, response.headers, said, provider=self._config.name, key=self._key)

    async def _read_whole(self, response: aiohttp.ClientResponse, field: str, state: CallState) -> dict[str, Any]:
        """Return the answer in a response, which has a list in `field`. Raises ProviderError."""
        answer = self._parse(await self._read(response, ANSWER_BYTES_MAX, state))
        if not isinstance(answer, dict) or not isinstance(answer.get(field), list):
            raise self._odd(answer, state)
        return answer

    async def _read(self, response: aiohttp.ClientResponse, most: int, state: CallState, *, cut: bool = False) -> bytes:
        """Return the body of a response. Above `most` bytes, it is cut or an error."""
        body = bytearray()
        while part := await self._part(response, state):
            body += part
            if len(body) > most and cut:
                break
            if len(body) > most:
                raise self._error("refused", f"an answer above {most:,} bytes", billed=True)
        return bytes(body[:most])

    async def _part(self, response: aiohttp.ClientResponse, state: CallState) -> bytes:
        """Return what has come of a body, empty at its end. Raises ProviderError."""
        try:
            return await response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise self._broken(error, state) from None

    async def _reads(
        self, response: aiohttp.ClientResponse, state: CallState
    ) -> AsyncGenerator[Iterable[dict[str, Any]]]:
        """Yield the chunks of a stream until its end, those together that have come together, at least one. An answer
        that comes whole in their place is paid for, too.

        Chunks that come behind an error are not looked at: `Iterable` raises it in its turn.
        """
        if response.content_type != "text/event-stream":
            answer = await self._read_whole(response, "choices", state)
            state.begun = True
            yield as_chunks(answer)
            return
        parser, total = EventParser(), 0
        while part := await self._part(response, state):
            total += len(part)
            if len(part) >= LARGE_BYTES:  # a stream that is all lines takes long to split
                await asyncio.sleep(0)
            if events := parser.feed(part):
                is_end = events[-1] == DONE or DONE in events
                yield self._chunks(events, state)
                if is_end:
                    return
            if parser.kept > EVENT_BYTES_MAX or total > ANSWER_BYTES_MAX:
                raise self._error("refused", "a stream or an event that is too large", billed=True)
        if events := parser.rest():
            yield self._chunks(events, state)

    def _chunks(self, events: list[bytes], state: CallState) -> Iterator[dict[str, Any]]:
        """Yield the chunks in events, up to the last event of a stream. Raises ProviderError."""
        for event in events:
            if event == DONE:
                return
            chunk = self._parse(event)
            if not isinstance(chunk, dict) or chunk.get("error") is not None:
                raise self._odd(chunk, state)
            state.begun = True
            if b'"message"' in event and is_whole_answer(chunk):
                yield from as_chunks(chunk)
            elif len(event) <= PLAIN_BYTES_MAX and event.count(b"{") + event.count(b"[") <= DEPTH_MAX:
                yield PlainChunk(chunk)
            else:
                yield chunk

    def _parse(self, data: bytes) -> Any:
        """Return the JSON in `data`; None if it is none. Raises ProviderError for what is nested too deeply to read."""
        try:
            return pydantic_core.from_json(data)
        except ValueError:  # it reads less than Python does, such as half of a character
            pass
        try:
            return json.loads(data.decode())
        except ValueError:
            return None
        except RecursionError:
            raise self._error("refused", "an answer that is nested too deeply", billed=True) from None

    # -- errors

    def _error(self, kind: Kind, text: str, *, status: int | None = None, billed: bool) -> ProviderError:
        said = scrub(f"{self._config.name}: {text}", self._key)
        return ProviderError(kind, said, status=status, may_be_billed=billed)

    def _broken(self, error: Exception, state: CallState) -> ProviderError:
        what = "the stream broke" if state.begun else "the connection broke" if state.sent else "nothing answers"
        kind: Kind = "broken_stream" if state.begun else "connection"
        said = f": {error}" if isinstance(error, OSError) else ""  # others quote what the provider has sent
        return self._error(kind, f"{what}: {type(error).__name__}{said}", billed=state.sent)

    def _odd(self, answer: Any, state: CallState) -> ProviderError:
        """Return the error of a response with status 200, or of an event in a stream, that is no answer."""
        said = answer.get("error") if isinstance(answer, dict) else None
        if said is None:
            kind: Kind = "broken_stream" if state.begun else "server"
            return self._error(kind, "an answer that is not in OpenAI's shape", status=200, billed=True)
        text = json.dumps(answer, ensure_ascii=False)
        code = said.get("code") if isinstance(said, dict) else None
        kind = kind_of(code if isinstance(code, int) and 400 <= code < 600 else 400, text)
        if kind in ("refused", "server"):  # without a status that says so, it may go away
            kind = "broken_stream" if state.begun else "server"
        return self._error(kind, message_of(text), status=200, billed=state.begun)


async def _note_sent(_session: aiohttp.ClientSession, context: SimpleNamespace, _params: Any) -> None:
    context.trace_request_ctx.sent = True


async def _drain(response: aiohttp.ClientResponse) -> None:
    """Wait for the end of a response, so that its connection can be used again."""
    try:
        async with asyncio.timeout(DRAIN_S):
            while not response.content.at_eof():
                await response.content.readany()
    except (TimeoutError, aiohttp.ClientError, OSError):
        return
