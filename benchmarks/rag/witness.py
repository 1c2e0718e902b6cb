"""An embedder that writes down what it is given, as a process of its own is killed: a hash of each text, at once."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aiqueue import Reject
from aiqueue.rag import Embedder

from .facts import HASH_BYTES, hash_of

if TYPE_CHECKING:
    from aiqueue.rag.types import Vectors

POISON = "unreadable for now"
SICK = "sick"  # a file of this name in the directory: texts with POISON are refused


class Witness:
    """Embeds by `inner`. `directory`: gets a file a tenant and process. `delay_s`: up to so much before each call, so
    that versions overtake each other.
    """

    def __init__(self, inner: Embedder, directory: Path, delay_s: float = 0.0) -> None:
        self._inner, self._directory, self._delay_s = inner, directory, delay_s
        self._files: dict[str, int] = {}
        self._random = random.Random(os.getpid())

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def dimensions(self) -> int:
        return self._inner.dimensions

    async def embed(self, texts: Sequence[str], *, tenant: str) -> Vectors:
        os.write(self._file(tenant), b"".join(map(hash_of, texts)))
        if self._delay_s:
            await asyncio.sleep(self._random.uniform(0, self._delay_s))
        if any(POISON in each for each in texts) and (self._directory / SICK).exists():
            raise Reject("a text cannot be embedded for now")
        return await self._inner.embed(texts, tenant=tenant)

    async def close(self) -> None:
        await self._inner.close()

    def _file(self, tenant: str) -> int:
        if tenant not in self._files:
            path = self._directory / f"{tenant}.{os.getpid()}"
            self._files[tenant] = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        return self._files[tenant]


def embedded(directory: Path, tenant: str, pid: int | str = "*") -> Counter[bytes]:
    """Hashes of the texts that were given to embedders, each as often as it was."""
    found: Counter[bytes] = Counter()
    for file in directory.glob(f"{tenant}.{pid}"):
        content = file.read_bytes()
        whole = len(content) - len(content) % HASH_BYTES
        found.update(content[n : n + HASH_BYTES] for n in range(0, whole, HASH_BYTES))
    return found
