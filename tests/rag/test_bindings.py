"""A store that belongs to a host: a worker elsewhere refuses, and says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

import aiqueue
from aiqueue.errors import ConfigMismatch
from aiqueue.rag import RagWorker, bindings


def named(path: Path, host: str, **more: str) -> Path:
    text = "".join(f'{key} = "{value}"\n' for key, value in {"host": host, "path": "store", **more}.items())
    path.write_text(f"[store]\n{text}")
    return path


async def starts(client: aiqueue.Client, file: Path, tenants: list[str] | None = None) -> str:
    """Return why a worker does not start; "" if it does."""
    try:
        async with RagWorker(file, tenants=tenants).running(client):
            return ""
    except ConfigMismatch as error:
        return str(error)


async def test_a_worker_on_another_host_refuses_in_one_line_with_the_remedy(
    client: aiqueue.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rag.toml"
    file.write_text('[store]\npath = "store"\n')
    monkeypatch.setattr(bindings.socket, "gethostname", lambda: "one")
    assert await starts(client, file) == ""
    assert await starts(client, file) == ""
    monkeypatch.setattr(bindings.socket, "gethostname", lambda: "two")
    refused = await starts(client, file)
    store = tmp_path / "store"
    assert refused == (
        f"the documents are kept on host one in {store}, and this is host two, {store}: run the worker there; or use "
        '[store] kind = "pgvector"; or, if the directory has moved here, set [store] moved_from = '
        f'"one:{store}" in rag.toml'
    )


async def test_a_directory_that_has_moved_is_taken_over_once_its_former_place_is_named(
    client: aiqueue.Client, tmp_path: Path
) -> None:
    file = tmp_path / "rag.toml"
    assert await starts(client, named(file, "one")) == ""
    assert "host one" in await starts(client, named(file, "two", moved_from="three:/x"))
    assert await starts(client, named(file, "two", moved_from=f"one:{tmp_path / 'store'}")) == ""
    assert await starts(client, named(file, "two")) == ""
    assert "kept on host two" in await starts(client, named(file, "one"))


async def test_tenants_of_their_own_workers_may_be_kept_on_hosts_of_their_own(
    client: aiqueue.Client, tmp_path: Path
) -> None:
    one, two = named(tmp_path / "one.toml", "one"), named(tmp_path / "two.toml", "two")
    assert await starts(client, one, ["acme"]) == ""
    assert await starts(client, two, ["globex"]) == ""
    assert await starts(client, two, ["acme"]) != ""
    assert "of tenant acme are kept on host one" in await starts(client, two)  # it would serve acme too


async def test_another_kind_of_store_is_refused(client: aiqueue.Client, tmp_path: Path) -> None:
    file = tmp_path / "rag.toml"
    mine = bindings.Binding("pgvector")
    await bindings.bind(client.connection, client.topology, mine, tenants=None, moved_from=None)
    assert await starts(client, named(file, "one")) == (
        'the documents are kept in pgvector, and here [store] kind is "sqlite": set it to "pgvector" in rag.toml; or, '
        'to begin anew here, set [store] moved_from = ":"'
    )
    assert await starts(client, named(file, "one", moved_from=":")) == ""
    file.write_text('[store]\nkind = "pgvector"\n')
    assert (await starts(client, file)).startswith("the documents are kept in SQLite on host one in ")


async def test_two_workers_that_are_both_first_agree_on_one(client: aiqueue.Client, tmp_path: Path) -> None:
    stored = bindings.bind(
        client.connection, client.topology, bindings.Binding("sqlite", "a"), tenants=None, moved_from=None
    )
    real, calls = client.connection.read, 0

    def read(stream: str, subject: str):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        return real(stream, subject) if calls > 1 else _nothing()

    await stored
    client.connection.read = read  # type: ignore[method-assign,assignment]
    with pytest.raises(ConfigMismatch, match="kept on host a"):
        await bindings.bind(
            client.connection, client.topology, bindings.Binding("sqlite", "b"), tenants=None, moved_from=None
        )
    assert calls == 2


async def _nothing():  # type: ignore[no-untyped-def]
    for each in ():
        yield each
