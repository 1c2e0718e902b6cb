"""Outputs of the gateway and of retrieval."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

from ...gateway import BudgetStats, Sums
from ...rag import Passage


class UsageTotalJson(TypedDict):
    """What calls of a tenant, day and model have used together."""

    tenant: str
    day: str
    """Day in UTC, such as 2026-11-30."""
    model: str
    """Model as requests name it."""
    sums: Sums
    """Counts, tokens and cost of the calls."""


class UsageJson(TypedDict):
    """Usage of the gateway in a month."""

    month: str
    totals: list[UsageTotalJson]
    """One for each tenant, day and model."""
    budgets: list[BudgetStats]
    """Budgets of tenants that have one."""


class KeyJson(TypedDict):
    """An API key, as ApiKey without its hash."""

    id: str
    """Id of the key, which is no secret."""
    tenant: str
    name: str
    """Name that people gave the key."""
    created_at: float
    """When the key was added, in seconds since the epoch."""
    revoked_at: float | None
    """When the key was revoked, in seconds since the epoch; null: requests with it are admitted."""
    models: tuple[str, ...] | None
    """Models that the key may call; null: all."""
    priorities: tuple[str, ...] | None
    """Priorities that its requests may have; null: all."""
    requests_per_minute: int | None
    """Limit of requests in a minute; null: none."""
    tokens_per_minute: int | None
    """Limit of tokens in a minute; null: none."""
    budget_micros: int | None
    """Budget of its calls in a month, in micro-dollars; null: that of the tenant alone."""


class NewKeyJson(KeyJson):
    """An API key that was added."""

    token: str
    """What clients send as the key. It is not shown again."""


class ListedKeyJson(KeyJson):
    """An API key with its budget."""

    budget: BudgetStats | None
    """What is spent of its budget this month; null: it has none, or nothing was spent."""


class RequestCountsJson(TypedDict):
    """How many lines a batch has, as OpenAI counts them."""

    total: int
    """All lines of the file."""
    completed: int
    """Lines that are answered."""
    failed: int
    """Lines that have failed."""


class BatchJson(TypedDict):
    """A batch as OpenAI describes it. Times are seconds since the epoch, or null."""

    id: str
    """Id of the batch, with which --resume waits for it again."""
    object: str
    """Always batch, as OpenAI has it."""
    endpoint: str
    """Path of its requests."""
    errors: dict[str, Any] | None
    """Why the batch is refused, by line; null: it is not."""
    input_file_id: str
    """File with the requests."""
    completion_window: str
    """Always 24h, as OpenAI has it."""
    status: str
    """How far the batch is, such as in_progress, completed or failed."""
    output_file_id: str | None
    """File with the answers; null: there is none yet."""
    error_file_id: str | None
    """File with the errors; null: there are none."""
    created_at: float
    """When the batch was made."""
    expires_at: float | None
    """When what is not answered expires."""
    in_progress_at: float | None
    """When its first lines were enqueued."""
    finalizing_at: float | None
    """When all lines had ended, and the files were made."""
    completed_at: float | None
    """When the batch was completed."""
    failed_at: float | None
    """When the batch was refused."""
    expired_at: float | None
    """When the batch expired."""
    cancelling_at: float | None
    """When somebody cancelled the batch."""
    cancelled_at: float | None
    """When its last lines had ended after that."""
    request_counts: RequestCountsJson
    """How many lines there are, and how many have ended."""
    usage: dict[str, Any]
    """Tokens of its answers, as OpenAI names them."""
    metadata: dict[str, str] | None
    """What the caller has noted; null: nothing."""


class ListedBatchJson(BatchJson):
    """A batch, and whose it is."""

    tenant: str


class SavedBatchJson(BatchJson):
    """A batch, and the files that were saved."""

    saved: dict[str, str]
    """Paths of the files that were written, by output and errors."""


class IngestProblemsJson(TypedDict):
    """A document that is indexed with errors."""

    document_id: str
    problems: list[str]
    """What was wrong, a line each."""


class IngestFailureJson(TypedDict):
    """A document that is not indexed."""

    document_id: str
    reason: str
    """Why, in one line."""


class IngestJson(TypedDict):
    """What became of documents."""

    found: int
    """How many files were found."""
    stored: int
    """How many were enqueued."""
    completed: int
    """How many are indexed without errors."""
    chunks: int
    """How many chunks they have together."""
    completed_with_errors: list[IngestProblemsJson]
    """Documents that are indexed, with errors."""
    failed: list[IngestFailureJson]
    """Documents that are not indexed."""
    took_s: float
    """Seconds that it took."""


class WatchedJson(TypedDict):
    """A change of a document."""

    document_id: str
    state: str
    """What became of the document: completed, completed_with_errors, failed or deleted."""
    reason: str
    """Why it failed, or its errors, in one line; empty: none."""


class CitationJson(TypedDict):
    """A passage that an answer cites."""

    ref: int
    """Number by which the answer cites the passage, from 1."""
    document_id: str
    version: int
    """Version of the document."""
    title: str
    """Title of the document."""
    source: str
    """Where the document was read from; empty: it was sent by value."""
    heading: str
    """Section of the passage, with those above it."""
    page: int | None
    """Page of the passage; null: the format has none."""


class AnsweredJson(TypedDict):
    """Passages for a question, and with --answer an answer."""

    query_id: str
    """Id of the question, which is the id of its job."""
    query: str
    """The question as it was asked."""
    mode: str
    """How passages were found: hybrid, keyword or vector."""
    passages: list[Passage]
    """The passages, best first."""
    took_s: float
    """Seconds that the search took."""
    answer: NotRequired[str | None]
    """With --answer: the text; null: there is none, see `answer_problem`."""
    citations: NotRequired[list[CitationJson]]
    """With --answer: the passages that the answer cites."""
    model: NotRequired[str]
    """With --answer: the model that has answered."""
    cost: NotRequired[Any]
    """With --answer: what it cost in US dollars, as text; null: not known."""
    usage: NotRequired[dict[str, Any] | None]
    """With --answer: its tokens, as OpenAI names them."""
    possibly_billed: NotRequired[Any]
    """With --answer: calls before it that the provider may bill, though they gave no answer."""
    answer_problem: NotRequired[str]
    """With --answer: why there is no text, in one line."""


class DeletedDocumentJson(TypedDict):
    """A document that was deleted."""

    document_id: str
    job_id: str
    state: NotRequired[str]
    """Without --no-wait: what became of the document: deleted."""
    error: NotRequired[str]
    """Why it was not deleted in time, in one line."""


class ReindexJson(TypedDict):
    """What became of a reindexing; which keys there are depends on whether one document was named."""

    job_id: str
    documents: NotRequired[int]
    """Of a tenant: how many documents there are."""
    chunks: NotRequired[int]
    """How many chunks there are."""
    embedded: NotRequired[int]
    """Of a tenant: how many chunks got a vector."""
    embedder: NotRequired[str]
    """Of a tenant: by which embedder."""
    document_id: NotRequired[str]
    version: NotRequired[int]
    """Of a document: its version."""
    state: NotRequired[str]
    """Of a document: completed, completed_with_errors or failed."""
    outcome: NotRequired[str]
    """Of a document: whether its content was new, the same, or old."""
    superseded: NotRequired[bool]
    """Of a document: whether a newer version is known, so that nothing was done."""
    title: NotRequired[str]
    """Of a document: its title."""
    problems: NotRequired[list[str]]
    """Of a document: what was wrong, a line each."""
