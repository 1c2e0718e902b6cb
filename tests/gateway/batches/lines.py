"""Inputs of batches, and what their files say."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import aiqueue
from aiqueue.gateway import Batches, RequestBatch

CHAT = "/v1/chat/completions"


def chat_line(number: int, *, words: str = "", url: str = CHAT, **body: Any) -> dict[str, Any]:
    """A line that asks the model "small" for the words "line N"."""
    messages = [{"role": "user", "content": words or f"line {number}"}]
    asked = {"model": "small", "messages": messages, "max_tokens": 5, **body}
    return {"custom_id": f"c{number}", "method": "POST", "url": url, "body": asked}


def jsonl(lines: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


async def create(client: aiqueue.Client, lines: Iterable[dict[str, Any]] | bytes, **options: Any) -> RequestBatch:
    """A batch of these lines, of the tenant acme."""
    batches = Batches(client)
    data = lines if isinstance(lines, bytes) else jsonl(lines)
    file = await batches.upload(data, tenant="acme", filename="in.jsonl")
    return await batches.create(file.id, tenant="acme", **{"endpoint": CHAT, **options})


async def records(client: aiqueue.Client, file_id: str | None) -> list[dict[str, Any]]:
    """What a file of a batch says; none without a file."""
    if file_id is None:
        return []
    batches = Batches(client)
    data = await batches.content(await batches.file(file_id, tenant="acme")).read()
    assert data.endswith(b"\n")
    return [json.loads(each) for each in data.splitlines()]


async def reported(client: aiqueue.Client, batch: RequestBatch) -> dict[str, dict[str, Any]]:
    """The records of both files by custom_id; each is there once."""
    found = [
        *await records(client, batch.output_file_id),
        *await records(client, batch.error_file_id),
    ]
    by_id = {each["custom_id"]: each for each in found}
    assert len(by_id) == len(found)
    return by_id
