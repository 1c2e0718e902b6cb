"""The client of the integration guide: `publish`, `subscribe` and `request` by keyword, on any subject."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Self, Unpack

from ..client import Client, check_client, connect
from ..config import SettingsOptions
from ..enqueue import OnFull
from ..errors import BadInput, Unavailable
from ..units import Backoff, Duration, parse_duration
from .message import Callback, Msg, Payload, to_bytes
from .publishing import Published, Publisher
from .routes import Route, check_reply, is_stored, route_of_subscription
from .serving import ServeOptions, serve_inbox, serve_jobs, serve_requests
from .subscriptions import BusSubscription, PlainSubscription, ServedSubscription, calling_subscription

log = logging.getLogger(__name__)

NOT_CONNECTED = "not connected: call `await nats_client.connect()` first, or use `async with NATSClient(...):`"


class NATSClient:
    """A NATS client whose subjects of jobs, mail and results are durable. All other subjects are plain NATS::

        async with NATSClient("nats://localhost:4222") as nats_client:
            await nats_client.publish(subject="ai.agent.tasks.acme", payload=b'{"text": "hello"}')

    - `nats_url` and `settings` are those of `aiqueue.connect`. Without a URL, the directory's embedded server is used.
    - `client`: an open `aiqueue.Client` to use instead. It stays open after `disconnect`.
    - `drain_timeout` (default "30s"): how long running callbacks may continue after `unsubscribe` or `disconnect`.

    Raises SettingsError, TopologyError, BadInput.
    """

    def __init__(
        self,
        nats_url: str | None = None,
        *,
        client: Client | None = None,
        drain_timeout: Duration = "30s",
        **settings: Unpack[SettingsOptions],
    ) -> None:
        if client is not None:
            check_client(client)
            if nats_url is not None or settings:
                raise BadInput("pass either client= or the address of a server, not both")
        if "url" in settings:
            raise BadInput("pass the server's address as nats_url=, or as the first argument, not as url=")
        if nats_url is not None and (not isinstance(nats_url, str) or not nats_url.strip()):
            given = repr(nats_url) if isinstance(nats_url, str) else type(nats_url).__name__
            raise BadInput(
                f'nats_url must be an address such as "nats://host:4222", several joined by commas, not {given}: leave '
                "it out to use NATS_URL, or an embedded server"
            )
        self._drain_timeout_s = parse_duration("drain_timeout", drain_timeout)
        self._owned = client is None
        self._client = connect(nats_url, **settings) if client is None else client
        self._publisher: Publisher | None = None
        self._subscriptions: set[BusSubscription] = set()  # until they have ended
        self._lock = asyncio.Lock()  # while it connects or disconnects
        self._disconnecting: asyncio.Task[None] | None = None
        self._failure: asyncio.Future[Exception] | None = None  # of a subscription that has ended by itself
        self._queues: dict[str, str] = {}  # the first queue name of each family of jobs

    @property
    def client(self) -> Client:
        """The client for typed messages, over the same connection: `enqueue`, `job`, `dead` …"""
        return self._client

    @property
    def connected(self) -> bool:
        """Whether the server is reachable at present. A lost connection is restored without end."""
        return self._publisher is not None and self._client.connection.connected

    async def connect(self) -> Self:
        """Connect; safe twice, and again after `disconnect`.

        Raises Unavailable after `connect_timeout` (default 5s), AccessDenied, EmbeddedError.
        """
        if self._disconnecting is not None and self._is_inside_callback():
            raise BadInput("the client is disconnecting, and waits for this callback: connect when it has returned")
        if self._disconnecting is not None:
            await asyncio.wait([self._disconnecting])
        async with self._lock:
            if self._publisher is None:
                if self._owned:
                    await self._client.open()
                self._publisher = Publisher(self._client)
                self._failure = asyncio.get_running_loop().create_future()
        return self

    async def disconnect(self) -> None:
        """End all subscriptions as `unsubscribe` does, all at once, and disconnect. Safe twice and unconnected.

        Returns when all callbacks have ended; inside a callback, at once. Meanwhile callbacks can publish, and
        `subscribe` is refused. If this is cancelled, the client disconnects all the same.
        """
        if self._disconnecting is None:
            self._disconnecting = asyncio.create_task(self._disconnect())
        if not self._is_inside_callback():
            await asyncio.shield(self._disconnecting)

    async def run(self, *, until: Awaitable[Any]) -> None:
        """Run until `until` is done, such as ``stop.wait()`` of an event, then disconnect as `disconnect` does.

        Ends also when the client is disconnected otherwise. Raises what `until` raises, and the error of a
        subscription that has ended by itself, such as AccessDenied if the server has taken a permission away: whoever
        supervises the process can then start it again.
        """
        if not inspect.isawaitable(until):
            raise BadInput(f"until must be awaitable, such as `stop.wait()` of an asyncio.Event, not {until!r}")
        waiting = asyncio.ensure_future(until)
        try:
            self._open_publisher()
            assert self._failure is not None
            failure = self._failure
            done, _ = await asyncio.wait([waiting, failure], return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
            await self.disconnect()
        if failure in done and not failure.cancelled():
            raise failure.result()
        if waiting in done:
            await waiting

    async def _disconnect(self) -> None:
        try:
            async with self._lock:
                try:
                    while self._subscriptions:
                        await asyncio.wait([each.end() for each in self._subscriptions])
                finally:
                    self._publisher = None
                    self._queues.clear()
                    if self._failure is not None:
                        self._failure.cancel()  # nothing runs any more
                    if self._owned:
                        await self._client.close()
        finally:
            self._disconnecting = None

    def _is_inside_callback(self) -> bool:
        return calling_subscription() in self._subscriptions

    async def __aenter__(self) -> Self:
        return await self.connect()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.disconnect()

    async def publish(
        self,
        subject: str,
        payload: Payload = b"",
        reply: str = "",
        headers: Mapping[str, str] | None = None,
        *,
        timeout: Duration = 30.0,
        on_full: OnFull = "raise",
    ) -> Published | None:
        """Publish a message.

        1. On ``ai.{family}.{tenant}``: stores a job, in the lane of its header `priority` (default normal), and returns
           once the server has acknowledged it. The job's id is the header ``Aiq-Job-Id``, the family's key
           (task_id, request_id, query_id) as a header or in the body, or new. A second publish of an id is not stored
           within the stream's duplicate window (10 minutes). A payload above the setting `claim_check` (256 KiB), at
           most 64 MiB, is stored as a document; subscribers of a queue get it as any other.
        2. On ``ai.agent.message.{tenant}``: stores a mail in the inbox of the header `target_agent_id`, whether that
           agent runs or not. Without that header, all agents of the tenant get it.
        3. On any other subject: plain NATS, without an acknowledgement. Returns None. A subject of your own must not
           begin with ``ai.``: one that is in no contract, such as a mistyped one, is refused.

        `payload`: bytes, or a text. `timeout` (seconds or "30s"): for the whole call. Within it, the publish is retried
        with exponential backoff over lost connections, and stores once. `on_full`: "raise" QueueFull, or "wait" with
        backoff until the timeout.

        Raises BadInput (InvalidToken, TooLarge), QueueFull with `limit` and `retry_after_s`, AccessDenied, NotFound
        (the stream is missing: run `aiqueue apply`), and Unavailable at the timeout. Its `maybe_stored` tells whether
        the message may have been stored; publishing again is safe if the message has an id.
        """
        publisher, timeout_s = self._open_publisher(), parse_duration("timeout", timeout)
        if on_full not in ("raise", "wait"):
            raise BadInput(f'on_full must be "raise" or "wait", not {on_full!r}')
        if reply:
            check_reply(reply)
        return await publisher.publish(subject, to_bytes(payload), reply, headers, timeout_s, on_full)

    async def request(
        self,
        subject: str,
        payload: Payload = b"",
        timeout: Duration | None = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> Msg:
        """Send a request, and return its answer.

        1. On ``ai.gateway.responses.{tenant}`` and ``ai.rag.results.{tenant}``: the answer is the result of the job
           that the request names by its id. With more than an id, the request becomes that job if there is none. The
           same id asked again gets the same result. Default timeouts: 60 s and 30 s, the family's `reply_within`.
        2. On any other subject: plain NATS. Default timeout: 30 s. Subjects of jobs and mail answer no requests, and
           are refused: publish there, and await the job's result (`client.job`) or the agent's reply.

        Raises ReplyTimeout, ResultTimeout (the job continues), both of which are TimeoutError; JobFailed, QueueFull,
        BadInput, AccessDenied; and Unavailable if no service answers.
        """
        publisher = self._open_publisher()
        timeout_s = None if timeout is None else parse_duration("timeout", timeout)
        answer = await publisher.request(subject, to_bytes(payload), headers, timeout_s)
        return Msg(answer.subject, answer.data, answer.headers)

    async def subscribe(
        self,
        subject: str,
        queue: str = "",
        callback: Callable[[Msg], Any] | None = None,
        *,
        cb: Callable[[Msg], Any] | None = None,
        concurrency: int | None = None,
        retry: Backoff | None = None,
        timeout: Duration | None = "10m",
    ) -> BusSubscription:
        """Call `callback` (or `cb`) with each message on a subject. Returns once messages are taken.

        1. On ``ai.{family}.{tenant}`` with a queue: takes jobs of all priorities, of one tenant or of all (``*``). A
           job is acknowledged when the callback returns, and its lease is extended meanwhile. If the callback raises,
           the job is retried by `retry` (default ``Backoff()``: 5 attempts), and becomes a dead letter at the end; it
           may raise ``Retry`` and ``Reject``. What it responds or returns is the job's result. All queue names of a
           family share its jobs. `concurrency` (default 100): how many callbacks run at once. `timeout` (default
           "10m", None: none): ends a callback that hangs.
        2. On ``ai.agent.message.{tenant}`` with the queue ``agent.{agent_id}``: takes the mail of this agent's inbox,
           one mail at a time and in order unless `concurrency` is above 1. `retry` and `timeout` as above.
        3. On ``ai.gateway.responses.{tenant}`` and ``ai.rag.results.{tenant}``: answers requests, together with
           `aiqueue respond`. Ids that have a job are answered from its journal. The callback gets the other requests,
           and what it responds or returns is stored once, as the result. `concurrency` (default 1,000) as above.
        4. Everything else is plain NATS: one message at a time, nothing is repeated. So a subscription without a queue
           observes jobs and mail. Subjects that begin with ``ai.`` and are in no contract are refused.

        An async callback runs on the event loop, a plain function in a thread. Raises BadInput, UnknownFamily,
        NotFound (a stream is missing), AccessDenied, Unavailable.
        """
        self._open_publisher()
        if self._disconnecting is not None:
            raise BadInput("the client is disconnecting: subscribe before `disconnect`, or after the next `connect`")
        if (callback is None) == (cb is None):
            raise BadInput("give the function that gets the messages, as callback= (or cb=)")
        if timeout is not None:
            parse_duration("timeout", timeout)
        called = Callback(callback if cb is None else cb)
        route = route_of_subscription(self._client.topology, subject, queue)
        options = ServeOptions(called, concurrency, retry, timeout, self._drain_timeout_s)
        subscription = self._make_subscription(route, subject, queue, options)
        self._subscriptions.add(subscription)
        await subscription.start()
        return subscription

    def _make_subscription(
        self, route: Route, subject: str, queue: str, options: ServeOptions
    ) -> PlainSubscription | ServedSubscription:
        """Return the subscription of a route, not started. Raises BadInput."""
        client = self._client

        def forget(ended: BusSubscription) -> None:
            self._subscriptions.discard(ended)
            options.callback.close()
            if ended.error is not None and self._failure is not None and not self._failure.done():
                self._failure.set_result(ended.error)

        if options.retry is not None and route.role not in ("work", "inbox"):
            raise BadInput(f"retry= is for jobs and mail; messages on {subject} are not repeated: leave it out")
        if route.role == "plain":
            if options.concurrency is not None:
                raise BadInput(f"concurrency= is for queues; {subject} is plain NATS, one message at a time")
            return PlainSubscription(
                subject, queue, forget, connection=client.connection, callback=options.callback,
                is_stored=lambda subject: is_stored(client.topology, subject), drain_timeout_s=self._drain_timeout_s,
            )  # fmt: skip
        if route.role == "work":
            self._note_queue(route, queue)
            return ServedSubscription(
                subject, queue, forget, serve=lambda made: serve_jobs(client, route, options, made.enter)
            )
        if route.role == "inbox":
            return ServedSubscription(
                subject, queue, forget, serve=lambda made: serve_inbox(client, route, queue, options, made.call)
            )
        return ServedSubscription(
            subject, queue, forget, serve=lambda made: serve_requests(client, route, options, made.call_safely)
        )

    def _note_queue(self, route: Route, queue: str) -> None:
        """Log once that a second queue name of a family shares its jobs with the first."""
        assert route.family is not None
        name = route.family.name
        first = self._queues.setdefault(name, queue)
        if first not in (queue, "*"):
            self._queues[name] = "*"  # said
            log.warning(
                "the queues %r and %r share the jobs of %s: each job is taken once, whatever the queue is called; to "
                "see all jobs, subscribe without a queue", first, queue, name,
            )  # fmt: skip

    def _open_publisher(self) -> Publisher:
        if self._publisher is None:
            raise BadInput(NOT_CONNECTED)
        if self._client.connection.closing:
            raise Unavailable("the connection was closed")
        return self._publisher
