"""`aiqueue demo`: real documents through real queues, with two faults injected and mended."""

from .command import demo

__all__ = ["demo"]
