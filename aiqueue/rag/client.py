"""What callers use of retrieval: documents in, questions and answers, and what has become of a document."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final, TypeVar

from .. import subjects
from ..errors import DecodeError, NotFound, ReplyTimeout, Unavailable
from ..payload import Document, parse_message
from ..units import Duration, parse_duration
from .messages import GivenChunk, RagDelete, RagDocument, RagQuery, RagReindex
from .sources import id_headers, why_not_read
from .types import DocumentState, Mode, Where

if TYPE_CHECKING:
    from ..client import Client, Handle

M = TypeVar("M", RagDocument, RagDelete, RagReindex, RagQuery)

STATUS: Final = "ai.rag.status"
NO_WORKER: Final = "no retrieval worker answers: start `aiqueue work aiqueue.rag:worker`"
_STATE_FIELDS: Final = frozenset(each.name for each in fields(DocumentState))


class Rag:
    """Retrieval as its callers see it, on an open client::

        rag = Rag(client)
        await (await rag.ingest("guide.md", tenant="acme", content="Type pip install aiqueue.")).result(timeout=60)
        found = await (await rag.ask("How is it installed?", tenant="acme")).result(timeout=30)

    Every call that stores a job takes the options of `Client.enqueue`, such as `priority`, `deadline` and `headers`,
    and raises what that raises. With `delay` the job counts as stored when it is due: it then replaces, or deletes,
    what was stored until then.
    """

    def __init__(self, client: Client) -> None:
        self._client = client

    async def ingest(  # noqa: PLR0913  (the fields of a document)
        self,
        document_id: str,
        *,
        tenant: str,
        content: str | bytes | None = None,
        document: Document | None = None,
        path: str | None = None,
        url: str | None = None,
        chunks: Sequence[GivenChunk | Mapping[str, Any]] | None = None,
        metadata: Mapping[str, Any] | None = None,
        title: str = "",
        name: str = "",
        content_type: str = "",
        **options: Any,
    ) -> Handle[dict[str, Any]]:
        """Store a version of a document, which replaces the former one once it is indexed, and return its job.

        - `document_id`: any text of 1 to 1,024 characters, at most 2,000 bytes. The version that the queue has
          stored last wins.
        - Exactly one of: `content`, a text or bytes, up to 64 MiB; `document`, what `client.documents.put` has
          returned; `path` or `url`, which the worker reads if rag.toml allows that for the tenant; `chunks`, cut by
          you, at most 50,000. A content above the setting `claim_check` (256 KiB) is stored beside the queue.
        - `metadata`: texts, numbers, booleans, None and lists of these by keys, up to 64 KiB as JSON.
        - `title`: in place of the document's own. `name`, `content_type`: hints at the format of bytes without marks.

        The result is ``{document_id, version, state, chunks, problems}``; `state` is "completed" or
        "completed_with_errors". A document that cannot be read at all raises JobFailed with the reason there.
        Raises BadInput, in one line, for what is no document.
        """
        message = _make(
            RagDocument, document_id=document_id, content=content, document=document, path=path, url=url,
            chunks=None if chunks is None else list(chunks), metadata=metadata, title=title, name=name,
            content_type=content_type,
        )  # fmt: skip
        options["headers"] = {**id_headers(document_id), **(options.get("headers") or {})}
        return await self._client.enqueue(message, tenant=tenant, **options)

    async def delete(self, document_id: str, *, tenant: str, **options: Any) -> Handle[dict[str, Any]]:
        """Delete a document: all versions that were stored before this call. Later ones stay."""
        return await self._client.enqueue(_make(RagDelete, document_id=document_id), tenant=tenant, **options)

    async def reindex(self, *, tenant: str, document_id: str | None = None, **options: Any) -> Handle[dict[str, Any]]:
        """Embed all chunks of the tenant anew, such as after a change of the embedder. With `document_id`: read this
        document again from its path or URL.

        Raises NotFound, and stores no job, for a document that is not known, or was ingested by value. If no worker
        answers now, the job says so: its result has the state "failed", and why in `problems`.
        """
        if document_id is not None:
            await self._check_source(document_id, tenant)
        message = _make(RagReindex, document_id=document_id, all=document_id is None)
        return await self._client.enqueue(message, tenant=tenant, **options)

    async def _check_source(self, document_id: str, tenant: str) -> None:
        """Raise unless the document can be read again, or no worker says."""
        try:
            known = await self.status(document_id, tenant=tenant)
        except (Unavailable, ReplyTimeout):
            return
        if not known.source:
            raise NotFound(f"document {document_id[:200]!r} of tenant {tenant}: {why_not_read(known)}")

    async def ask(
        self,
        question: str,
        *,
        tenant: str,
        k: int = 5,
        where: Where | None = None,
        mode: Mode = "hybrid",
        answer: bool = False,
        model: str | None = None,
        **options: Any,
    ) -> Handle[dict[str, Any]]:
        """Ask a tenant's documents, and return the question's job.

        - `question`: 1 to 8,192 characters. `k`: how many passages, 1 to 100.
        - `where`: a filter by metadata, ``{"lang": "en", "year": {"gte": 2020}}``, at most 16 KiB as JSON.
        - `mode`: "hybrid", "keyword" or "vector".
        - `answer`: also answer in words, by `model` of the gateway, or that of rag.toml. `Handle.stream` has the
          sources as its first chunk, ``{"sources": [...]}``, and then the answer's text, piece by piece; a chunk
          ``{"restart": True}``, like an item `restart`, says that the text so far is void.

        The result is ``{query_id, query, mode, passages, took_s}``, for an answer with ``answer, citations, model,
        cost, usage`` as well. Where there is no answer, `answer` is None and `answer_problem` says why.
        Raises BadInput for a wrong argument. A wrong filter raises JobFailed with the result.
        """
        message = _make(RagQuery, query=question, k=k, where=where, mode=mode, answer=answer, model=model)
        return await self._client.enqueue(message, tenant=tenant, **options)

    async def status(self, document_id: str, *, tenant: str, timeout: Duration = "5s") -> DocumentState:
        """Return what is known of the newest version of a document: its state, stage, and chunks done of total.

        A worker answers. Raises NotFound if nothing is known of the document, Unavailable if no worker answers, and
        UnknownFamily if the family rag.ingest is not declared.
        """
        self._client.topology.family(RagDocument.aiq_family)
        from ..requests import replies  # noqa: PLC0415  (imports the client of NATS)

        subject = f"{STATUS}.{subjects.token('tenant', tenant)}"
        timeout_s = parse_duration("timeout", timeout)
        body = json.dumps({"document_id": document_id}).encode()
        try:
            answer = await self._client.connection.request(subject, body, timeout_s=timeout_s)
        except Unavailable as error:
            raise Unavailable(NO_WORKER if "no responders" in str(error) else str(error)) from None
        replies.raise_error(answer.headers, answer.data, "")
        return _state_of(replies.read_answer(answer.headers, answer.data), document_id)


def _state_of(answer: Any, document_id: str) -> DocumentState:
    if answer is None:
        raise NotFound(f"nothing is known of document {document_id[:200]!r}")
    if not isinstance(answer, dict):
        raise DecodeError(f"the status is {type(answer).__name__}, not a map")
    return DocumentState(**{name: value for name, value in answer.items() if name in _STATE_FIELDS})


def _make(kind: type[M], /, **given: Any) -> M:
    """Return the message of the fields that are given. Raises BadInput, in one line."""
    return parse_message(kind, {name: value for name, value in given.items() if value is not None})
