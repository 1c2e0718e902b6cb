"""`aiqueue demo`: real text files pass through real queues, while two faults are injected and fixed."""

from .command import demo

__all__ = ["demo"]
