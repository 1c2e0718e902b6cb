"""The keys of rag.toml: what each means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ..topology import FileKey

KEYS: Final[Mapping[str, Mapping[str, FileKey]]] = {
    "store": {
        "kind": FileKey(
            "Where documents are kept: on one host, or in PostgreSQL, for workers on many hosts.", '"sqlite"'
        ),
        "path": FileKey("Directory of SQLite's databases.", "`rag` in the data directory `.aiqueue`"),
        "dsn_env": FileKey("Environment variable that has PostgreSQL's connection string.", '"AIQUEUE_RAG_DSN"'),
        "host": FileKey(
            "What this host is called. Set it where the name changes, as of containers.", "the machine's name"
        ),
        "moved_from": FileKey(
            '`"host:path"`, as the error of a store on another host says it: the directory has moved here from there.',
            "none",
        ),
    },
    "embedder": {
        "kind": FileKey("What makes vectors: the worker itself, offline, or a model of the gateway.", '"wordllama"'),
        "model": FileKey("Model of gateway.toml, of the kind `embedding`.", 'none; required for `"gateway"`'),
        "dimensions": FileKey(
            'How many numbers a vector has: 64, 128 or 256 for `"wordllama"`. Longer vectors of a model are truncated.',
            '256; required for `"gateway"`',
        ),
    },
    "parsing": {
        "parsers": FileKey('Your own parsers, each as `"module:attribute"`, which go before those of aiqueue.', "none"),
        "processes": FileKey(
            "How many child processes of a worker read PDF, HTML and large documents.", "one for each CPU"
        ),
        "time": FileKey("How long reading one document may take in a child process.", '"2m"'),
        "memory": FileKey("How much memory reading one document may take in a child process.", '"1GiB"'),
        "chunks_max": FileKey(
            "How many chunks of up to 1,200 characters a document may have. A larger one fails.", "50_000"
        ),
    },
    "limits": {
        "document": FileKey("Size of a document that is sent by value or claim check, at most.", '"64MiB"'),
        "file": FileKey("Size of a document that is read by path or URL, at most.", '"256MiB"'),
        "fetch_time": FileKey("How long fetching one URL may take.", '"1m"'),
    },
    "answers": {
        "model": FileKey("Model of gateway.toml that answers in words.", "none: a question names one"),
        "passages": FileKey("How many passages the prompt has.", "6"),
        "tokens_max": FileKey("How many tokens the answer has at most.", "800"),
        "time": FileKey("How long a question without a deadline waits for its answer in words.", '"25s"'),
    },
}
TENANT_KEYS: Final[Mapping[str, FileKey]] = {
    "name": FileKey('A tenant; `"*"`: each tenant that has no table of its own.'),
    "roots": FileKey(
        "Directories whose files the tenant's documents may name by path. Symlinks in them are refused.", "none"
    ),
    "hosts": FileKey(
        "Hosts from which the tenant's documents may be fetched, with `:port` where there is one.", "none"
    ),
    "private_hosts": FileKey("Hosts that may also have private addresses, as of an intranet.", "none"),
}
