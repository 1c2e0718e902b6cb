"""Embeddings by a model of the gateway: requests in its queue, one call for the same texts, cached for each tenant."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import AIQueueError, BadInput, JobFailed, ResultTimeout
from ..gateway import EmbeddingRequest, Gateway, GatewayConfig
from ..job import Retry
from .embedding_cache import EmbeddingCache

if TYPE_CHECKING:
    import numpy as np

    from ..client import Client
    from .types import Vectors

BATCH_TEXTS_MAX: Final = 256
BATCH_CHARS_MAX: Final = 256 * 1024
AT_ONCE: Final = 4  # requests of one call of `embed`
ANSWER_S: Final = 600.0  # of one request; its answer is found again by the next try


class GatewayEmbedder:
    """An Embedder whose vectors a model of the gateway makes, for the tenant's own account.

    `model`: of gateway.toml, of the kind embedding. `dimensions`: of the vectors. Longer ones of the model are cut and
    scaled, which is for models whose first dimensions matter most; shorter ones are refused. `cache`: a directory; the
    vectors of each tenant are in a file of its own, see `EmbeddingCache`. `config`: of gateway.toml; None: it is only
    where the gateway's workers are.

    `embed` takes texts of any number. Requests have at most 256 texts. The vector of an empty text is all zeros. It
    raises Retry if the gateway does not answer for now, and BadInput with the reason for what it refuses.
    """

    def __init__(
        self, client: Client, model: str, dimensions: int, *, cache: Path, config: GatewayConfig | None = None
    ) -> None:
        self._client = client
        self._gateway = None if config is None else Gateway(client, config, needs_keys=False)
        self._model = model
        self._dimensions = dimensions
        self._cache = EmbeddingCache(cache)

    @property
    def name(self) -> str:
        """Which vectors may be compared: those of this model with as many dimensions."""
        return f"gateway-{self._model}-{self._dimensions}"

    @property
    def dimensions(self) -> int:
        return self._dimensions

    async def embed(self, texts: Sequence[str], *, tenant: str) -> Vectors:
        """Return the vectors, of shape (texts, dimensions)."""
        import numpy as np  # noqa: PLC0415

        keys = [self._key(tenant, each) for each in texts]
        known = await self._cache.get(tenant, keys)
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known and text.strip()}
        if missing:
            limit, new = asyncio.Semaphore(AT_ONCE), dict[bytes, bytes]()

            async def ask(batch: dict[bytes, str]) -> None:
                async with limit:
                    made = await self._ask_once(batch, tenant)
                vectors = {key: each.astype("<f4").tobytes() for key, each in zip(batch, made, strict=True)}
                new.update(vectors)
                await self._cache.put(tenant, vectors)  # also if another batch fails: this one is paid
                await self._cache.end(tenant, batch)

            try:
                async with asyncio.TaskGroup() as group:
                    for batch in await self._batches_of(missing, tenant):
                        group.create_task(ask(batch))
            except BaseExceptionGroup as failed:
                raise failed.exceptions[0] from None
            known |= new
        nothing = bytes(4 * self._dimensions)
        rows = b"".join(known.get(key, nothing) for key in keys)
        return np.frombuffer(rows, "<f4").astype(np.float32).reshape(len(texts), self._dimensions)

    async def close(self) -> None:
        await self._cache.close()

    def _key(self, tenant: str, text: str) -> bytes:
        told = f"{tenant}\0{self.name}\0{text}".encode("utf-8", "surrogatepass")
        return hashlib.sha256(told).digest()

    async def _batches_of(self, missing: dict[bytes, str], tenant: str) -> list[dict[bytes, str]]:
        """Return the batches to ask for: first those of processes that were killed, the same as they were, since the
        same request is answered, and paid, once.
        """
        begun, left = [], dict(missing)
        for batch in await self._cache.pending(tenant, list(missing)):
            if not left.keys().isdisjoint(batch):
                begun.append(batch)
                left = {key: text for key, text in left.items() if key not in batch}
        return [*begun, *_batches(left)]

    async def _ask_once(self, batch: dict[bytes, str], tenant: str) -> list[np.ndarray[Any, Any]]:
        """As `_ask`. What is asked for is kept before, so that another process asks for the same."""
        await self._cache.begin(tenant, batch)
        try:
            return await self._ask(list(batch.values()), tenant)
        except BadInput:
            await self._cache.end(tenant, batch)
            raise

    async def _ask(self, texts: list[str], tenant: str) -> list[np.ndarray[Any, Any]]:
        """Return one vector for each text, of length 1. Raises Retry, BadInput."""
        request = EmbeddingRequest(model=self._model, input=texts, encoding_format="base64")
        options: dict[str, Any] = {"tenant": tenant}
        try:
            if self._gateway is not None:
                handle = await self._gateway.enqueue(request, share=True, **options)
            else:
                unique = f"shared-openai-{request.fingerprint()}"
                handle = await self._client.enqueue(request, unique=unique, on_duplicate="rerun_failed", **options)
            answer = await handle.result(ANSWER_S)
        except ResultTimeout:
            raise Retry(f"model {self._model}: the gateway has not answered within {ANSWER_S:g} s") from None
        except JobFailed as error:  # the gateway has tried again itself, as long as that made sense
            raise BadInput(f"model {self._model}: {error.error}") from None
        except AIQueueError as error:
            raise (Retry if error.retryable else BadInput)(f"model {self._model}: {error}") from None
        return self._read(answer, len(texts))

    def _read(self, answer: dict[str, Any], count: int) -> list[np.ndarray[Any, Any]]:
        import numpy as np  # noqa: PLC0415

        data = answer.get("data")
        if not isinstance(data, list) or len(data) != count:
            raise BadInput(f"model {self._model}: an answer without a vector for each text")
        vectors: list[Any] = [None] * count
        for place, each in enumerate(data):
            given = each.get("embedding") if isinstance(each, dict) else None
            index = each.get("index", place) if isinstance(each, dict) else None
            try:
                vector = _vector(given)
            except (TypeError, ValueError, binascii.Error):
                vector = np.zeros(0, np.float32)
            if not isinstance(index, int) or not 0 <= index < count or not len(vector):
                raise BadInput(f"model {self._model}: an answer without a vector for each text")
            if len(vector) < self._dimensions:
                raise BadInput(
                    f"model {self._model} makes vectors of {len(vector)} dimensions: set dimensions = {len(vector)} in "
                    "[embedder] of rag.toml"
                )
            cut = vector[: self._dimensions]
            length = float(np.linalg.norm(cut))
            if not np.isfinite(length):
                raise BadInput(f"model {self._model}: a vector with numbers that are not finite")
            vectors[index] = cut / length if length else cut
        if any(each is None for each in vectors):
            raise BadInput(f"model {self._model}: an answer without a vector for each text")
        return vectors


def _vector(given: Any) -> np.ndarray[Any, Any]:
    import numpy as np  # noqa: PLC0415

    if isinstance(given, str):
        return np.frombuffer(base64.b64decode(given, validate=True), "<f4").astype(np.float32)
    return np.asarray(given, dtype=np.float32).reshape(-1)


def _batches(texts: dict[bytes, str]) -> list[dict[bytes, str]]:
    """Return the texts in batches of at most BATCH_TEXTS_MAX texts and BATCH_CHARS_MAX characters, or of one text."""
    batches: list[dict[bytes, str]] = []
    size = BATCH_CHARS_MAX
    for key, text in texts.items():
        size += len(text)
        if size > BATCH_CHARS_MAX or len(batches[-1]) >= BATCH_TEXTS_MAX:
            batches.append({})
            size = len(text)
        batches[-1][key] = text
    return batches


def check_model(config: GatewayConfig, model: str) -> None:
    """Raise BadInput if gateway.toml has no such model of embeddings."""
    try:
        config.find_model(model, "embedding")
    except BadInput as error:
        raise BadInput(f"embedder.model of rag.toml: {error}") from None
