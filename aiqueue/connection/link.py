"""One supervised connection: it comes back for ever, and says in one line when it goes and when it returns."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

from ..config import Settings
from ..errors import AccessDenied, AIQueueError, NotFound, Unavailable
from . import frames
from .dial import Link, dial, reconnect_delay_s
from .faults import denied_subject, from_api, text, translate
from .frames import Headers, PubAck, Received, Stored
from .subscription import Callback, Subscription

log = logging.getLogger("aiqueue.connection")

STORE_TRY_S = 5.0  # one try of a publish; the caller's own timeout spans the tries
API_S = 5.0
SAID_MAX = 100
DIRECT_BATCH = 256


class Connection:
    """A connection to one NATS server or cluster.

    After `open` it stays until `close`: lost links are sought again with exponential backoff and jitter, without
    end, and a client that closes itself (nats-py does so on any unexpected -ERR) is built anew with its
    subscriptions. Calls made meanwhile wait for the link within their own timeouts.
    """

    def __init__(self, settings: Settings, *, before_rebuild: Callable[[], Awaitable[None]] | None = None) -> None:
        self.settings = settings
        self._before_rebuild = before_rebuild
        self._link: Link | None = None
        self._up = asyncio.Event()
        self._closing = False
        self._rebuilding: asyncio.Task[None] | None = None
        self._lost_at = 0.0
        self._subscriptions: set[Subscription] = set()
        self._regained: list[Callable[[], None]] = []
        self._acks: dict[str, tuple[asyncio.Future[Received], str]] = {}
        self._ack_inbox = ""
        self._ack_count = 0
        self._nudging: asyncio.Task[None] | None = None
        self._asking: dict[str, set[asyncio.Future[Any]]] = {}
        self._deaf: str | None = None  # the ack inbox, when this user may not listen there
        self._said: set[str] = set()  # refusals told since the link was last regained

    @property
    def connected(self) -> bool:
        return self._up.is_set()

    @property
    def max_payload(self) -> int:
        """Bytes that the server takes in one frame, headers counted."""
        return self._client.max_payload

    @property
    def server(self) -> str:
        """The connected server's address, without credentials."""
        url = self._client.connected_url
        return f"{url.scheme}://{url.hostname}:{url.port}" if url else "(not connected)"

    @property
    def server_version(self) -> str:
        return str(self._client._server_info.get("version", "unknown"))

    @property
    def _client(self) -> Link:
        if self._link is None:
            raise Unavailable("the connection is not open")
        return self._link

    async def open(self) -> None:
        """Connect. Raises Unavailable, AccessDenied, SettingsError."""
        if self._link is None:
            self._closing = False
            await self._build()

    async def close(self) -> None:
        """Flush what was published and leave. Safe twice and unopened."""
        self._closing = True
        self._up.clear()
        for task in (self._rebuilding, self._nudging):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        link, self._link = self._link, None
        if link is not None:
            with contextlib.suppress(Exception):
                if link.is_connected:
                    await link.flush(timeout=2)
            with contextlib.suppress(Exception):
                await link.close()
        self._fail_acks(Unavailable("the connection was closed", maybe_stored=True))
        self._subscriptions.clear()
        self._up.set()  # wake those who wait for the link: it will not come any more
        self._up.clear()

    def on_regained(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` whenever a lost link is back (what the server knew of it is gone: pulls, inboxes in
        flight). Returns what takes it off again.
        """
        self._regained.append(callback)
        return lambda: self._regained.remove(callback) if callback in self._regained else None

    async def wait_up(self, timeout_s: float) -> None:
        """Return when the link stands. Raises Unavailable after `timeout_s` seconds."""
        if self._up.is_set():
            return
        if self._link is None and self._rebuilding is None:
            raise Unavailable("the connection is not open")
        try:
            async with asyncio.timeout(timeout_s):
                await self._up.wait()
        except TimeoutError:
            raise Unavailable(f"no connection to {self.settings.addresses}") from None
        if self._closing:
            raise Unavailable("the connection was closed")

    # -- plain messages

    def new_inbox(self) -> str:
        return self._client.new_inbox()

    async def subscribe(self, subject: str, callback: Callback, *, queue: str = "") -> Subscription:
        """Have `callback` called with each message on `subject`, one at a time."""
        subscription = Subscription(self._subscriptions.discard, subject, callback, queue)
        if self._client.is_closed:  # and being built anew
            await self.wait_up(API_S)
        await self._attach(self._client, subscription)
        self._subscriptions.add(subscription)
        return subscription

    async def publish(
        self, subject: str, body: bytes = b"", *, headers: Headers | None = None, reply: str = ""
    ) -> None:
        """Send without waiting for anybody's word: hints, acks, requests. Raises TooLarge, BadInput, Unavailable
        (the link is down: nothing is queued for later).
        """
        frames.check(headers or {}, body, self._client.max_payload)
        await self._send(subject, body, headers, reply)

    async def _send(self, subject: str, body: bytes, headers: Headers | None, reply: str) -> None:
        """Publish what `frames.check` has passed."""
        if not self._up.is_set():
            raise Unavailable("no connection")
        try:
            # an empty header block would cost 12 bytes that the check did not count
            await self._client.publish(subject, body, reply=reply, headers=cast("Any", headers or None))
        except Exception as error:  # noqa: BLE001
            raise translate(error, subject) from None

    async def flush(self) -> None:
        """Return when the server has read all that was published. Raises Unavailable."""
        try:
            await self._client.flush()
        except Exception as error:  # noqa: BLE001
            raise translate(error, "flush") from None

    async def request(
        self, subject: str, body: bytes = b"", *, headers: Headers | None = None, timeout_s: float = API_S
    ) -> Received:
        """One request and its answer. Raises Unavailable, AccessDenied, TooLarge, BadInput."""
        await self.wait_up(timeout_s)
        frames.check(headers or {}, body, self._client.max_payload)
        asked: asyncio.Future[Any] = asyncio.ensure_future(
            self._client.request(subject, body, timeout=timeout_s, headers=cast("Any", headers or None))
        )
        refused: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._asking.setdefault(subject, set()).add(refused)
        try:
            await asyncio.wait([asked, refused], return_when=asyncio.FIRST_COMPLETED)
            answer: Received = (refused if refused.done() else asked).result()
        except Exception as error:  # noqa: BLE001
            raise translate(error, subject) from None
        finally:
            self._asking[subject].discard(refused)
            if not self._asking[subject]:
                del self._asking[subject]
            refused.cancel()
            asked.cancel()
        return answer

    # -- JetStream

    async def api(
        self, subject: str, request: dict[str, Any] | None = None, *, timeout: float = API_S
    ) -> dict[str, Any]:
        """One call of the JetStream API; `subject` without ``$JS.API.``.

        Raises what the answer's err_code stands for (NotFound, ConfigMismatch, QueueFull …, else ServerError) and
        Unavailable when JetStream does not answer within `timeout` seconds.
        """
        body = json.dumps(request).encode() if request else b""
        try:
            answer = await self.request(f"$JS.API.{subject}", body, timeout_s=timeout)
        except Unavailable as error:
            if "no responders" in str(error):
                raise Unavailable(f"{subject}: JetStream does not answer: is it enabled on this server?") from None
            raise
        return frames.answer(answer.data, subject)

    async def store(self, subject: str, body: bytes, headers: Headers, *, timeout_s: float = 30.0) -> PubAck:
        """Publish to a stream and await its PubAck, trying again within `timeout_s` seconds while no server answers.

        The headers must carry Nats-Msg-Id, which makes a second try harmless. Raises TooLarge, BadInput, QueueFull,
        Conflict, NotFound (no stream takes the subject), AccessDenied, and Unavailable, whose `maybe_stored` says
        whether a try may have been stored all the same.
        """
        frames.check(headers, body, self._client.max_payload)
        end = time.monotonic() + timeout_s
        maybe_stored, tries = False, 0
        while True:
            left = end - time.monotonic()
            try:
                await self.wait_up(left)
                return await self._store_once(subject, body, headers, min(STORE_TRY_S, max(left, 0.05)))
            except Unavailable as error:
                maybe_stored = maybe_stored or error.maybe_stored
                left = end - time.monotonic()
                if left <= 0 or self._closing:
                    raise Unavailable(f"{subject}: {error}", maybe_stored=maybe_stored) from None
                await asyncio.sleep(min(reconnect_delay_s(tries), left))
                tries += 1

    async def _store_once(self, subject: str, body: bytes, headers: Headers, timeout_s: float) -> PubAck:
        self._ack_count += 1
        token = f"{self._ack_count:x}"
        waiting: asyncio.Future[Received] = asyncio.get_running_loop().create_future()
        self._acks[token] = (waiting, subject)
        too_late = Unavailable(f"no PubAck within {timeout_s:g} s", maybe_stored=True)
        late = asyncio.get_running_loop().call_later(timeout_s, _fail, waiting, too_late)
        try:
            await self._send(subject, body, headers, self._ack_inbox + token)
            answer = await waiting
        finally:
            late.cancel()
            self._acks.pop(token, None)
        if (said := frames.status(answer)) and said.code == 503:
            await self._refuse_unknown(subject)
            raise Unavailable("no stream takes it, or its leader is away")
        return frames.pub_ack(answer.data, subject)

    async def _refuse_unknown(self, subject: str) -> None:
        """Nobody took a publish: raise NotFound where no stream wants the subject, return where one does."""
        try:
            names = await self.api("STREAM.NAMES", {"subject": subject})
        except AccessDenied:
            return  # a user of one tenant may not ask; the stream may merely lack a leader now
        if not names.get("streams"):
            raise NotFound(f"no stream takes {subject}: has `aiqueue apply` been run on this server?")

    async def _on_ack(self, message: Received) -> None:
        entry = self._acks.get(message.subject[len(self._ack_inbox) :])
        if entry is not None and not entry[0].done():
            entry[0].set_result(message)

    async def last(self, stream: str, subject: str) -> Stored | None:
        """The newest message of `subject`, read from the stream's leader (a direct get could be behind)."""
        return await self._get(stream, {"last_by_subj": subject})

    async def get(self, stream: str, seq: int) -> Stored | None:
        """The message with this sequence, None where there is none."""
        return await self._get(stream, {"seq": seq})

    async def _get(self, stream: str, request: dict[str, Any]) -> Stored | None:
        try:
            answer = await self.api(f"STREAM.MSG.GET.{stream}", request)
        except NotFound as error:
            if "stream not found" in str(error):
                raise
            return None
        return frames.stored(answer["message"])

    async def read(self, stream: str, subject: str, *, seq: int = 1) -> AsyncIterator[Stored]:
        """The messages of a stream whose subject matches, in order from `seq`, without a consumer.

        Needs the stream's allow_direct. Raises Unavailable when an answer stays away for 5 seconds.
        """
        more = True
        while more:
            page, more = await self._page(stream, subject, seq)
            for item in page:
                yield item
                seq = item.seq + 1

    async def _page(self, stream: str, subject: str, seq: int) -> tuple[list[Stored], bool]:
        """One direct-get batch (ADR-31) and whether there is more behind it."""
        await self.wait_up(API_S)
        inbox = self.new_inbox()
        answers: asyncio.Queue[Received] = asyncio.Queue()
        subscription = await self.subscribe(inbox, answers.put)
        # max_bytes bounds what must be held at once; the server then ends the batch early
        request = {"seq": seq, "batch": DIRECT_BATCH, "next_by_subj": subject, "max_bytes": 4 * 1024 * 1024}
        page: list[Stored] = []
        try:
            await self.publish(f"$JS.API.DIRECT.GET.{stream}", json.dumps(request).encode(), reply=inbox)
            while True:
                async with asyncio.timeout(API_S):
                    answer = await answers.get()
                said = frames.status(answer)
                if said is None:
                    page.append(frames.stored_direct(answer))
                    continue
                if said.code == 503:
                    raise NotFound(f"there is no stream {stream}: has `aiqueue apply` been run on this server?")
                if said.code not in (204, 404):
                    raise from_api(said.code, 0, said.description, f"reading {stream}")
                return page, bool(page) and said.code == 204 and frames.pending(answer) > 0
        except TimeoutError:
            raise Unavailable(f"{stream}: no answer to a read within {API_S:g} s") from None
        finally:
            await subscription.close()

    # -- keeping it alive

    async def _build(self) -> None:
        link = await dial(
            self.settings, lost=self._on_lost, regained=self._on_regained, closed=self._on_closed, noted=self._on_error
        )
        former, self._link = self._link, link
        self._ack_inbox = link.new_inbox() + "."
        self._deaf = None
        try:
            await self._listen(link)
        except BaseException:
            self._link = former
            await link.forsake()
            raise
        self._up.set()

    async def _listen(self, link: Link) -> None:
        try:
            await link.subscribe(self._ack_inbox + "*", cb=cast("Any", self._on_ack))
            for subscription in list(self._subscriptions):
                await self._attach(link, subscription)
            await link.flush(timeout=round(API_S))  # a refusal of the inbox comes before the answer to this
        except Exception as error:  # noqa: BLE001
            raise translate(error, "subscribing") from None
        if link.is_closed:
            raise Unavailable("the server closed the connection")
        if self._deaf:
            raise AccessDenied(f"this user may not subscribe to {self._deaf}: set inbox_prefix to what he may")

    async def _attach(self, link: Link, subscription: Subscription) -> None:
        try:
            subscription.client_sub = await link.subscribe(
                subscription.subject, queue=subscription.queue, cb=cast("Any", subscription.receive)
            )
        except Exception as error:  # noqa: BLE001
            raise translate(error, subscription.subject) from None

    async def _on_lost(self) -> None:
        if not self._closing and self._up.is_set():
            self._up.clear()
            self._lost_at = time.monotonic()
            log.warning("lost the connection to %s, reconnecting", self.settings.addresses)
            self._fail_acks(Unavailable("the connection was lost before the PubAck", maybe_stored=True))
            if self._before_rebuild is not None:
                self._nudge()

    def _nudge(self) -> None:
        """An embedded server may be gone for good: have it brought back while nats-py keeps dialling."""

        async def run() -> None:
            try:
                assert self._before_rebuild is not None
                await self._before_rebuild()
            except AIQueueError as error:
                log.warning("the embedded server does not come back: %s", error)

        self._nudging = asyncio.create_task(run())

    async def _on_regained(self) -> None:
        if self._closing or self._up.is_set():
            return
        self._up.set()
        self._said.clear()
        log.warning("regained the connection to %s after %.1f s", self.server, time.monotonic() - self._lost_at)
        for callback in list(self._regained):
            callback()

    async def _on_closed(self) -> None:
        if self._closing or self._rebuilding is not None:
            return
        await self._on_lost()
        self._rebuilding = asyncio.create_task(self._rebuild())

    async def _rebuild(self) -> None:
        """nats-py gave the client up: make another one, for as long as it takes."""
        tries = 0
        try:
            while not self._closing:
                try:
                    await self._build()
                except AIQueueError as error:
                    (log.debug if isinstance(error, Unavailable) else self._say_once)(str(error))
                    await asyncio.sleep(reconnect_delay_s(tries))
                    tries += 1
                else:
                    self._up.clear()  # so that _on_regained announces it, in its one line
                    await self._on_regained()
                    return
        finally:
            self._rebuilding = None

    def _on_error(self, error: Exception) -> None:
        """Errors without a caller: a refused publish ends the call that waits for it; the rest is for debugging."""
        ours = translate(error, "NATS")
        if isinstance(ours, AccessDenied):
            if subject := denied_subject(error):
                self._refuse(subject)
            elif self._ack_inbox.lower() in str(error).lower():
                self._deaf = self._ack_inbox + "*"
            self._say_once(text(error))
        elif type(error).__module__.startswith("nats.") or isinstance(error, OSError | TimeoutError):
            level = logging.WARNING if "slow consumer" in str(error) else logging.DEBUG  # messages were dropped
            log.log(level, "%s", text(error))
        else:  # a callback of ours raised it
            log.error("%s", text(error), exc_info=error)

    def _refuse(self, denied: str) -> None:
        """End the calls that wait on a subject; nats-py tells it in lower case."""
        waiting = [(future, subject) for subject, asked in self._asking.items() for future in asked]
        for future, subject in [*waiting, *self._acks.values()]:
            if subject.lower() == denied:
                _fail(future, AccessDenied(f"this user may not publish to {subject}"))

    def _say_once(self, what: str) -> None:
        if what not in self._said and len(self._said) < SAID_MAX:
            self._said.add(what)
            log.error("%s", what)

    def _fail_acks(self, error: AIQueueError) -> None:
        for future, _ in self._acks.values():
            _fail(future, error)


def _fail(waiting: asyncio.Future[Any], error: AIQueueError) -> None:
    if not waiting.done():
        waiting.set_exception(error)
