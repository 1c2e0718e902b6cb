"""Puts off nats-py's import of aiohttp, which only an address that begins with ws:// or wss:// needs.

nats-py imports aiohttp wherever that is installed, which takes a third of a worker's start. Import this module before
nats-py: the first use of aiohttp by nats-py imports it then.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _DeferredModule(ModuleType):
    """Stands for a module that is imported when one of its attributes is first asked for."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:  # another thread imports the module meanwhile
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def _import_nats() -> None:
    if "aiohttp" in sys.modules or find_spec("aiohttp") is None:
        return
    deferred = sys.modules["aiohttp"] = _DeferredModule("aiohttp")
    try:
        importlib.import_module("nats.aio.transport")
    finally:
        if sys.modules.get("aiohttp") is deferred:
            del sys.modules["aiohttp"]


_import_nats()
