"""The span of one call of a provider, with the attributes of OpenTelemetry's conventions for generative AI.

What was asked and answered is not in it: spans go to systems that need not know it.
"""

from __future__ import annotations

from ..tracing import NotTraced, OpenSpan, names, running_tracing, span
from .providers import Reply
from .runtime import CallPlan


def traced_call(plan: CallPlan, call_id: str, *, is_streamed: bool) -> OpenSpan | NotTraced:
    """Return the span of a call that is about to be made, to be entered."""
    if running_tracing() is None:
        return span(names.PROVIDER_CALL)
    model = plan.model
    attributes = {
        names.GEN_AI_OPERATION: names.CHAT if model.kind == "chat" else names.EMBEDDINGS,
        names.PROVIDER: model.provider.name,
        names.REQUEST_MODEL: model.upstream,
        names.REQUEST_STREAM: is_streamed,
        names.CALL_ID: call_id,
    }
    return span(names.PROVIDER_CALL, attributes, is_call=True)


def note_reply(span: OpenSpan | NotTraced, reply: Reply) -> None:
    """Note what a provider has said of its answer."""
    if isinstance(span, NotTraced):
        return
    answer, usage = reply.answer, reply.usage
    for name, value in ((names.RESPONSE_MODEL, answer.get("model")), (names.RESPONSE_ID, answer.get("id"))):
        span.set(name, value if isinstance(value, str) else None)
    choices = answer.get("choices")
    reasons = (
        [each.get("finish_reason") for each in choices if isinstance(each, dict)] if isinstance(choices, list) else []
    )
    if reasons and all(isinstance(each, str) for each in reasons):
        span.set(names.FINISH_REASONS, reasons)
    span.set(names.FIRST_CHUNK_S, reply.first_token_s)
    if usage is not None:
        span.set(names.INPUT_TOKENS, usage.prompt_tokens)
        span.set(names.OUTPUT_TOKENS, usage.completion_tokens)
        span.set(names.CACHE_READ_TOKENS, usage.cached_tokens or None)
        span.set(names.CACHE_WRITE_TOKENS, usage.cache_write_tokens or None)
