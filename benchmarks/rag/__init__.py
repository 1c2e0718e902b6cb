"""Retrieval by real workers, judged by what its store holds: ``python -m benchmarks rag``.

Each scenario has a server and workers of its own. `--corpus`, or the variable AIQUEUE_RAG_CORPUS, names a directory of
Debian's packages of documentation (`apt-get download python3.11-doc sqlite3-doc postgresql-doc-15`), unpacked or not;
without it the project's own documents are the corpus, to which there are no questions but headings. Exit code 1 if a
figure is not what is demanded.
"""

from __future__ import annotations

from pathlib import Path

from ..scenarios import Scenario, make_parser, parse, run_all, say
from . import quality, recovery, speed
from .bench import Asked

SCENARIOS: dict[str, Scenario[Asked]] = {
    "quality": quality.quality,
    "kills": recovery.kills,
    "versions": recovery.versions,
    "throughput": speed.throughput,
    "queries": speed.queries,
    "memory": speed.memory,
}


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("rag", __doc__, SCENARIOS)
    usual = Asked()
    parser.add_argument("--corpus", type=Path, metavar="DIRECTORY", help="of packages of documentation")
    parser.add_argument("--pages", type=int, default=0, help="of the corpus at most; 0: all")
    parser.add_argument("--rounds", type=int, default=usual.rounds, help="of throughput")
    parser.add_argument("--documents", type=int, default=usual.documents, help="of a round of throughput")
    parser.add_argument("--chunks", type=int, default=usual.chunks, help="that are there when questions are asked")
    parser.add_argument("--seconds", type=float, default=usual.seconds, help="in which questions are asked")
    parser.add_argument("--memory", type=int, nargs=2, default=usual.memory, metavar="DOCUMENTS", help="after which")
    parser.add_argument("--versioned", type=int, default=usual.versioned, help="documents with many versions")
    chosen = parse(parser, SCENARIOS, arguments)
    asked = Asked(
        corpus=chosen.corpus, most=chosen.pages, seed=chosen.seed, rounds=chosen.rounds, documents=chosen.documents,
        chunks=chosen.chunks, seconds=chosen.seconds, memory=tuple(chosen.memory), versioned=chosen.versioned,
        keep=chosen.keep, say=say,
    )  # fmt: skip
    return run_all(chosen, SCENARIOS, asked)
