"""Vectors from the gateway's queue: paid once for a tenant and text, never another tenant's, and errors are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aiqueue
from aiqueue import Retry
from aiqueue.errors import BadInput
from aiqueue.gateway import load
from aiqueue.gateway.standin import Fault, StandIn, embed
from aiqueue.rag.embedding_cache import EmbeddingCache
from aiqueue.rag.gateway_embedder import GatewayEmbedder, _batches

from ..gateway.running import KEY, KEY_VARIABLE, running, write_config


@pytest.fixture
async def standin() -> AsyncIterator[StandIn]:
    async with StandIn() as standin:
        yield standin


@pytest.fixture
async def gateway(
    client: aiqueue.Client, tmp_path: Path, standin: StandIn, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Path]:
    """A gateway worker whose model "vectors" the stand-in answers, with 8 dimensions."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    path = write_config(tmp_path, standin.url)
    async with running(client, path):
        yield path


@pytest.fixture
async def embedder(client: aiqueue.Client, gateway: Path, tmp_path: Path) -> AsyncIterator[GatewayEmbedder]:
    embedder = GatewayEmbedder(client, "vectors", 8, cache=tmp_path / "cache", config=load(gateway))
    yield embedder
    await embedder.close()


def texts_of(standin: StandIn) -> list[str]:
    return sorted(text for each in standin.calls for text in each.body["input"])


async def test_each_text_is_paid_once_for_each_tenant_also_after_a_restart(
    client: aiqueue.Client, embedder: GatewayEmbedder, standin: StandIn, tmp_path: Path
) -> None:
    vectors = await embedder.embed(["one", "two", "one", ""], tenant="acme")
    assert vectors.shape == (4, 8)
    assert vectors.dtype == np.float32
    for row, text in ((0, "one"), (1, "two"), (2, "one")):
        expected = np.asarray(embed(text, 8), np.float32)
        np.testing.assert_allclose(vectors[row], expected / np.linalg.norm(expected), rtol=1e-6)
    assert not vectors[3].any()
    assert texts_of(standin) == ["one", "two"]
    again = GatewayEmbedder(client, "vectors", 8, cache=tmp_path / "cache")
    np.testing.assert_array_equal(await again.embed(["two", "one"], tenant="acme"), vectors[[1, 0]])
    await again.close()
    assert texts_of(standin) == ["one", "two"]
    await embedder.embed(["two"], tenant="globex")
    assert texts_of(standin) == ["one", "two", "two"]


async def test_an_answer_that_a_killed_worker_has_not_stored_is_not_paid_again_by_another_batch(
    client: aiqueue.Client, embedder: GatewayEmbedder, standin: StandIn, tmp_path: Path
) -> None:
    answered = asyncio.Event()

    async def stay_away(tenant: str, vectors: Any) -> None:
        answered.set()
        await asyncio.Event().wait()

    embedder._cache.put = stay_away  # type: ignore[method-assign]
    killed = asyncio.create_task(embedder.embed(["one", "two", "three"], tenant="acme"))
    await asyncio.wait_for(answered.wait(), 10)
    killed.cancel()
    again = GatewayEmbedder(client, "vectors", 8, cache=tmp_path / "cache")
    vectors = await again.embed(["four", "two"], tenant="acme")
    expected = np.asarray([embed(each, 8) for each in ("four", "two")], np.float32)
    np.testing.assert_allclose(vectors, expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=1e-6)
    await again.embed(["three", "one"], tenant="acme")
    assert texts_of(standin) == ["four", "one", "three", "two"]
    assert await again._cache.pending("acme", [again._key("acme", each) for each in ("one", "two", "four")]) == []
    await again.close()


async def test_a_batch_that_the_gateway_refuses_is_not_asked_for_again_with_other_texts(
    embedder: GatewayEmbedder, standin: StandIn
) -> None:
    standin.order(Fault(400, message="not that text"))
    with pytest.raises(BadInput, match="not that text"):
        await embedder.embed(["bad", "good"], tenant="acme")
    await embedder.embed(["good"], tenant="acme")
    assert [each.body["input"] for each in standin.calls] == [["bad", "good"], ["good"]]


