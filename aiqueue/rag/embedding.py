"""The default embedder: wordllama, offline, in a thread of the worker."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from ..errors import BadInput
from .types import Vectors

DIMENSIONS: Final = 256


class WordLlamaEmbedder:
    """wordllama's model of its own package: 0.35 ms of CPU a chunk, no network. `dimensions`: 64, 128 or 256.

    The model is loaded with the first texts, which takes 0.3 s. All tenants' texts may be embedded together. Raises
    BadInput if the package is missing.
    """

    by_tenant = False

    def __init__(self, dimensions: int = DIMENSIONS) -> None:
        if dimensions not in (64, 128, 256):
            raise BadInput(f"dimensions must be 64, 128 or 256, not {dimensions!r}")
        self._dimensions = dimensions
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="aiqueue-rag-embed")
        self._model: Any = None

    @property
    def name(self) -> str:
        return f"wordllama-{self._dimensions}"

    @property
    def dimensions(self) -> int:
        return self._dimensions

    async def embed(self, texts: Sequence[str], *, tenant: str) -> Vectors:
        """Return a vector of length 1 for each text, and one of zeros for a text without a word."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._embed, list(texts))

    async def close(self) -> None:
        """End the thread. Safe twice."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _embed(self, texts: list[str]) -> Vectors:
        import numpy as np  # noqa: PLC0415  (loaded where it is needed)

        if self._model is None:
            self._model = _load(self._dimensions)
        if not texts:
            return np.zeros((0, self._dimensions), np.float32)
        whole = [each.encode("utf-8", "replace").decode() for each in texts]  # its tokenizer takes no lone surrogate
        found = np.nan_to_num(np.asarray(self._model.embed(whole, norm=False), np.float32))
        lengths = np.linalg.norm(found, axis=1, keepdims=True)
        vectors: Vectors = np.divide(found, lengths, out=np.zeros_like(found), where=lengths > 0)
        return vectors


def _load(dimensions: int) -> Any:
    try:
        import wordllama  # noqa: PLC0415
    except ImportError as error:
        raise BadInput(f"wordllama is missing ({error.name}): pip install 'aiqueue[rag]'") from None
    home = Path(wordllama.__file__).parent
    trunc = None if dimensions == DIMENSIONS else dimensions
    return wordllama.WordLlama.load(cache_dir=home, trunc_dim=trunc, disable_download=True)
