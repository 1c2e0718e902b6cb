"""``aiqueue work app:worker`` of this checkout, or of the one at ``TENANCY_VERSION``. A script, for which `app` lies
beside it.
"""

from __future__ import annotations

import os
import runpy
import sys

if version := os.environ.get("TENANCY_VERSION"):
    sys.path.insert(1, version)
os.environ["TENANCY_PID"] = str(os.getpid())
sys.argv = ["aiqueue", "work", "app:worker", *sys.argv[1:]]
runpy.run_module("aiqueue", run_name="__main__")
