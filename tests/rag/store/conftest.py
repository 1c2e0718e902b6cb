"""The PostgreSQL of this run: pgserver's, one for each worker of pytest, made when a test first asks for it."""

from __future__ import annotations

import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator

import psycopg
import pytest

if "aiqueue.rag.store.conformance" not in sys.modules:  # else another test has imported it: its asserts say less
    pytest.register_assert_rewrite("aiqueue.rag.store.conformance")


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The DSN of a PostgreSQL with pgvector. Skips where PyPI has no pgserver for this Python and machine."""
    try:
        with warnings.catch_warnings():  # without XDG_RUNTIME_DIR
            warnings.simplefilter("ignore")
            import pgserver  # noqa: PLC0415
    except ImportError as error:
        pytest.skip(f"pgserver has no wheel for Python {sys.version_info[0]}.{sys.version_info[1]} here ({error})")
    directory = tempfile.mkdtemp(prefix="aiqueue-pg-")  # short: a Unix socket lies in it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        server = pgserver.get_server(directory)
    with psycopg.connect(server.get_uri(), autocommit=True) as connection:  # it is killed by no test
        for setting in ("fsync", "full_page_writes", "synchronous_commit"):
            connection.execute(f"ALTER SYSTEM SET {setting} = off".encode())
        connection.execute("SELECT pg_reload_conf()")
    yield server.get_uri()
    server.cleanup()
    shutil.rmtree(directory, ignore_errors=True)
