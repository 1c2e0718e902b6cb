"""A stand-in for a provider, over real HTTP: OpenAI's endpoints, faults on command, and a log of every call.

`python -m aiqueue.gateway.standin --port 8080` runs it alone. For tests, demonstrations and measurements: it answers
with the words it was asked, and costs nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import itertools
import json
import math
import struct
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal, Self

import pydantic

try:
    from aiohttp import web
    from aiohttp.typedefs import Middleware
except ModuleNotFoundError as error:
    remedy = f"the stand-in needs {error.name}: pip install 'aiqueue[gateway]'"
    if __name__ == "__main__":
        sys.exit(f"error: {remedy}")
    raise ModuleNotFoundError(remedy, name=error.name) from None

CALLS_MAX: Final = 1_000_000  # in the log
BODY_BYTES_MAX: Final = 64 * 1024 * 1024
WINDOW_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How the stand-in answers. Times in seconds.

    `first_token_s`: until the first token, and with `token_s` for each token until the whole answer.
    `completion_tokens`: of an answer, unless the request allows fewer. `rpm`, `tpm`: above them in a sliding window of
    `window_s`, each (key, model) gets a 429 with Retry-After; `tpm` counts prompt and allowed completion. `stamped`:
    each chunk has in `system_fingerprint` when it was sent, in seconds since the epoch.
    """

    first_token_s: float = 0.0
    token_s: float = 0.0
    completion_tokens: int = 20
    rpm: int | None = None
    tpm: int | None = None
    window_s: float = WINDOW_S
    stamped: bool = False


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong with the next `count` calls of `model` (None: of any model).

    - `status`: answered with this status, `message` and `retry_after_s`, if not 200.
    - `abort_after`: the connection is cut after so many chunks of a stream, or before a whole answer.
    - `delay_s`: more time until the first token. `skip_usage`: the answer has no usage.
    """

    status: int = 200
    retry_after_s: float | None = None
    message: str = "as ordered"
    code: str | None = None
    abort_after: int | None = None
    delay_s: float = 0.0
    skip_usage: bool = False
    model: str | None = None
    count: int = 1


@dataclass(slots=True)
class LoggedCall:
    """One call. Times: seconds since the epoch; `ended_at` is None while it runs.

    `outcome`: "running", "ok", "refused" (a status other than 200), "aborted" (the stand-in cut the connection), "lost"
    (the client was gone). `completion_tokens`: those that were made, also if the client was gone. What it would bill is
    `prompt_tokens` and `completion_tokens` of all calls that are not refused. `user`: the request's own field.
    """

    number: int
    path: str
    model: str
    key: str
    idempotency_key: str
    started_at: float
    streamed: bool = False
    ended_at: float | None = None
    status: int = 200
    outcome: Literal["running", "ok", "refused", "aborted", "lost"] = "running"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    user: str = ""
    body: dict[str, Any] = field(default_factory=dict, repr=False)


class StandIn:
    """The stand-in, in this process. ``async with StandIn() as provider: provider.url``.

    `behaviour` may be replaced at any time. Over HTTP, GET /log has the calls, POST /behaviour and POST /fault take the
    fields of `Behaviour` and `Fault`.
    """

    def __init__(self, behaviour: Behaviour | None = None) -> None:
        self.behaviour = behaviour or Behaviour()
        self.calls: list[LoggedCall] = []
        self._faults: deque[Fault] = deque()
        self._windows: dict[tuple[str, str], deque[tuple[float, int]]] = {}
        self._runner: web.AppRunner | None = None
        self._host = ""
        self.port = 0

    @property
    def url(self) -> str:
        """Its base URL, for `base_url` in gateway.toml."""
        return f"http://{self._host}:{self.port}/v1"

    async def start(self, host: str = "127.0.0.1", port: int = 0, *, middlewares: Iterable[Middleware] = ()) -> None:
        """Serve. `port` 0: a free one. `middlewares`: aiohttp's, which see each request first."""
        app = web.Application(client_max_size=BODY_BYTES_MAX, middlewares=middlewares)
        app.add_routes([
            web.post("/v1/chat/completions", self._chat),
            web.post("/v1/embeddings", self._embed),
            web.get("/v1/models", self._models),
            web.get("/log", self._log),
            web.post("/behaviour", self._set_behaviour),
            web.post("/fault", self._set_fault),
        ])  # fmt: skip
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        self._host, self.port = host, self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Close all connections. May be called twice, and before `start`."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def order(self, fault: Fault) -> None:
        """Let the next calls fail. Faults for the same model follow one another."""
        self._faults.append(fault)

    def clear_faults(self) -> None:
        """Let no more calls fail."""
        self._faults.clear()

    def billed(self) -> tuple[int, int]:
        """Return the prompt and completion tokens of all calls that were not refused."""
        calls = [each for each in self.calls if each.outcome != "refused"]
        return sum(each.prompt_tokens for each in calls), sum(each.completion_tokens for each in calls)

    # -- one call

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body, call = await self._begin(request)
        with self._ending(call):
            messages = body.get("messages")
            if not isinstance(messages, list) or not messages:
                return self._refuse(call, Fault(400, message="messages must be a list that is not empty"))
            call.prompt_tokens = sum(4 + count_tokens(_text(each)) for each in messages)
            allowed = body.get("max_completion_tokens") or body.get("max_tokens")
            tokens = min(self.behaviour.completion_tokens, allowed or self.behaviour.completion_tokens)
            choices = body.get("n") or 1
            fault = self._next_fault(call, (allowed or tokens) * choices)
            if fault.status != 200:
                return self._refuse(call, fault)
            words = list(itertools.islice(itertools.cycle(_text(messages[-1]).split() or ["nothing"]), tokens))
            reason = "length" if allowed and tokens == allowed else "stop"
            head = {"id": f"chatcmpl-{call.number}", "created": int(call.started_at), "model": call.model}
            if call.streamed:
                usage = bool((body.get("stream_options") or {}).get("include_usage")) and not fault.skip_usage
                return await self._stream(request, call, fault, head, words, reason, choices, usage)
            await asyncio.sleep(self.behaviour.first_token_s + fault.delay_s + self.behaviour.token_s * tokens)
            if fault.abort_after is not None:
                return self._abort(request, call)
            call.completion_tokens = tokens * choices
            message = {"role": "assistant", "content": " ".join(words), "refusal": None}
            made = [
                {"index": index, "message": message, "finish_reason": reason, "logprobs": None}
                for index in range(choices)
            ]
            answer = {**head, "object": "chat.completion", "choices": made}
            return await self._answer(request, call, answer if fault.skip_usage else {**answer, "usage": _usage(call)})

    async def _stream(
        self, request: web.Request, call: LoggedCall, fault: Fault, head: dict[str, Any], words: list[str], reason: str,
        choices: int, usage: bool,
    ) -> web.StreamResponse:  # fmt: skip
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await asyncio.sleep(self.behaviour.first_token_s + fault.delay_s)
        head = {**head, "object": "chat.completion.chunk"}
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        deltas += [{"content": word if number == 0 else f" {word}"} for number, word in enumerate(words)]
        with self._losing(call):
            await response.prepare(request)
            for number, delta in enumerate([*deltas, {}]):
                if fault.abort_after is not None and number >= fault.abort_after:
                    return self._abort(request, call, response)
                end = reason if not delta else None
                if self.behaviour.stamped:
                    head["system_fingerprint"] = f"{time.time():.6f}"
                for index in range(choices):
                    choice = {"index": index, "delta": delta, "finish_reason": end, "logprobs": None}
                    await response.write(_event({**head, "choices": [choice]}))
                if 0 < number <= len(words):
                    call.completion_tokens += choices
                    if self.behaviour.token_s:
                        await asyncio.sleep(self.behaviour.token_s)
            if usage:
                await response.write(_event({**head, "choices": [], "usage": _usage(call)}))
            await response.write(b"data: [DONE]\n\n")
            await response.write_eof()
            call.outcome = "ok"
        return response

    async def _embed(self, request: web.Request) -> web.StreamResponse:
        body, call = await self._begin(request)
        with self._ending(call):
            given = body.get("input")
            inputs = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given or []
            call.prompt_tokens = sum(count_tokens(each) if isinstance(each, str) else len(each) for each in inputs)
            fault = self._next_fault(call, 0)
            if fault.status != 200 or not inputs:
                return self._refuse(call, fault if inputs else Fault(400, message="input is missing"))
            await asyncio.sleep(self.behaviour.first_token_s + fault.delay_s)
            if fault.abort_after is not None:
                return self._abort(request, call)
            made = [embed(each, body.get("dimensions") or 8) for each in inputs]
            as_text = body.get("encoding_format") == "base64"
            data = [
                {"object": "embedding", "index": index, "embedding": _base64(each) if as_text else each}
                for index, each in enumerate(made)
            ]
            usage = {"prompt_tokens": call.prompt_tokens, "total_tokens": call.prompt_tokens}
            answer = {"object": "list", "data": data, "model": call.model, "usage": usage}
            return await self._answer(request, call, answer)

    async def _begin(self, request: web.Request) -> tuple[dict[str, Any], LoggedCall]:
        started_at = time.time()
        try:
            body = await request.json()
        except ValueError:
            body = None
        fields = body if isinstance(body, dict) else {}
        key = request.headers.get("Authorization", "").removeprefix("Bearer ")
        id_ = request.headers.get("Idempotency-Key", "")
        number = len(self.calls)
        call = LoggedCall(number, request.path, str(fields.get("model", "")), key, id_, started_at, body=fields)
        call.streamed, call.user = bool(fields.get("stream")), str(fields.get("user", ""))
        if number < CALLS_MAX:
            self.calls.append(call)
        return fields, call

    def _next_fault(self, call: LoggedCall, completion_tokens: int) -> Fault:
        """Return what goes wrong with this call; a fault with status 200 if nothing does."""
        for position, fault in enumerate(self._faults):
            if fault.model in (None, call.model):
                del self._faults[position]
                if fault.count > 1:
                    self._faults.insert(position, replace(fault, count=fault.count - 1))
                return fault
        behaviour, now = self.behaviour, time.monotonic()
        if behaviour.rpm is None and behaviour.tpm is None:
            return Fault()
        used = self._windows.setdefault((call.key, call.model), deque())
        while used and used[0][0] <= now - behaviour.window_s:
            used.popleft()
        tokens = call.prompt_tokens + completion_tokens
        most_requests, most_tokens = behaviour.rpm or math.inf, behaviour.tpm or math.inf
        if len(used) + 1 > most_requests or sum(each[1] for each in used) + tokens > most_tokens:
            wait_s = used[0][0] + behaviour.window_s - now if used else behaviour.window_s
            return Fault(429, retry_after_s=round(wait_s, 3), message="Rate limit reached", code="rate_limit_exceeded")
        used.append((now, tokens))
        return Fault()

    @staticmethod
    def _refuse(call: LoggedCall, fault: Fault) -> web.Response:
        call.status, call.outcome, call.prompt_tokens = fault.status, "refused", 0
        headers = {}
        if fault.retry_after_s is not None:
            headers = {"Retry-After": str(max(1, math.ceil(fault.retry_after_s)))}
            headers["retry-after-ms"] = str(round(fault.retry_after_s * 1000))
        error = {"message": fault.message, "type": "stand_in", "param": None, "code": fault.code}
        return web.json_response({"error": error}, status=fault.status, headers=headers)

    @staticmethod
    def _abort(
        request: web.Request, call: LoggedCall, response: web.StreamResponse | None = None
    ) -> web.StreamResponse:
        call.outcome = "aborted"
        if request.transport is not None:
            request.transport.abort()
        return response or web.Response()

    async def _answer(self, request: web.Request, call: LoggedCall, answer: dict[str, Any]) -> web.Response:
        with self._losing(call):
            if request.transport is None or request.transport.is_closing():
                raise ConnectionResetError
            call.outcome = "ok"
        return web.json_response(answer)

    @staticmethod
    @contextlib.contextmanager
    def _losing(call: LoggedCall) -> Iterator[None]:
        try:
            yield
        except (ConnectionError, OSError):
            call.outcome = "lost"

    @staticmethod
    @contextlib.contextmanager
    def _ending(call: LoggedCall) -> Iterator[None]:
        try:
            yield
        finally:
            call.ended_at = time.time()
            if call.outcome == "running":
                call.outcome = "lost"

    # -- other endpoints

    async def _models(self, request: web.Request) -> web.Response:
        names = sorted({each.model for each in self.calls if each.model})
        return web.json_response({"object": "list", "data": [{"id": each, "object": "model"} for each in names]})

    async def _log(self, request: web.Request) -> web.Response:
        since = int(request.query.get("since", "0"))
        return web.json_response([{**asdict(each), "body": None} for each in self.calls[since:]])

    async def _set_behaviour(self, request: web.Request) -> web.Response:
        self.behaviour = await _read_order(request, self.behaviour)
        return web.json_response(asdict(self.behaviour))

    async def _set_fault(self, request: web.Request) -> web.Response:
        fault = await _read_order(request, Fault())
        self.order(fault)
        return web.json_response(asdict(fault))


