"""The command line, ``aiqueue --help``: parses options, calls the client, prints text or JSON.

Contains no queue logic: what a command does is a method of the client or a function of another room.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import sys
from pathlib import Path
from typing import NoReturn, TextIO

__all__ = ["main"]

# Python's defaults are 700 or 2,000, 10, 10. Imports and jobs leave few reference cycles, and a collection looks at
# every object that a library has made.
GC_THRESHOLDS = 10_000, 20, 20


def main() -> NoReturn:
    """Run the command line of this process and exit.

    Exit codes: 0 success, 1 failure, 2 usage error, 3 the server differs from the declaration, 130 interrupted.
    """
    _open_missing_streams()
    gc.set_threshold(*GC_THRESHOLDS)  # a module that `work` loads may set its own
    code: object = 0
    try:
        from .app import app_of  # noqa: PLC0415  (here, so that an interrupt during the import is handled below)

        code = app_of(sys.argv[1] if len(sys.argv) > 1 else "")(prog_name="aiqueue", standalone_mode=False)
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # typer's own output, such as the help; that of a command raises OutputFailed
        code = 1
    except Exception as error:
        code = _report_error(error)
        if code is None:
            raise
    code = code if isinstance(code, int) else 0 if code is None else 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError) as error:
            if not code and isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
                code = _report_os_error(error)
            _discard(stream)
    gc.freeze()  # a sixth of a short command's time went into the collections at Python's exit
    sys.exit(code)


def _open_missing_streams() -> None:
    """Open /dev/null for each standard stream that the caller has closed, as by `>&-`: Python then has None for it.

    Otherwise the next socket or file gets its number, and output that is meant for the stream goes there.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115  (open until the end)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for characters that the terminal's encoding does not have


def _discard(stream: TextIO) -> None:
    """Drop what is still buffered for a stream that cannot be written, so that Python's exit does not fail by it."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _report_os_error(error: OSError) -> int:
    """Print an error of the system, such as a full disk, as one line. Return the exit code."""
    from .options import FAILED, print_error  # noqa: PLC0415

    print_error(f"{error.filename}: {error.strerror}" if error.filename else f"{error.strerror or error}")
    return FAILED


def _report_error(error: Exception) -> int | None:
    """Print an error of typer or of the system on one line. Return its exit code, None for other errors.

    Typer's are recognised by their attributes: the classes differ between its supported versions, some are private.
    """
    import typer  # noqa: PLC0415

    if isinstance(error, OSError):
        return _report_os_error(error)
    if isinstance(error, typer.Abort):
        with contextlib.suppress(OSError):
            sys.stderr.write("\n")
        return 130  # Ctrl-C at a prompt
    if not hasattr(error, "format_message"):
        return None
    from .options import print_error  # noqa: PLC0415

    message = str(error.format_message()).replace(": Value error, ", ": ")  # which some versions of typer write
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        sys.stdout.write(f"{message}\n" if message else "")  # with rich, the help is already printed
    else:
        path = getattr(context, "command_path", "aiqueue")
        print_error(f"{message.rstrip('.')}; see `{path} --help`")
    return int(getattr(error, "exit_code", 2))
