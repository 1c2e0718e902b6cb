"""The user's hook that hides parts of messages before any tool shows them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from ..config import Redact, Settings
from ..errors import SettingsError
from ..units import module_of_path


def load_redact(settings: Settings) -> Redact | None:
    """Return the function that the setting `redact` is or names, also in the working directory; None without one.

    Raises SettingsError: without the function nothing may be shown.
    """
    if settings.redact is None or not isinstance(settings.redact, str):
        return settings.redact
    source, (module, _, name) = settings.source("redact"), settings.redact.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # noqa: BLE001  (a module may raise anything)
        advice = f"; a module is named without .py: {found}" if (found := module_of_path(module)) else ""
        problem = f"cannot import {module}: {type(error).__name__}: {error}{advice}"
        raise SettingsError(f"redact ({source}): {problem}") from None
    if not callable(found):
        raise SettingsError(f"redact ({source}): {module} has no function {name!r}")
    redact: Redact = found
    return redact