def count_tokens(text: str) -> int:
    """Return the tokens of a text, as the stand-in counts them: a fourth of its bytes, rounded up."""
    return -(-len(text.encode("utf-8", "replace")) // 4)


def embed(given: Any, dimensions: int) -> list[float]:
    """Return an embedding of length 1, always the same one for the same input."""
    seed = hashlib.sha256(json.dumps(given).encode()).digest()
    raw = [seed[index % 32] - 127.5 + index // 32 for index in range(dimensions)]
    length = math.sqrt(sum(each * each for each in raw))
    return [each / length for each in raw]


def _base64(values: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return " ".join(str(each.get("text", "")) for each in content)
    return str(content or "")


def _usage(call: LoggedCall) -> dict[str, Any]:
    prompt, completion = call.prompt_tokens, call.completion_tokens
    total = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {**total, "prompt_tokens_details": {"cached_tokens": 0}}


async def _read_order(request: web.Request, present: Any) -> Any:
    """Return what stands, with the fields of the body in place of its own. Raises HTTPBadRequest, in one line."""
    known = asdict(present)
    with contextlib.suppress(ValueError):
        given = await request.json()
        if isinstance(given, dict) and given.keys() <= known.keys():
            try:
                return pydantic.TypeAdapter(type(present)).validate_python(known | given)
            except pydantic.ValidationError as error:
                first = error.errors()[0]
                raise web.HTTPBadRequest(text=f"{first['loc'][0]}: {first['msg']}") from None
    raise web.HTTPBadRequest(text=f"the body must be a JSON object with some of the fields {', '.join(known)}")


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


async def _serve(behaviour: Behaviour, host: str, port: int) -> None:
    provider = StandIn(behaviour)
    await provider.start(host, port)
    sys.stdout.write(f"{provider.url}\n")
    sys.stdout.flush()
    try:
        await asyncio.Event().wait()
    finally:
        await provider.stop()


_OPTIONS: Final = (
    ("first_token_s", float, "seconds until the first token"),
    ("token_s", float, "seconds for each token"),
    ("completion_tokens", int, "tokens of an answer, unless the request allows fewer"),
    ("rpm", int, "requests in a window; more are refused with 429 and Retry-After"),
    ("tpm", int, "tokens in a window; more are refused with 429 and Retry-After"),
    ("window_s", float, "seconds of that window"),
)


def main() -> None:
    """Run the stand-in until it is stopped. Its base URL is the first line of its output."""
    faults = f"Faults: curl -d '{{\"status\": 500}}' http://HOST:PORT/fault; fields: {', '.join(asdict(Fault()))}."
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser("python -m aiqueue.gateway.standin", description=about, epilog=faults)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default: a free one)")
    for name, kind, text in _OPTIONS:
        default = getattr(Behaviour(), name)
        shown = text + (" (default: no limit)" if default is None else " (default: %(default)s)")
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=shown)
    given = parser.parse_args()
    try:
        behaviour = Behaviour(**{name: getattr(given, name) for name, _, _ in _OPTIONS})
        asyncio.run(_serve(behaviour, given.host, given.port))
    except (OSError, OverflowError) as error:
        told = str(getattr(error, "strerror", None) or error).lower()
        why = " ".join(told.rpartition("): ")[2].split())  # asyncio names the address, too
        sys.exit(f"error: cannot listen on {given.host}:{given.port}: {why}; choose another --host or --port")
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
