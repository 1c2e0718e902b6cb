"""rag.toml: optional, and a wrong one is one line with file and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiqueue.errors import TopologyError
from aiqueue.rag import RagConfig, TenantConfig, config_file, load
from aiqueue.topology import Topology


def test_without_a_file_all_is_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AIQUEUE_RAG", raising=False)
    assert load() == RagConfig()
    assert load(streams=tmp_path) == RagConfig()


def test_the_file_is_found_by_argument_by_variable_and_beside_the_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, passages in (("given", 1), ("variable", 2), ("rag", 3)):
        (tmp_path / f"{name}.toml").write_text(f"[answers]\npassages = {passages}\n")
    monkeypatch.setenv("AIQUEUE_RAG", str(tmp_path / "variable.toml"))
    assert load(tmp_path / "given.toml", streams=tmp_path).answers.passages == 1
    assert load(streams=tmp_path).answers.passages == 2
    monkeypatch.delenv("AIQUEUE_RAG")
    assert load(streams=tmp_path).answers.passages == 3


def test_beside_the_streams_it_is_no_stream_file(tmp_path: Path) -> None:
    (tmp_path / "rag.toml").write_text("[answers]\npassages = 3\n")
    assert Topology.load(tmp_path).streams == Topology.load().streams


def test_a_file_that_is_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match=r"none.toml: no such file: write it, or unset AIQUEUE_RAG"):
        load(tmp_path / "none.toml")


def test_an_empty_file_is_all_default_and_relative_paths_start_from_it(tmp_path: Path) -> None:
    file = str(tmp_path / "rag.toml")
    assert config_file.parse(file, "") == RagConfig(file)
    assert config_file.parse(file, '[store]\npath = "s"').store.path == tmp_path / "s"


def test_a_tenant_has_its_own_table_or_that_of_all_or_may_read_nothing(tmp_path: Path) -> None:
    text = f'[[tenant]]\nname = "acme"\nroots = ["{tmp_path}"]\n'
    found = config_file.parse("rag.toml", text)
    assert found.tenant("acme") == TenantConfig((tmp_path,))
    assert found.tenant("globex") == TenantConfig()
    found = config_file.parse("rag.toml", text + '[[tenant]]\nname = "*"\nhosts = ["Docs.example.com"]')
    assert found.tenant("globex") == TenantConfig(hosts=("docs.example.com",))
    assert found.tenant("acme").hosts == ()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("store = 5", "rag.toml: store: must be a table: write [store]"),
        ("[stor]", "rag.toml: stor: unknown key; did you mean store?"),
        ("[store]\nkin = 1", "rag.toml: store.kin: unknown key; did you mean kind?"),
        ('[store]\nkind = "oracle"', 'rag.toml: store.kind: must be "sqlite" or "pgvector", not "oracle"'),
        ('[embedder]\nkind = "gateway"', "rag.toml: embedder.model: is missing: a model of gateway.toml"),
        ('[embedder]\nmodel = "m"', "rag.toml: embedder.model: is only for kind"),
        (
            '[embedder]\nkind = "gateway"\nmodel = "m"\ndimensions = 8193',
            "rag.toml: embedder.dimensions: must be a whole number from 1 to 8,192, not 8193",
        ),
        ("[embedder]\ndimensions = 3", "rag.toml: embedder.dimensions: must be 64, 128 or 256 for wordllama, not 3"),
        ('[limits]\ndocument = "2TiB"', 'rag.toml: limits.document: must be a size up to 1.0 GiB, such as "64MiB"'),
        ('[limits]\nfetch_time = "-1s"', "rag.toml: limits.fetch_time: must be a duration up to"),
        ("[parsing]\nprocesses = 0", "rag.toml: parsing.processes: must be a whole number from 1 to 256, not 0"),
        ('[parsing]\nparsers = ["x"]', "rag.toml: parsing.parsers: must be a list of names of parsers"),
        ("[answers]\npassages = true", "rag.toml: answers.passages: must be a whole number from 1 to 50"),
        ("[tenant]\nname = 1", "rag.toml: tenant: must be tables: write [[tenant]]"),
        ("[[tenant]]\nroots = []", "rag.toml: tenant 1.name: is missing"),
        ('[[tenant]]\nname = "a.b"', "rag.toml: tenant 1.name: must be a tenant"),
        ('[[tenant]]\nname = "a"\nroots = ["docs"]', "rag.toml: tenant 1.roots: must be a list of absolute paths"),
        ('[[tenant]]\nname = "a"\nroots = ["/dev/null"]', "rag.toml: tenant 1.roots: /dev/null is not a directory"),
        ('[[tenant]]\nname = "a"\nhosts = ["http://x/"]', "rag.toml: tenant 1.hosts: must be a list of names of hosts"),
        ('[[tenant]]\nname = "a"\n[[tenant]]\nname = "a"', "rag.toml: tenant 2.name: there is one of the name a"),
        ("[", "rag.toml: is not TOML"),
    ],
)
def test_a_wrong_file_is_one_line_with_file_and_key(text: str, error: str) -> None:
    with pytest.raises(TopologyError) as raised:
        config_file.parse("rag.toml", text)
    assert str(raised.value).startswith(error)
    assert "\n" not in str(raised.value)
