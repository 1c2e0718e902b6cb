"""Runs one function for many items, several at once, with a progress bar on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")

Advance = Callable[[float], None]


@contextlib.contextmanager
def progress_bar(title: str, total: float | None, *, unit: str) -> Iterator[Advance]:
    """Show a progress bar on stderr while the block runs, if stderr is a terminal and there is a title.

    `total` None: unknown.
    """
    if not title or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    shown = TextColumn("{task.completed:,.0f} " + unit if total is None else "{task.percentage:>3.0f}%")
    bar = Progress(
        SpinnerColumn(), TextColumn(title), *([] if total is None else [BarColumn()]), shown, TimeElapsedColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task(title, total=total)
        yield lambda amount: bar.advance(task, amount)


async def for_each(items: AsyncIterator[T], do: Callable[[T], Coroutine[Any, Any, None]], *, at_once: int) -> None:
    """Call `do` with every item, at most `at_once` at a time.

    After the first error no further item is started. The running calls are awaited, then the error is raised.
    """
    import asyncio  # noqa: PLC0415

    running: set[asyncio.Task[None]] = set()
    failed: BaseException | None = None

    try:
        try:
            async for item in items:
                running.add(asyncio.create_task(do(item)))
                if len(running) >= at_once:
                    done, running = await asyncio.wait(running, return_when="FIRST_COMPLETED")
                    failed = _first_error(done)
                    if failed is not None:
                        break
        except Exception as error:  # noqa: BLE001  (of the iterator; the running calls end first)
            failed = error
        if running:
            done, _ = await asyncio.wait(running)
            failed = failed or _first_error(done)
    except asyncio.CancelledError:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        raise
    if failed is not None:
        raise failed


def _first_error(done: set[asyncio.Task[None]]) -> BaseException | None:
    return next((error for task in done if (error := task.exception()) is not None), None)
