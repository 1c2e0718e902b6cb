"""Answers in words: the grounded prompt goes through the gateway as a child of the question's job, and is streamed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import aclosing, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from ..errors import AIQueueError, BadInput, NotFound, Stale, TooLarge, Unavailable
from ..gateway import Gateway, GatewayConfig, GatewayRequest, text_of
from ..job import Child, Job
from ..lanes import WorkerRecords, serves
from .config import AnswerConfig
from .messages import RagQuery
from .prompt import cited_numbers, make_messages
from .types import Passage

if TYPE_CHECKING:
    from ..client import Client, Handle

log = logging.getLogger(__name__)

CHILD: Final = "answer"  # the child's name: a question that runs again finds the answer that it has paid for
LOOK_EVERY_S: Final = 3.0  # whether any gateway worker runs; at the second look without one, the answer is given up
LOOKS: Final = 2
MARGIN_S: Final = 0.5  # before the deadline, for the result to arrive
CANCEL_S: Final = 5.0
SOURCE_CHARS_MAX: Final = 2_000  # of a passage's text in the first chunk, which must fit into a message
NO_GATEWAY: Final = "no gateway worker is running: start `aiqueue work aiqueue.gateway:worker`"
NO_MODEL: Final = (
    "no model is set: name one in [answers] of rag.toml, or with the question; see docs/guides/rag-setup.md"
)


class _NoAnswer(Exception):
    """There is no answer in words, and why, in one line."""


class Answerer:
    """Asks the gateway for answers. `gateway`: what gateway.toml says, to refuse early what it would refuse; None: the
    file is only where the gateway's workers are.
    """

    def __init__(self, client: Client, config: AnswerConfig, gateway: GatewayConfig | None = None) -> None:
        self._client = client
        self._config = config
        self._models = gateway
        self._gateway = None if gateway is None else Gateway(client, gateway, needs_keys=False)

    async def answer(self, job: Job[RagQuery], passages: Sequence[Passage]) -> dict[str, Any]:
        """Return ``{answer, citations, model, cost, usage, possibly_billed}``, or ``{answer: None, answer_problem}``.

        The sources are written as the first chunk of the job's output, ``{"sources": [...]}``, each with `ref`, the
        number that the answer cites. Texts follow as they come; a chunk ``{"restart": True}`` says that the text so far
        is void.

        It never raises for what the gateway does: a refusal, a spent budget, no worker, no answer in time. It raises
        what `Job.chunk` and `Job.enqueue` raise of the job itself: Stale, Unavailable.
        """
        quoted = passages[: self._config.passages]
        await _write_sources(job, quoted)
        try:
            request = self._make_request(job, quoted)
            data = await self._ask(job, request)
        except _NoAnswer as error:
            return {"answer": None, "citations": [], "answer_problem": str(error)}
        text = text_of(data)
        about: dict[str, Any] = data.get("aiqueue") or {}
        found: dict[str, Any] = {
            "answer": text or None,
            "citations": [_citation(each, quoted[each - 1]) for each in cited_numbers(text, len(quoted))],
            "model": about.get("model") or request.model,
            "cost": about.get("cost"),
            "usage": data.get("usage"),
            "possibly_billed": about.get("possibly_billed", 0),
        }
        return found if text else {**found, "answer_problem": "the model has answered without a text"}

    def _make_request(self, job: Job[RagQuery], passages: Sequence[Passage]) -> GatewayRequest:
        model = job.message.model or self._config.model
        if model is None:
            raise _NoAnswer(NO_MODEL)
        if not passages:
            raise _NoAnswer("no passage was found, so no model was asked")
        messages, tokens_max = make_messages(job.message.query, passages), self._config.tokens_max
        try:
            if self._models is not None:
                tokens_max = min(tokens_max, self._models.find_model(model, "chat").max_output_tokens or tokens_max)
            request = GatewayRequest(model=model, messages=messages, max_tokens=tokens_max, stream=True)
            if self._gateway is not None:
                self._gateway.check(request, tenant=job.tenant)
        except BadInput as error:
            raise _NoAnswer(str(error)) from None
        return request

    async def _ask(self, job: Job[RagQuery], request: GatewayRequest) -> dict[str, Any]:
        """Return the gateway's answer, whose text is streamed as it comes. Raises _NoAnswer, Stale."""
        left_s = self._config.time_s
        if job.deadline is not None:
            left_s = job.deadline - self._client.connection.clock.now() - MARGIN_S
        end = time.monotonic() + left_s
        if left_s <= 0:
            raise _NoAnswer("the deadline left no time to ask a model")
        try:
            async with asyncio.timeout(left_s):
                child = await job.enqueue(request, CHILD, deadline=left_s)
        except TimeoutError:
            raise _NoAnswer(f"the gateway took no request within {left_s:.3g} s") from None
        except Stale:
            raise
        except AIQueueError as error:
            raise _NoAnswer(f"the gateway takes no request: {error}") from None
        following = asyncio.create_task(self._follow(job, child))
        watching = asyncio.create_task(self._watch(job.tenant))
        try:
            await asyncio.wait(
                (following, watching), timeout=max(0.0, end - time.monotonic()), return_when="FIRST_COMPLETED"
            )
            if following.done():
                try:
                    return following.result()
                except (Stale, Unavailable):  # of the question's own job, which runs again
                    raise
                except AIQueueError as error:
                    why = f"the gateway's answer cannot be read: {error}"
            elif watching.done():
                why = watching.result()
            else:
                why = f"no answer within {left_s:.3g} s"
        finally:
            for task in (following, watching):
                task.cancel()
            await asyncio.wait((following, watching))
        await self._cancel(child)
        raise _NoAnswer(why)

    async def _follow(self, job: Job[RagQuery], child: Child[Any]) -> dict[str, Any]:
        handle, written = await self._find(child), ""
        async with aclosing(handle.stream()) as items:
            async for item in items:
                if item.event == "chunk":
                    text = _text_of_chunk(item.data)
                    if text:
                        written += text
                        await job.chunk(text)
                elif item.event == "restart" and written:
                    written = ""
                    await job.chunk({"restart": True})
                elif item.event == "result" and isinstance(item.data, dict):
                    await _complete(job, written, text_of(item.data))
                    return item.data
                elif item.final:
                    error = item.data.get("error") if isinstance(item.data, dict) else None
                    raise _NoAnswer(str(error or f"the request to the gateway was {item.event}"))
        raise _NoAnswer("the gateway keeps no result")

    async def _find(self, child: Child[Any]) -> Handle[Any]:
        for _ in range(20):  # a replica that is asked may lag behind
            with suppress(NotFound):
                return await self._client.job(child.id, family=child.family, tenant=child.tenant)
            await asyncio.sleep(0.1)
        raise _NoAnswer(f"the request {child.id} to the gateway is gone")

    async def _watch(self, tenant: str) -> str:
        """Return why no answer can come: no worker of the gateway runs for the tenant, at two looks."""
        records, missing = WorkerRecords(self._client.connection, self._client.topology), 0
        family, kind = GatewayRequest.aiq_family, GatewayRequest.aiq_kind
        while missing < LOOKS:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                found = await records.read()
            except AIQueueError as error:
                log.warning("whether a worker of the gateway runs is not known: %s", error)
                continue
            missing = 0 if any(serves(each, family, kind, tenant) for each in found) else missing + 1
        return NO_GATEWAY

    async def _cancel(self, child: Child[Any]) -> None:
        """Nobody reads the answer any more: it is not to be paid."""
        try:
            async with asyncio.timeout(CANCEL_S):
                await self._client.cancel(child.id, family=child.family, tenant=child.tenant)
        except (AIQueueError, TimeoutError) as error:
            log.warning("request %s to the gateway is not cancelled: %s", child.id, error)