async def test_longer_vectors_are_cut_and_scaled_and_shorter_ones_are_refused_with_the_remedy(
    client: aiqueue.Client, gateway: Path, tmp_path: Path
) -> None:
    short = GatewayEmbedder(client, "vectors", 4, cache=tmp_path / "cache")
    (vector,) = await short.embed(["one"], tenant="acme")
    expected = np.asarray(embed("one", 8)[:4], np.float32)
    np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), rtol=1e-6)
    await short.close()
    long = GatewayEmbedder(client, "vectors", 16, cache=tmp_path / "cache")
    with pytest.raises(BadInput, match="vectors of 8 dimensions: set dimensions = 8"):
        await long.embed(["one"], tenant="acme")
    await long.close()
    assert gateway.exists()


async def test_what_the_gateway_refuses_is_rejected_and_an_unknown_model_is_not_even_asked(
    client: aiqueue.Client, embedder: GatewayEmbedder, gateway: Path, standin: StandIn, tmp_path: Path
) -> None:
    standin.order(Fault(400, message="not that text"))
    with pytest.raises(BadInput, match="not that text"):
        await embedder.embed(["one"], tenant="acme")
    other = GatewayEmbedder(client, "vectrs", 8, cache=tmp_path / "cache", config=load(gateway))
    with pytest.raises(BadInput, match="did you mean vectors"):
        await other.embed(["one"], tenant="acme")
    await other.close()
    assert len(standin.calls) == 1


async def test_a_gateway_that_does_not_answer_is_asked_again_later(
    client: aiqueue.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiqueue.rag.gateway_embedder.ANSWER_S", 0.05)
    embedder = GatewayEmbedder(client, "vectors", 8, cache=tmp_path / "cache")
    with pytest.raises(Retry, match="has not answered"):
        await embedder.embed(["one"], tenant="acme")
    await embedder.close()


def test_batches_have_at_most_256_texts_and_256_ki_characters_or_one_text() -> None:
    many = {str(number).encode(): "x" for number in range(600)}
    assert [len(each) for each in _batches(many)] == [256, 256, 88]
    large = {b"1": "x" * 200_000, b"2": "x" * 100_000, b"3": "x" * 300_000}
    assert [list(each) for each in _batches(large)] == [[b"1"], [b"2"], [b"3"]]


async def test_the_cache_is_bounded_and_drops_the_oldest(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, bytes_max=400_000)
    for number in range(30):
        await cache.put("acme", {b"%03d %03d" % (number, each): bytes(2_100) for each in range(30)})
    keys = [b"%03d %03d" % (number, each) for number in range(30) for each in range(30)]
    known = await cache.get("acme", keys)
    assert 60 <= len(known) <= 100
    assert sorted(known) == keys[-len(known) :]
    await cache.close()
    (file,) = tmp_path.glob("*.sqlite")
    assert file.stat().st_size < 600_000
    await cache.close()


async def test_a_damaged_cache_is_logged_and_costs_only_a_call(tmp_path: Path, caplog: Any) -> None:
    cache = EmbeddingCache(tmp_path)
    await cache.put("acme", {b"k": b"v"})
    await cache.close()
    (file,) = tmp_path.glob("acme-*.sqlite")
    file.write_bytes(b"no database" * 100)
    for extra in tmp_path.glob("*-wal"):
        extra.unlink()
    cache = EmbeddingCache(tmp_path)
    assert await cache.get("acme", [b"k"]) == {}
    assert f"the cache of embeddings of tenant acme is not used: {file}: file is not a database" in caplog.text
    assert "remove it while no worker runs" in caplog.text
    await cache.close()


async def test_tenants_whose_names_differ_in_case_only_share_no_file(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path)
    await cache.put("acme", {b"k": b"v"})
    assert await cache.get("Acme", [b"k"]) == {}
    await cache.close()
    names = [each.name.lower() for each in tmp_path.glob("*.sqlite")]
    assert len(set(names)) == 2
