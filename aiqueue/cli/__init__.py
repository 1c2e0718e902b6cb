"""The command line: ``aiqueue --help``."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """Run the command line of this process and end it.

    Exit codes: 0 ok, 1 failed, 2 wrong usage, 3 the server differs from what is declared, 130 interrupted.
    """
    code: object = 0
    try:
        from .app import app  # noqa: PLC0415  (an interrupt while it is imported is met here)

        code = app(prog_name="aiqueue", standalone_mode=False)
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 1
    except Exception as error:
        code = _wrong_usage(error)
        if code is None:
            raise
    try:
        sys.stdout.flush()
    except (BrokenPipeError, ValueError):  # the reader has left, as `head` does: nothing to complain of
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code if isinstance(code, int) else 0 if code is None else 1)


def _wrong_usage(error: Exception) -> int | None:
    """Say what typer found wrong, as one line like every other error; None for anything else.

    Typer's own errors are of different classes, some of them private, in the versions that we take.
    """
    import typer  # noqa: PLC0415

    if isinstance(error, typer.Abort):
        sys.stderr.write("\n")
        return 130  # Ctrl-C at a question
    if not hasattr(error, "format_message"):
        return None
    from .options import complain  # noqa: PLC0415

    told = str(error.format_message())
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        sys.stdout.write(f"{told}\n" if told else "")  # rich has written it already
    else:
        path = getattr(context, "command_path", "aiqueue")
        complain(f"{told.rstrip('.')}; see `{path} --help`")
    return int(getattr(error, "exit_code", 2))
