"""aiqueue beside other queues, each with its own server, packages and worker. ``python -m benchmarks.peers --help``."""

from .comparison import Comparison, compare, run
from .trial import Plan

__all__ = ["Comparison", "Plan", "compare", "run"]
