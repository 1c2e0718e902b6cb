"""``aiqueue work app:worker``, with a clock that is wrong by ``PROVIDER_SKEW_S`` seconds, or of the checkout of another
version at ``PROVIDER_VERSION``. A script, for which `app` lies beside it.
"""

from __future__ import annotations

import os
import runpy
import sys
import time

skew_s = float(os.environ.get("PROVIDER_SKEW_S", "0"))
if skew_s:  # before anything is imported that takes a reference to the functions
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + skew_s
    time.time_ns = lambda: real_ns() + int(skew_s * 1e9)
if version := os.environ.get("PROVIDER_VERSION"):
    sys.path.insert(1, version)
sys.argv = ["aiqueue", "work", "app:worker", *sys.argv[1:]]
runpy.run_module("aiqueue", run_name="__main__")
