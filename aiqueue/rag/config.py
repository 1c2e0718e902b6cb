"""What rag.toml says. Every key has a default, and the file itself is optional."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

STORE_DIRECTORY: Final = "rag"  # in the data directory, `.aiqueue`
MIB: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """Where documents are kept: table ``[store]``.

    - `kind`: "sqlite": a database a tenant in the directory `path`, on one host. "pgvector": PostgreSQL.
    - `path`: None: ``rag`` in aiqueue's data directory.
    - `dsn_env`: the environment variable that has PostgreSQL's connection string.
    - `host`: what this host is called; None: its own name. `moved_from`: "host:path" from where `path` has moved here.
    """

    kind: Literal["sqlite", "pgvector"] = "sqlite"
    path: Path | None = None
    dsn_env: str = "AIQUEUE_RAG_DSN"
    host: str | None = None
    moved_from: str | None = None


@dataclass(frozen=True, slots=True)
class EmbedderConfig:
    """What makes vectors: table ``[embedder]``.

    - `kind`: "wordllama": in the worker, offline. "gateway": `model`, a model of gateway.toml of the kind embedding.
    - `dimensions`: of the vectors; None: 256 for wordllama, and the model's own for the gateway.
    """

    kind: Literal["wordllama", "gateway"] = "wordllama"
    model: str = ""
    dimensions: int | None = None


@dataclass(frozen=True, slots=True)
class ChunkConfig:
    """How documents are cut: table ``[chunks]``. Sizes are characters. `most`: chunks of one document."""

    characters_max: int = 1_200
    characters_min: int = 700
    most: int = 50_000


@dataclass(frozen=True, slots=True)
class LimitConfig:
    """What one document may take: table ``[limits]``.

    - `document_bytes`: of a document by value or claim check, `file_bytes`: by path or URL.
    - `parse_s`: of one document in a child process; `parser_bytes`: that child's memory; `parsers`: how many children
      a worker has; None: one a CPU.
    - `fetch_s`: of one URL.
    """

    document_bytes: int = 64 * MIB
    file_bytes: int = 256 * MIB
    parse_s: float = 60.0
    parser_bytes: int = 1024 * MIB
    parsers: int | None = None
    fetch_s: float = 30.0


@dataclass(frozen=True, slots=True)
class TenantConfig:
    """What a tenant's documents may be read from: a table ``[[tenant]]``. Both are empty by default: nothing.

    - `roots`: directories, absolute. `hosts`: names of hosts, as in a URL, with ``:port`` where there is one.
    """

    roots: tuple[Path, ...] = ()
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AnswerConfig:
    """How questions are answered in words: table ``[answers]``.

    - `model`: of gateway.toml; None: a question must name one. `passages`: how many of them the prompt quotes.
    - `tokens_max`: of the answer.
    """

    model: str | None = None
    passages: int = 6
    tokens_max: int = 800


_NOTHING: Final = TenantConfig()


@dataclass(frozen=True, slots=True)
class RagConfig:
    """What rag.toml says. `file`: its path, for messages; "": there is none, and all is default."""

    file: str = ""
    store: StoreConfig = StoreConfig()
    embedder: EmbedderConfig = EmbedderConfig()
    chunks: ChunkConfig = ChunkConfig()
    limits: LimitConfig = LimitConfig()
    answers: AnswerConfig = AnswerConfig()
    tenants: Mapping[str, TenantConfig] = field(default_factory=dict)

    def tenant(self, name: str) -> TenantConfig:
        """Return what a tenant may read from: its own table, else that of ``"*"``, else nothing."""
        return self.tenants.get(name) or self.tenants.get("*") or _NOTHING
