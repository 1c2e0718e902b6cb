"""Which names are public, and on which page of the API each stands."""

from __future__ import annotations

from functools import cache
from typing import Final

from . import api, links
from .api import Group, Name

WHOLE: Final = (
    "aiqueue", "aiqueue.bus", "aiqueue.errors", "aiqueue.fastapi", "aiqueue.gateway", "aiqueue.rag",
    "aiqueue.starlette", "aiqueue.testing",
)  # fmt: skip
"""Modules whose public names are all documented."""


def _of(module: str, names: str) -> list[str]:
    return [f"{module}.{each}" for each in names.split()]


GROUPS: Final = (
    Group(
        "client.md",
        "Client",
        "Connect, enqueue, wait for results, with asyncio or without.",
        {
            "Connect": _of("aiqueue", "connect Client Settings"),
            "Jobs that are enqueued": _of("aiqueue", "Handle JobState Document"),
            "Without asyncio": _of("aiqueue", "connect_sync SyncClient SyncHandle"),
            "What is declared and paused": _of("aiqueue", "Topology Pause"),
        },
    ),
    Group(
        "jobs.md",
        "Messages and workers",
        "What a job carries, who runs it, and what a handler may ask of its job.",
        {
            "Messages": _of("aiqueue", "Message RawMessage JobSpec"),
            "Workers": _of("aiqueue", "Worker Responder Backoff"),
            "In a handler": _of("aiqueue", "Job Child Retry Reject"),
        },
    ),
    Group(
        "agents.md",
        "Agents",
        "Agents have an inbox each, and handle its mail in order.",
        {"Agents": ["aiqueue.Agent", "aiqueue.agent.AgentGroup"], "Mail": _of("aiqueue.agent", "Mail Bounce")},
    ),
    Group(
        "schedules.md",
        "Schedules",
        "When jobs come again and again.",
        {"Recurrences": _of("aiqueue", "Cron Every Calendar Once"), "Ticks": ["aiqueue.Tick"]},
    ),
    Group(
        "errors.md",
        "Errors",
        "The classes, with their attributes. What each means, and what to do next: [errors](../errors.md).",
        {
            "In the package": _of("aiqueue", "AIQueueError QueueFull JobFailed JobCancelled"),
            "All others": [
                each.path
                for each in api.list_names("aiqueue.errors")
                if each.name not in ("AIQueueError", "QueueFull", "JobFailed", "JobCancelled")
            ],
        },
    ),
    Group(
        "bus.md",
        "The integration guide's client",
        "Publish, subscribe and request on any subject.",
        {
            "Client": ["aiqueue.NATSClient"],
            "What it passes and returns": _of("aiqueue.bus", "Msg Published BusSubscription"),
            "Envelopes": _of("aiqueue.bus", "create_envelope encode decode"),
        },
    ),
    Group(
        "testing.md",
        "Testing",
        "For the tests of programs that use aiqueue, on the real server.",
        {
            "Servers and clients": _of("aiqueue.testing", "client environment AccountServer ServerAccount"),
            "Handlers": _of("aiqueue.testing", "perform Performed PerformedChild document"),
            "Queues": _of("aiqueue.testing", "drain Drained advance Advanced assert_enqueued EnqueuedJob"),
            "Worker processes": _of("aiqueue.testing", "spawn SpawnedWorker"),
        },
    ),
    Group(
        "fastapi.md",
        "FastAPI",
        "The queue in a FastAPI application: `pip install 'aiqueue[fastapi]'`.",
        {
            "Application": _of("aiqueue.fastapi", "lifespan install_errors tenant_from set_tenant"),
            "Dependencies": _of("aiqueue.fastapi", "Queue TheJob job_of IdempotencyKey LastEventId TenantClient"),
            "Answers": _of("aiqueue.fastapi", "accepted describe JobView sse EventStream"),
        },
    ),
    Group(
        "starlette.md",
        "Starlette",
        "The queue in a Starlette application: `pip install 'aiqueue[starlette]'`.",
        {
            "Application": _of("aiqueue.starlette", "lifespan install_errors queue TenantClient"),
            "Requests": _of(
                "aiqueue.starlette",
                "set_tenant find_job the_job idempotency_key scoped_key last_event_id checked_event_id",
            ),
            "Answers": _of(
                "aiqueue.starlette",
                "accepted describe JobView sse EventStream server_events problem_of HttpProblem",
            ),
        },
    ),
    Group(
        "gateway.md",
        "LLM gateway",
        f"Calls of models as jobs. How to use them: [the LLM gateway]({links.upwards(links.GATEWAY)}).",
        {
            "Calls": _of("aiqueue.gateway", "Gateway GatewayRequest EmbeddingRequest Completion"),
            "Workers": _of("aiqueue.gateway", "GatewayWorker worker"),
            "Configuration": _of("aiqueue.gateway", "load GatewayConfig ProviderConfig ModelConfig Price Budget"),
            "API keys": _of("aiqueue.gateway", "ApiKeys ApiKey KeyCredit KeyLimited KeyRevoked"),
            "Batches": _of(
                "aiqueue.gateway",
                "Batches BatchFile RequestBatch GatewayBatch BatchQuotas BATCH_ENDPOINTS BatchQuota BatchEnded",
            ),
            "Usage and budgets": _of(
                "aiqueue.gateway",
                "UsageView UsageTotal Sums UsageStore UsageLedger UsageRecord NoUsageStream Budgets BudgetStats "
                "Reservation BudgetSpent PriceMap PriceUnknown parse_usd format_usd to_micros month_of",
            ),
            "Tokens": _of("aiqueue.gateway", "TokenBound bound_tokens prompt_tokens_at_most tokens_at_most"),
            "Answers": _of("aiqueue.gateway", "Bill answer_of text_of usage_of from_chunks"),
            "Providers": _of(
                "aiqueue.gateway",
                "Provider ProviderCall Reply Usage open_provider upstream_body ProviderError standin",
            ),
            "Over HTTP": _of("aiqueue.gateway", "front check_tenant"),
        },
    ),
    Group(
        "rag.md",
        "Retrieval",
        f"Documents of tenants, and questions. How to use them: [retrieval]({links.upwards(links.RAG)}).",
        {
            "Client": _of("aiqueue.rag", "Rag Passage DocumentState Mode parse_where"),
            "Messages": _of(
                "aiqueue.rag",
                "RagDocument RagDelete RagQuery RagReindex GivenChunk id_headers check_metadata check_tenant "
                "version_of version_at time_of CONTENT_BYTES_MAX DOCUMENT_ID_CHARS_MAX QUERY_CHARS_MAX",
            ),
            "Workers": _of("aiqueue.rag", "RagWorker worker open_bound_store open_embedder"),
            "Configuration": _of(
                "aiqueue.rag",
                "load RagConfig StoreConfig EmbedderConfig ParsingConfig LimitConfig AnswerConfig TenantConfig",
            ),
            "Parsers": _of("aiqueue.rag", "Parser DocumentSource ParsedDocument Section"),
            "Embedders and stores": _of(
                "aiqueue.rag",
                "Embedder VectorStore Chunk ChunkedDocument IndexedChunks IndexedDocument DocumentHeader StoreStats",
            ),
            "Evaluation": _of("aiqueue.rag", "evaluate read_questions LabelledQuestion Scores EVALUATED_MODES"),
            "Errors": _of(
                "aiqueue.rag",
                "ParseFailed FetchFailed FetchRefused StoreUnavailable StoreDamaged CANNOT_BE_READ",
            ),
        },
    ),
    Group(
        "logs.md",
        "Logs",
        "For your own set-up of logging: the job in each record.",
        {"Filter and formatters": _of("aiqueue.logs", "JobFilter TextFormatter JsonFormatter")},
    ),
)


@cache
def names() -> tuple[Name, ...]:
    """Return all public names that the pages of the API have."""
    return tuple(name for group in GROUPS for name in group.listed())


def unlisted() -> list[str]:
    """Name each public name of a module in `WHOLE` that no page has. The same object under another name counts."""
    listed = {each.path for each in names()} | {id(each.thing) for each in names()}
    found = [each for module in WHOLE for each in api.list_names(module)]
    return [each.path for each in found if each.path not in listed and id(each.thing) not in listed]
