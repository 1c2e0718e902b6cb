"""Names of spans and of their attributes. No other module spells one.

- messaging: OpenTelemetry's semantic conventions for messaging, 1.44.0 (status: development).
- gen_ai: those for generative AI as of 1.44.0 (status: development). They have a repository of their own now,
  `semantic-conventions-genai`, and Python's constants for them are deprecated.
- the spans of the integration guide's family: its OTEL integration guide, January 2026.
- what begins with `aiqueue.` is aiqueue's own.
"""

from __future__ import annotations

import re
from typing import Final

SCOPE: Final = "aiqueue"  # of the tracer
SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.44.0"

# -- messaging: a span's name is the operation and the destination

SEND: Final = "send"  # a producer's: a job, a mail, or many jobs at once
CREATE: Final = "create"  # one of many jobs that are sent at once
PROCESS: Final = "process"  # a consumer's: one attempt
REQUEST: Final = "request"  # a client's: a message, and the wait for its result or reply. No name of the conventions

SYSTEM: Final = "messaging.system"
NATS: Final = "nats"
OPERATION: Final = "messaging.operation.name"
OPERATION_TYPE: Final = "messaging.operation.type"
DESTINATION: Final = "messaging.destination.name"
MESSAGE_ID: Final = "messaging.message.id"
CONVERSATION_ID: Final = "messaging.message.conversation_id"
BATCH_COUNT: Final = "messaging.batch.message_count"
ERROR_TYPE: Final = "error.type"
OTHER_ERROR: Final = "_OTHER"  # a failure without a name

# -- gen_ai

PROVIDER: Final = "gen_ai.provider.name"
GEN_AI_OPERATION: Final = "gen_ai.operation.name"
CHAT: Final = "chat"
EMBEDDINGS: Final = "embeddings"
REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_STREAM: Final = "gen_ai.request.stream"
RESPONSE_MODEL: Final = "gen_ai.response.model"
RESPONSE_ID: Final = "gen_ai.response.id"
FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
FIRST_CHUNK_S: Final = "gen_ai.response.time_to_first_chunk"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
CACHE_READ_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
CACHE_WRITE_TOKENS: Final = "gen_ai.usage.cache_creation.input_tokens"
AGENT_NAME: Final = "gen_ai.agent.name"

# -- the guide's family: a handler's span by the family of its jobs, and what is within

HANDLERS: Final = {
    "agent.tasks": "agent.task.execute",
    "gateway.requests": "gateway.generate",
    "rag.queries": "rag.query",
}
PROVIDER_CALL: Final = "gateway.provider.call"
EMBED: Final = "rag.embedding.generate"
VECTOR_SEARCH: Final = "rag.vector.search"
RESPONSE: Final = "rag.response.generate"

# -- aiqueue's own

TENANT: Final = "aiqueue.tenant"
KIND: Final = "aiqueue.kind"
PRIORITY: Final = "aiqueue.priority"
ATTEMPT: Final = "aiqueue.attempt"
QUEUED_S: Final = "aiqueue.queued_s"  # from when the message was stored to when its attempt has begun
OUTCOME: Final = "aiqueue.outcome"  # done, retry, failed, waiting, cancelled; or why the attempt came to no such end
REASON: Final = "aiqueue.reason"  # of a dead letter
RETRY_DELAY_S: Final = "aiqueue.retry_delay_s"
DUE_AT: Final = "aiqueue.due_at"  # of a delayed job, seconds since the epoch
DUPLICATE: Final = "aiqueue.duplicate"
STEP: Final = "aiqueue.step"
CHILD: Final = "aiqueue.child"  # the name of a child in its parent
CALL_ID: Final = "aiqueue.gateway.call_id"  # of the ledger's record

_NUMBER = re.compile(r"-[0-9]+\Z")


def destination(family: str) -> str:
    """Return the destination of a family's messages, such as ai.agent.tasks. The tenant is an attribute: a destination
    for each would be a name of spans for each.
    """
    return f"ai.{family}"


def step_span(step: str) -> str:
    """Return the name of a step's span: without the number that those of `Job.steps` end with."""
    return f"step {_NUMBER.sub('', step)}"
