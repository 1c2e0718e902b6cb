"""``aiqueue work`` with the worker of the scenarios, and a clock that is wrong by ``SCHEDULES_SKEW_S`` seconds."""

from __future__ import annotations

import os
import runpy
import sys
import time

skew_s = float(os.environ.get("SCHEDULES_SKEW_S", "0"))
if skew_s:  # before anything is imported that takes a reference to the functions
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + skew_s
    time.time_ns = lambda: real_ns() + int(skew_s * 1e9)
sys.path[0] = ""
sys.argv = ["aiqueue", "work", "benchmarks.schedules.app:worker", *sys.argv[1:]]
runpy.run_module("aiqueue", run_name="__main__")
