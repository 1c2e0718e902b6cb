"""Our messages for the families of the guide."""

from __future__ import annotations

import aiqueue


class Task(aiqueue.Message, kind="agent.task"):
    text: str


class Ask(aiqueue.Message, kind="gateway.request", family="gateway.requests"):
    text: str


class Ingest(aiqueue.Message, kind="rag.document", family="rag.ingest"):
    text: str


class Query(aiqueue.Message, kind="rag.query", family="rag.queries"):
    text: str


class Note(aiqueue.Message, kind="agent.message", family="agent.message"):
    text: str
