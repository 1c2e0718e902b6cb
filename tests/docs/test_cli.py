"""The reference of the command line has all of it, each with a sentence of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from tools.docs import cli
from tools.docs.pages import commands


def test_every_command_argument_and_option_has_a_sentence_of_its_own() -> None:
    assert len(commands()) > 60
    assert cli.gaps(list(commands())) == []


def _app(**helps: str | None) -> typer.Typer:
    app = typer.Typer(help="An app for a test.")
    what_help, times_help = helps.get("what", "What to run."), helps.get("times", "How often, at most.")

    hints = {
        "what": Annotated[str, typer.Argument(help=what_help)],
        "times": Annotated[int, typer.Option(help=times_help, min=1, max=9)],
        "secret": Annotated[bool, typer.Option(hidden=True)],
        "quiet": Annotated[bool, typer.Option("--quiet/--loud", help="Print nothing else.")],
    }

    def annotated(function: Callable[..., None]) -> Callable[..., None]:
        function.__annotations__ = hints
        return function

    @app.command("run", help=helps.get("run", "Run what is named."))
    @annotated
    def run(
        what: Any, times: Any = 2, secret: Any = False, quiet: Any = False,
    ) -> None:  # fmt: skip
        """Run."""

    @app.callback()
    def main() -> None:
        """An app for a test."""

    return app


def test_a_command_argument_or_option_without_a_sentence_is_found() -> None:
    found = {
        name: cli.gaps(cli.list_commands(_app(**{name: text}), {}, {}))
        for name, text in (("run", "Run."), ("what", None), ("times", "times"), ("other", None))
    }
    assert found == {
        "run": ["aiqueue run"],
        "what": ["aiqueue run WHAT"],
        "times": ["aiqueue run --times"],
        "other": [],
    }


def test_a_parameter_is_shown_with_its_values_and_default_and_a_hidden_one_is_not() -> None:
    page = cli.render(cli.list_commands(_app(), {}, {"times": "AIQUEUE_TIMES"}))
    assert "| `WHAT` |  | required | What to run. |  |" in page
    assert "| `--times VALUE` | 1 to 9 | `2` | How often, at most. | `AIQUEUE_TIMES` |" in page
    assert "| `--quiet`, `--loud` |  |  | Print nothing else. |  |" in page
    assert "secret" not in page


def test_every_command_is_on_the_page() -> None:
    page = cli.render(list(commands()))
    for each in commands():
        if each.words:
            assert f"# aiqueue {' '.join(each.words)}\n" in page
    assert "`--header NAME=VALUE`" in page
    assert "Exit codes: 0 removed; 1 there is no such override." in page
