"""``rag``: ingest documents, ask them, and look at what is stored."""

from __future__ import annotations

import typer

from ..options import add_command
from . import ask, documents, evaluate, ingest, reindex, watch

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Ingest documents, ask them, and look at what is stored of them.")

add_command(
    app,
    "ingest",
    examples=(
        "  aiqueue rag ingest docs --tenant acme --exclude '*.png'",
        "  aiqueue rag ingest docs --tenant acme --glob '*.md' --glob '*.pdf' --metadata lang=en",
        "  aiqueue rag ingest report.pdf --tenant acme --no-wait",
        "  aiqueue rag ingest /srv/acme/docs --tenant acme --by-path",
    ),
)(ingest.ingest)
add_command(app, "watch", examples=("  aiqueue rag watch docs --tenant acme",))(watch.watch)
add_command(
    app,
    "ask",
    examples=(
        '  aiqueue rag ask "How is a dead letter replayed?" --tenant acme',
        '  aiqueue rag ask "What is new?" --tenant acme --where lang=en --where "year>=2020" --k 10',
        '  aiqueue rag ask "How do I install it?" --tenant acme --answer',
    ),
)(ask.ask)
add_command(app, "status")(documents.status)
add_command(app, "ls")(documents.ls)
add_command(app, "rm", examples=("  aiqueue rag rm guide.md --tenant acme",))(documents.rm)
add_command(app, "stats")(documents.stats)
add_command(app, "eval", examples=("  aiqueue rag eval questions.json --tenant acme",))(evaluate.evaluate)
add_command(app, "reindex", examples=("  aiqueue rag reindex --tenant acme",))(reindex.reindex)
