"""Texts of many callers are embedded together, and each caller gets its own vectors, or its own error."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aiqueue import Reject, Retry
from aiqueue.errors import BadInput, Unavailable
from aiqueue.rag import embedding
from aiqueue.rag.embed_batcher import CHARS_MAX, TEXTS_MAX, EmbedBatcher
from aiqueue.rag.embedding import WordLlamaEmbedder


class Recording:
    """Embeds a text as its number, and waits for `go`."""

    by_tenant = False
    name, dimensions = "recording", 1
    texts_max = TEXTS_MAX

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.error: Exception | None = None
        self.go = asyncio.Event()
        self.closed = False

    async def embed(self, texts: Sequence[str], *, tenant: str) -> Any:
        self.calls.append(list(texts))
        await self.go.wait()
        if self.error is not None and "bad" in texts:
            raise self.error
        return np.array([[float(each)] for each in texts], np.float32)

    async def close(self) -> None:
        self.closed = True


async def started(batcher: EmbedBatcher, *calls: tuple[list[str], bool]) -> list[asyncio.Task[Any]]:
    tasks = [asyncio.create_task(batcher.embed(texts, tenant="acme", urgent=urgent)) for texts, urgent in calls]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


async def test_what_arrives_during_a_call_is_the_next_one_and_questions_go_first() -> None:
    embedder = Recording()
    batcher = EmbedBatcher(embedder)
    documents = [[str(at * 100 + each) for each in range(100)] for at in range(4)]
    first = await started(batcher, (["7"], False))
    others = await started(batcher, *((each, False) for each in documents), (["9999"], True))
    embedder.go.set()
    found = await asyncio.gather(*first, *others)
    assert embedder.calls[0] == ["7"]
    assert embedder.calls[1][0] == "9999"
    assert max(map(len, embedder.calls)) <= TEXTS_MAX
    assert len(embedder.calls) <= 4
    assert [each[:, 0].astype(int).astype(str).tolist() for each in found] == [["7"], *documents, ["9999"]]
    await batcher.close()
    assert embedder.closed


async def test_a_call_is_bounded_by_its_characters_too_so_that_a_question_does_not_wait_for_long_texts() -> None:
    embedder = Recording()
    batcher = EmbedBatcher(embedder)
    long = [[f"{at * 100 + each:0>16000}" for each in range(64)] for at in range(4)]
    whole = f"{7:0>400000}"
    first = await started(batcher, (["1"], False))
    others = await started(batcher, *((each, False) for each in long), ([whole], False), (["9999"], True))
    embedder.go.set()
    found = await asyncio.gather(*first, *others)
    assert embedder.calls[1][0] == "9999"
    assert max(sum(map(len, each)) for each in embedder.calls if whole not in each) <= CHARS_MAX
    assert [each for each in embedder.calls if whole in each] == [[whole]]
    numbers = [[float(text) for text in each] for each in (["1"], *long, [whole], ["9999"])]
    assert [each[:, 0].tolist() for each in found] == numbers
    await batcher.close()


async def test_an_embedder_may_have_smaller_calls_so_that_a_question_waits_less() -> None:
    embedder = Recording()
    embedder.texts_max = WordLlamaEmbedder.texts_max
    batcher = EmbedBatcher(embedder)
    first = await started(batcher, (["1"], False))
    others = await started(batcher, *(([str(at)] * 3, False) for at in range(100)), ([f"{2:0>70000}"] * 2, False))
    embedder.go.set()
    await asyncio.gather(*first, *others)
    assert max(map(len, embedder.calls)) in range(32, embedder.texts_max + 1)
    assert max(sum(map(len, each)) for each in embedder.calls) <= CHARS_MAX * embedder.texts_max // TEXTS_MAX
    await batcher.close()


@pytest.mark.parametrize("error", [BadInput("bad text"), Reject("bad text"), ValueError("bad text")])
async def test_a_bad_text_fails_its_own_caller_only(error: Exception) -> None:
    embedder = Recording()
    embedder.error = error
    batcher = EmbedBatcher(embedder)
    tasks = await started(batcher, (["1"], False), (["2"], False), (["bad"], False), (["3"], False))
    embedder.go.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(each) for each in found] == [np.ndarray, np.ndarray, type(error), np.ndarray]
    assert (await batcher.embed([], tenant="acme")).shape == (0, 1)
    await batcher.close()


@pytest.mark.parametrize("error", [Unavailable("no model"), Retry("no model"), TimeoutError("no model")])
async def test_an_outage_fails_a_batch_as_a_whole_after_one_call(error: Exception) -> None:
    embedder = Recording()
    embedder.error = error
    batcher = EmbedBatcher(embedder)
    tasks = await started(batcher, (["1"], False), (["bad"], False), (["2"], False))
    embedder.go.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(each) for each in found] == [type(error)] * 3
    assert embedder.calls == [["1", "bad", "2"]]
    await batcher.close()


async def test_a_caller_that_is_cancelled_costs_no_call_and_disturbs_nobody() -> None:
    embedder = Recording()
    batcher = EmbedBatcher(embedder)
    tasks = await started(batcher, (["1"], False))
    tasks += await started(batcher, (["2"], False), (["3"], False))
    tasks[1].cancel()
    embedder.go.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(found[1], asyncio.CancelledError)
    assert [float(found[0][0, 0]), float(found[2][0, 0])] == [1.0, 3.0]
    assert [text for call in embedder.calls for text in call] == ["1", "3"]
    await batcher.close()
    with pytest.raises(BadInput, match="closed"):
        await batcher.embed(["1"], tenant="acme")


async def test_wordllama_embeds_offline_what_no_tokenizer_takes_and_blank_texts_too() -> None:
    embedder = WordLlamaEmbedder()
    vectors = await embedder.embed(["an otter", "an otter", "", "a\ud800b", "x" * 100_000], tenant="acme")
    assert vectors.shape == (5, 256)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1).tolist() == pytest.approx([1, 1, 0, 1, 1], abs=1e-5)
    assert (vectors[0] == vectors[1]).all()
    small = WordLlamaEmbedder(64)
    assert (await small.embed(["an otter"], tenant="acme")).shape == (1, 64)
    assert (small.name, embedder.name) == ("wordllama-64", "wordllama-256")
    await embedder.close()
    await small.close()


def test_another_model_in_a_later_wordllama_has_another_name_so_that_its_vectors_are_never_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights" / "l2_supercat_256.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"other weights")
    monkeypatch.setattr(embedding, "_home", lambda: tmp_path)
    assert re.fullmatch(r"wordllama-256-[0-9a-f]{8}", WordLlamaEmbedder().name)
    monkeypatch.setattr(embedding, "_home", lambda: None)  # not installed, as where questions are only sent
    assert WordLlamaEmbedder().name == "wordllama-256"


def test_wordllama_embeds_words_that_it_remembers_as_the_model_embeds_whole_texts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embedding, "WORDS_MAX", 40)  # what it remembers is forgotten again and again
    chance = random.Random(7)
    parts = [
        "a",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\u2581",
        "\u00e9",
        "\U0001f600",
        "the",
        "ing",
        " un",
        "\t",
        "\u4e2d",
        "<s>",
        "\r",
    ]
    made = ["".join(chance.choices(parts, k=chance.randint(1, 60))) for _ in range(600)]
    texts = ["an otter", "an  otter ", "x" * 200, " ", "\n", " \n a", "\n\n", *made]
    model = embedding._load(256)
    expected = np.asarray(model.embed(texts, norm=True))
    embedder = WordLlamaEmbedder()
    found = np.concatenate([embedder._embed(texts[at : at + 50]) for at in range(0, len(texts), 50)])
    assert np.linalg.norm(expected, axis=1).min() > 0.99
    assert np.abs(found - expected).max() < 1e-5