async def _write_sources(job: Job[RagQuery], passages: Sequence[Passage]) -> None:
    sources = []
    for number, passage in enumerate(passages, 1):
        source = {name: value for name, value in asdict(passage).items() if name != "metadata"}
        sources.append({"ref": number, **source, "text": passage.text[:SOURCE_CHARS_MAX]})
    try:
        await job.chunk({"sources": sources})
    except TooLarge:  # the result has them whole
        await job.chunk({"sources": [{name: each[name] for name in ("ref", "document_id")} for each in sources]})


async def _complete(job: Job[RagQuery], written: str, text: str) -> None:
    """Write what the streamed parts of an answer lack, such as those that have expired, or a fallback's."""
    if not text.startswith(written):
        written = ""
        await job.chunk({"restart": True})
    if len(text) > len(written):
        await job.chunk(text[len(written) :])


def _text_of_chunk(chunk: Any) -> str:
    choices = chunk.get("choices") if isinstance(chunk, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    delta = first.get("delta") if isinstance(first, dict) else None
    text = delta.get("content") if isinstance(delta, dict) else None
    return text if isinstance(text, str) else ""


def _citation(number: int, passage: Passage) -> dict[str, Any]:
    return {
        "ref": number, "document_id": passage.document_id, "version": passage.version, "title": passage.title,
        "source": passage.source, "heading": passage.heading, "page": passage.page,
    }  # fmt: skip
