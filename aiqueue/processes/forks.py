"""Processes that a handler forks (`os.fork`, `multiprocessing`) do not take signals in the place of their parent."""

from __future__ import annotations

import functools
import os
import signal
import threading
from typing import Any

_OURS = ("asyncio.", "uvloop", "aiqueue.")


class _Mask(threading.local):
    """What the forking thread remembers from before the fork: the handled signals, and the mask to restore."""

    handled: tuple[signal.Signals, ...] = ()
    former: set[int] | None = None


_mask = _Mask()


@functools.cache
def reset_signals_at_fork() -> None:
    """Give each process that is forked from now on the default action for signals that the event loop handles here.

    Such a process would share the loop's wake-up socket: on Python 3.11, a signal sent to the forked process would call
    the handler in this one. Later versions cut the socket, but the forked process still ignores the signal. Handlers
    that the user has set with `signal.signal` are inherited as usual. Safe twice.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_block_signals, after_in_parent=_restore_mask, after_in_child=_reset_signals)


def _block_signals() -> None:
    """Hold back the handled signals, so that one for the forked process waits until its handlers are reset."""
    _mask.handled = tuple(each for each in signal.Signals if _find_module(signal.getsignal(each)).startswith(_OURS))
    _mask.former = signal.pthread_sigmask(signal.SIG_BLOCK, _mask.handled)


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in _mask.handled:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _restore_mask()


def _restore_mask() -> None:
    if _mask.former is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _mask.former)


def _find_module(handler: Any) -> str:
    """Return the module of a signal handler: a function, a method or a partial."""
    function = getattr(handler, "func", handler)
    return getattr(function, "__module__", None) or type(getattr(function, "__self__", None)).__module__
