"""The command line, ``aiqueue --help``: parses options, calls the client, prints text or JSON.

Contains no queue logic: what a command does is a method of the client or a function of another room.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """Run the command line of this process and exit.

    Exit codes: 0 success, 1 failure, 2 usage error, 3 the server differs from the declaration, 130 interrupted.
    """
    code: object = 0
    try:
        from .app import app  # noqa: PLC0415  (here, so that an interrupt during the import is handled below)

        code = app(prog_name="aiqueue", standalone_mode=False)
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 1
    except Exception as error:
        code = _report_usage_error(error)
        if code is None:
            raise
    try:
        sys.stdout.flush()
    except (BrokenPipeError, ValueError):  # the reader closed the pipe, as `head` does, which is no error
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code if isinstance(code, int) else 0 if code is None else 1)


def _report_usage_error(error: Exception) -> int | None:
    """Print one of typer's errors on one line, like every other error. Return its exit code, None for other errors.

    Recognised by their attributes: the classes differ between the supported versions of typer, and some are private.
    """
    import typer  # noqa: PLC0415

    if isinstance(error, typer.Abort):
        sys.stderr.write("\n")
        return 130  # Ctrl-C at a prompt
    if not hasattr(error, "format_message"):
        return None
    from .options import print_error  # noqa: PLC0415

    message = str(error.format_message())
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        sys.stdout.write(f"{message}\n" if message else "")  # with rich, the help is already printed
    else:
        path = getattr(context, "command_path", "aiqueue")
        print_error(f"{message.rstrip('.')}; see `{path} --help`")
    return int(getattr(error, "exit_code", 2))
