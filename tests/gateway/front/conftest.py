"""A front over real HTTP, a gateway worker behind it, and OpenAI's own client before it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import openai
import pytest

import aiqueue

from ..running import running
from .fronts import RunningFront, Tokens, add_keys, open_front


@pytest.fixture
async def tokens(client: aiqueue.Client) -> Tokens:
    return await add_keys(client)


@pytest.fixture
async def front(client: aiqueue.Client, config: Path, tokens: Tokens) -> AsyncIterator[RunningFront]:
    """A front without a worker."""
    async with open_front(client, config) as front:
        yield front


@pytest.fixture
async def served(front: RunningFront, client: aiqueue.Client, config: Path) -> AsyncIterator[RunningFront]:
    """A front with a worker."""
    async with running(client, config):
        yield front


@pytest.fixture
async def ai(front: RunningFront, tokens: Tokens) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's client of the front."""
    async with openai.AsyncOpenAI(api_key=tokens.mine, base_url=front.url, timeout=20) as ai:
        yield ai


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A client of plain HTTP."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(20)) as http:
        yield http
