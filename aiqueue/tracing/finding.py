"""Whether spans can go anywhere: the program's own provider of tracers, or one for OTLP that is set up here."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import threading
from typing import Any, Final, Literal

from ..errors import SettingsError
from .tracing import Tracing

log = logging.getLogger(__name__)

Traces = Literal["auto", "otlp", "off"]
_NOT_REAL: Final = ("ProxyTracerProvider", "NoOpTracerProvider", "_DefaultTracerProvider")
_lock = threading.Lock()
_own: list[Any] = []  # the provider that was set up here, once in a process


def find_tracing(traces: Traces, ratio: float, service: str, provider: Any = None) -> Tracing | None:
    """Return what traces; None: nothing does.

    1. `provider` is given, and `traces` is not "off": that.
    2. "auto": the provider that the program has set. Without one, or where opentelemetry was not even imported: None.
    3. "otlp": the same; without one, a provider that exports by OTLP is set up and set, with `service` as its name.

    Raises SettingsError if the packages for "otlp" are missing.
    """
    if traces == "off":
        return None
    found = provider or _program_provider(imports=traces == "otlp")
    if found is None and traces == "otlp":
        found = _set_up_otlp(service)
    if found is None:
        return None
    tracing = Tracing(found, ratio, sys.modules["aiqueue"].__version__)
    return None if tracing.is_off else tracing


def _program_provider(*, imports: bool) -> Any:
    """Return the provider that the program has set; None: none is. It is not asked for if nobody can have set one."""
    if not imports and "opentelemetry.trace" not in sys.modules and "OTEL_PYTHON_TRACER_PROVIDER" not in os.environ:
        return None
    try:
        api = importlib.import_module("opentelemetry.trace")
        provider = api.get_tracer_provider()
    except Exception as error:  # noqa: BLE001  (a provider that the environment names may raise anything)
        log.warning("nothing is traced, because there is no provider of tracers: %s: %s", type(error).__name__, error)
        return None
    return None if type(provider).__name__ in _NOT_REAL else provider


def _set_up_otlp(service: str) -> Any:
    """Return a provider that exports by OTLP over HTTP, set for the whole program. OTEL_* variables configure it."""
    with _lock:
        if _own:
            return _own[0]
        try:
            api = importlib.import_module("opentelemetry.trace")
            sdk = importlib.import_module("opentelemetry.sdk.trace")
            resources = importlib.import_module("opentelemetry.sdk.resources")
            export = importlib.import_module("opentelemetry.sdk.trace.export")
            otlp = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
        except ImportError as error:
            raise SettingsError(f'traces = "otlp" needs opentelemetry: pip install "aiqueue[otel]" ({error})') from None
        named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        provider = sdk.TracerProvider(resource=resources.Resource.create({} if named else {"service.name": service}))
        provider.add_span_processor(export.BatchSpanProcessor(otlp.OTLPSpanExporter()))
        api.set_tracer_provider(provider)
        _own.append(provider)
        log.info("spans are exported by OTLP over HTTP")
        return provider
