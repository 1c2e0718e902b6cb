"""Read rag.toml. Every fault is one line with the file and the key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from .. import subjects
from ..errors import TopologyError
from ..topology import tables
from .config import (
    AnswerConfig,
    EmbedderConfig,
    LimitConfig,
    ParsingConfig,
    RagConfig,
    StoreConfig,
    TenantConfig,
)  # fmt: skip
from .rag_keys import KEYS, TENANT_KEYS
from .types import DIMENSIONS_MAX

FILE: Final = "rag.toml"
VARIABLE: Final = "AIQUEUE_RAG"
GIB: Final = 1024**3

_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_MODEL_NAME = re.compile(r"[A-Za-z0-9_./:@+-]{1,256}")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]{1,253})(:[0-9]{1,5})?")
_HOSTS = 'names of hosts, such as "docs.example.com"'
_HOST_NAME = re.compile(r"[A-Za-z0-9._-]{1,253}")
_ABSOLUTE = re.compile(r"/[^\x00]*|~[^\x00]*")
_REFERENCE = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_.]*")
_MODEL = "a model of gateway.toml"


def load(path: str | Path | None = None, *, streams: Path | None = None) -> RagConfig:
    """Read rag.toml: `path`, else the environment variable AIQUEUE_RAG, else the directory `streams`, the setting.

    A file that is only looked for there need not exist: all is default then. Raises TopologyError, in one line with
    file and key.
    """
    try:
        found = tables.load_file(path, name=FILE, variable=VARIABLE, streams=None, parse=parse)
    except TopologyError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise TopologyError(error.file, "", f"no such file: write it, or unset {VARIABLE}") from None
        raise
    if found is None and streams is not None:
        try:
            found = tables.load_file(streams / FILE, name=FILE, variable=VARIABLE, streams=None, parse=parse)
        except TopologyError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
    return found or RagConfig()


def parse(file: str, text: str) -> RagConfig:
    """Parse the text of a rag.toml. `file`: its path, which relative paths in it start from. Raises TopologyError."""
    return tables.parse_file(file, text, _read_file)


def _read_file(file: str, raw: dict[str, Any]) -> RagConfig:
    tables.check_known("", raw, (*KEYS, "tenant"))
    top = tables.TableReader("", raw)
    read = {name: top.table(name, known=keys) for name, keys in KEYS.items()}
    tenants: dict[str, TenantConfig] = {}
    for where, table in tables.list_tables(raw, "tenant"):
        name, tenant = _read_tenant(where, table)
        tables.add_new(tenants, where, "name", name, tenant)
    return RagConfig(
        file,
        _read_store(read["store"], Path(file).parent),
        _read_embedder(read["embedder"]),
        _read_parsing(read["parsing"]),
        _read_limits(read["limits"]),
        _read_answers(read["answers"]),
        tenants,
    )


def _read_store(read: tables.TableReader, home: Path) -> StoreConfig:
    path = read.text("path")
    default = StoreConfig()
    return StoreConfig(
        read.choice("kind", ("sqlite", "pgvector"), default.kind),
        None if path is None else home / Path(path).expanduser(),
        read.text("dsn_env", _VARIABLE_NAME, "the name of an environment variable") or default.dsn_env,
        read.text("host", _HOST_NAME, "the name of a host, up to 253 characters of A-Z a-z 0-9 . _ -"),
        read.text("moved_from"),
    )


def _read_embedder(read: tables.TableReader) -> EmbedderConfig:
    kind, model = read.choice("kind", ("wordllama", "gateway"), "wordllama"), read.text("model", _MODEL_NAME, _MODEL)
    if kind == "gateway" and model is None:
        raise tables.WrongKey("embedder.model", f"is missing: {_MODEL} of the kind embedding")
    if kind == "wordllama" and model is not None:
        raise tables.WrongKey("embedder.model", 'is only for kind = "gateway": wordllama has one model')
    dimensions = read.count("dimensions", DIMENSIONS_MAX)
    if kind == "gateway" and dimensions is None:
        raise tables.WrongKey("embedder.dimensions", f"is missing: how many numbers a vector of {model} has, or fewer")
    if kind == "wordllama" and dimensions not in (None, 64, 128, 256):
        raise tables.WrongKey("embedder.dimensions", f"must be 64, 128 or 256 for wordllama, not {dimensions}")
    return EmbedderConfig(kind, model or "", dimensions)


def _read_parsing(read: tables.TableReader) -> ParsingConfig:
    default = ParsingConfig()
    return ParsingConfig(
        read.names("parsers", _REFERENCE, 'names of parsers, such as "module:attribute"'),
        read.count("processes", 256),
        read.duration("time", default.time_s),
        read.size("memory", default.memory_bytes, 64 * GIB),
        read.count("chunks_max", 1_000_000) or default.chunks_max,
    )


def _read_limits(read: tables.TableReader) -> LimitConfig:
    default = LimitConfig()
    return LimitConfig(
        document_bytes=read.size("document", default.document_bytes, GIB),
        file_bytes=read.size("file", default.file_bytes, 8 * GIB),
        fetch_s=read.duration("fetch_time", default.fetch_s),
    )


def _read_answers(read: tables.TableReader) -> AnswerConfig:
    default = AnswerConfig()
    return AnswerConfig(
        read.text("model", _MODEL_NAME, _MODEL),
        read.count("passages", 50) or default.passages,
        read.count("tokens_max", 100_000) or default.tokens_max,
        read.duration("time", default.time_s),
    )


def _read_tenant(where: str, table: dict[str, Any]) -> tuple[str, TenantConfig]:
    tables.check_known(where, table, TENANT_KEYS)
    read = tables.TableReader(where, table)
    name = read.required("name")
    if name != "*" and not subjects.TOKEN.fullmatch(name):
        shown = tables.shown_value(name)
        raise tables.WrongKey(f"{where}.name", f'must be a tenant, or "*" for all others, not {shown}')
    roots = tuple(Path(each).expanduser() for each in read.names("roots", _ABSOLUTE, "absolute paths of directories"))
    for each in roots:
        if each.exists() and not each.is_dir():  # another host may have one that is missing here
            raise tables.WrongKey(f"{where}.roots", f"{each} is not a directory")
    hosts, private = (read.names(key, _HOST, _HOSTS) for key in ("hosts", "private_hosts"))
    return name, TenantConfig(roots, tuple(each.lower() for each in hosts), tuple(each.lower() for each in private))
