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

    - `kind`: "wordllama": in the worker, offline. "gateway": by a model of gateway.toml.
    - `dimensions`: of the vectors; None: 256, for wordllama only. Longer vectors of a model are cut to so many.
    """

    kind: Literal["wordllama", "gateway"] = "wordllama"
    model: str = ""
    """With the kind "gateway": name of a model in gateway.toml whose kind is embedding."""
    dimensions: int | None = None


@dataclass(frozen=True, slots=True)
class ParsingConfig:
    """How documents are read: table ``[parsing]``.

    - `parsers`: the user's own, each a "module:attribute" that is a `Parser`; they go before those of aiqueue.
    - `processes`: how many children a worker has for PDF, HTML and large documents; None: one a CPU.
    - `chunks_max`: of one document.
    """

    parsers: tuple[str, ...] = ()
    processes: int | None = None
    time_s: float = 120.0
    """How long a child may take for one document, in seconds."""
    memory_bytes: int = 1024 * MIB
    """How much memory a child may take for one document, in bytes."""
    chunks_max: int = 50_000


@dataclass(frozen=True, slots=True)
class LimitConfig:
    """How large a document may be: table ``[limits]``.

    `document_bytes`: by value or claim check. `file_bytes`: by path or URL. `fetch_s`: how long one URL may take.
    """

    document_bytes: int = 64 * MIB
    file_bytes: int = 256 * MIB
    fetch_s: float = 60.0


@dataclass(frozen=True, slots=True)
class TenantConfig:
    """What a tenant's documents may be read from: a table ``[[tenant]]``. Both are empty by default: nothing.

    - `roots`: directories, absolute. `hosts`: names of hosts, as in a URL, with ``:port`` where there is one.
    - `private_hosts`: hosts that may also have private addresses, as of an intranet.
    """

    roots: tuple[Path, ...] = ()
    hosts: tuple[str, ...] = ()
    private_hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AnswerConfig:
    """How questions are answered in words: table ``[answers]``.

    - `model`: of gateway.toml; None: a question must name one. `passages`: how many of them the prompt quotes.
    - `tokens_max`: of the answer.
    - `time_s`: how long a question without a deadline waits for it. Requests on ai.rag.results wait 30 s.
    """

    model: str | None = None
    passages: int = 6
    tokens_max: int = 800
    time_s: float = 25.0


_NOTHING: Final = TenantConfig()


@dataclass(frozen=True, slots=True)
class RagConfig:
    """What rag.toml says. `file`: its path, for messages; "": there is none, and all is default."""

    file: str = ""
    store: StoreConfig = StoreConfig()
    """Where documents are stored."""
    embedder: EmbedderConfig = EmbedderConfig()
    """Which embedder makes the vectors."""
    parsing: ParsingConfig = ParsingConfig()
    """How documents are parsed and cut into chunks."""
    limits: LimitConfig = LimitConfig()
    """How large documents and questions may be."""
    answers: AnswerConfig = AnswerConfig()
    """Which model answers in words, and how."""
    tenants: Mapping[str, TenantConfig] = field(default_factory=dict)
    """What differs for a tenant, by its name."""

    def tenant(self, name: str) -> TenantConfig:
        """Return what a tenant may read from: its own table, else that of ``"*"``, else nothing."""
        return self.tenants.get(name) or self.tenants.get("*") or _NOTHING
