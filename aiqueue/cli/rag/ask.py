"""``rag ask``: a question to a tenant's documents, answered with passages, or in words too."""

from __future__ import annotations

import contextlib
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ...errors import JobFailed, ResultTimeout
from .. import output
from ..options import FAILED, Json, ServerOptions, duration_option, print_error
from .arguments import NO_WORKER, Tenant, is_worker_missing, parse_where

if TYPE_CHECKING:
    from ...client import Client, Handle
    from ...rag import Rag

TEXT_WIDTH = 100  # of passages, where the output is no terminal
TEXT_LINES = 6


@dataclass(frozen=True)
class _Question:
    text: str
    tenant: str
    k: int
    where: dict[str, Any] | None
    mode: Literal["hybrid", "keyword", "vector"]
    answer: bool
    model: str | None
    timeout_s: float

    async def enqueue(self, rag: Rag) -> Handle[dict[str, Any]]:
        return await rag.ask(
            self.text, tenant=self.tenant, k=self.k, where=self.where, mode=self.mode, answer=self.answer,
            model=self.model, priority="high", deadline=self.timeout_s,
        )  # fmt: skip


def _parse_question(text: str) -> str:
    from ...rag import QUERY_CHARS_MAX  # noqa: PLC0415

    if not text.strip():
        raise typer.BadParameter("the question is empty")
    if len(text) > QUERY_CHARS_MAX:
        raise typer.BadParameter(f"a question has at most {QUERY_CHARS_MAX:,} characters, not {len(text):,}")
    return text


def ask(
    options: ServerOptions,
    question: Annotated[
        str, typer.Argument(metavar="QUESTION", parser=_parse_question, help="What to ask the documents.")
    ],
    *,
    tenant: Tenant,
    k: Annotated[int, typer.Option("--k", "-k", metavar="N", help="How many passages.", min=1, max=100)] = 5,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Only documents with this metadata; also !=, >, >=, <, <=. Repeatable: several values of a key with = "
            "are alternatives, all else must hold.",
        ),
    ] = None,
    mode: Annotated[
        Literal["hybrid", "keyword", "vector"],
        typer.Option(metavar="MODE", help="hybrid, keyword or vector."),
    ] = "hybrid",
    answer: Annotated[
        bool, typer.Option("--answer", metavar="", help="Also answer in words, by a model of the gateway.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Model for --answer. Default: that of rag.toml.", show_default=False),
    ] = None,
    timeout: Annotated[
        float,
        duration_option("How long to wait."),
    ] = "30s",  # type: ignore[assignment]  # typer passes defaults to the parser too
    json: Json = False,
) -> None:
    """Ask a tenant's documents. Prints passages with document, section and score, best first.

    With --answer the sources come first, and then the answer as it is made, with [1] for the first source.

    Exit codes: 0 answered, also without any passage; 1 failed, or no answer in time or, with --answer, in words.
    """
    asked = _Question(question, tenant, k, parse_where(where), mode, answer or model is not None, model, timeout)
    result = options.run_with_client(lambda client: _ask(client, asked, as_json=json))
    if json:
        output.print_json(result)
    elif not asked.answer:
        _print_passages(result["passages"], tenant)
    problem = result.get("answer_problem")
    if problem:
        print_error(f"no answer in words: {problem}")
        raise typer.Exit(FAILED)


async def _ask(client: Client, asked: _Question, *, as_json: bool) -> dict[str, Any]:
    from ...rag import Rag, RagQuery  # noqa: PLC0415

    handle = await asked.enqueue(Rag(client))
    try:
        if asked.answer and not as_json:
            return await _stream(handle, asked.timeout_s)
        return await handle.result(asked.timeout_s + 1)
    except (ResultTimeout, JobFailed) as error:
        is_late = isinstance(error, ResultTimeout) or error.reason == "deadline"
        if is_late and await is_worker_missing(client, RagQuery, asked.tenant):
            raise ResultTimeout(f"{NO_WORKER}; no answer within {asked.timeout_s:g} s") from None
        raise


async def _stream(handle: Handle[dict[str, Any]], timeout_s: float) -> dict[str, Any]:
    """Print sources and text as they come, and return the result."""
    written = ""
    async with contextlib.aclosing(handle.stream(timeout=timeout_s + 1)) as items:
        async for item in items:
            if item.event == "chunk" and isinstance(item.data, str):
                written += item.data
                output.write(output.escape_controls(item.data))
            elif item.event == "chunk" and isinstance(item.data, dict) and "sources" in item.data and not written:
                _print_sources(item.data["sources"])
            elif item.event == "restart" or (item.event == "chunk" and item.data == {"restart": True}):
                if written:
                    output.print_line("\n-- restarted: discard the text above\n")
                written = ""
            elif item.final:
                break
    if written:
        output.print_line("")
    return await handle.result(timeout_s)


def _print_sources(sources: list[dict[str, Any]]) -> None:
    for each in sources:
        output.print_line(output.apply_style(f"[{each['ref']}] {_where(each)}", "dim"))
    if sources:
        output.print_line("")


def _print_passages(passages: list[dict[str, Any]], tenant: str) -> None:
    if not passages:
        output.print_line(f"nothing found: `aiqueue rag ls --tenant {tenant}` lists what can be found")
    width = min(output.terminal_width() or TEXT_WIDTH, TEXT_WIDTH)
    for number, each in enumerate(passages, 1):
        score = output.apply_style(f"{each['score']:.2f}", "dim")
        output.print_line(f"{number}  {output.apply_style(_where(each), 'bold')}  {score}")
        text = output.escape_controls(" ".join(each["text"].split()))
        lines = textwrap.wrap(text, width - 4, max_lines=TEXT_LINES, placeholder=" …")
        output.print_line("\n".join(f"    {line}" for line in lines) + "\n" * (number < len(passages)))


def _where(passage: dict[str, Any]) -> str:
    """Return the document of a passage, its section and page: "guide.md > Install (page 3)"."""
    if "heading" not in passage:
        return output.escape_controls(str(passage["document_id"]))
    place = " > ".join(each for each in (passage["document_id"], passage["heading"]) if each)
    page = f" (page {passage['page']})" if passage.get("page") is not None else ""
    return " ".join(output.escape_controls(f"{place}{page}").split())
