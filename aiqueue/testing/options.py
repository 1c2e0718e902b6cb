"""The arguments of `perform`, and their checks."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from .. import codec
from ..config import Settings
from ..errors import BadInput
from ..payload import Document
from ..topology import Topology
from ..units import Deadline, Duration, parse_duration, whole_number

ATTEMPT_MAX = 1_000_000
# which families there are, and what they are like
VARIABLES = ("AIQUEUE_STREAMS", "AIQUEUE_PROFILE", "AIQUEUE_SIZE", "AIQUEUE_FAMILIES", "AIQUEUE_OVERLAY")

_topologies: dict[tuple[object, ...], Topology] = {}


class JobOptions(TypedDict, total=False):
    """Of a job; see `perform`."""

    attempt: int
    state: Any
    documents: Mapping[Document, bytes]
    steps: Mapping[str, Any]
    calls: Iterable[Any]
    children: Mapping[str, Any]
    tenant: str
    priority: str
    unique: str | None
    headers: Mapping[str, str]
    deadline: Deadline | None
    timeout: Duration | None
    cancel_after: Duration | None
    settings: Settings | None


def check_names(options: Mapping[str, Any], known: type[Any], whose: str) -> None:
    """Raise BadInput for an argument that `perform` does not have."""
    names = known.__annotations__
    if unknown := next((name for name in options if name not in names), None):
        raise BadInput(f"testing.perform has no argument {unknown!r} for {whose}: it has {', '.join(names)}")


def attempt_of(options: Mapping[str, Any]) -> int:
    """Return the number of the attempt. Raises BadInput."""
    return whole_number("attempt", options.get("attempt", 1), 1, ATTEMPT_MAX)


def duration_of(options: Mapping[str, Any], name: str) -> float | None:
    """Return a duration in seconds, None if it is not given. Raises BadInput, also for 0."""
    given = options.get(name)
    if given is None:
        return None
    seconds = parse_duration(name, given)
    if seconds == 0:
        raise BadInput(f"{name} must be above 0: leave it out for none")
    return seconds


def mapping_of(options: Mapping[str, Any], name: str) -> Mapping[Any, Any]:
    """Return a mapping, empty if it is not given. Raises BadInput."""
    given = options.get(name)
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise BadInput(f"{name} must be a mapping, such as a dict, not {type(given).__name__}")
    return given


def documents_of(options: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the bytes of documents by SHA-256. Raises BadInput."""
    for document, data in mapping_of(options, "documents").items():
        if not isinstance(document, Document) or not isinstance(data, bytes):
            raise BadInput(
                "documents must map documents to their bytes: found = aiqueue.testing.document(data), then "
                "documents={found: data}"
            )
    return {document.sha256: data for document, data in mapping_of(options, "documents").items()}


def through_codec(data: Any) -> Any:
    """Return data as a later attempt gets it. Raises BadInput (EncodeError)."""
    return codec.decode(codec.encode(data), codec.CBOR, max_bytes=codec.MAX_BYTES)


def topology_of(options: Mapping[str, Any]) -> Topology:
    """Return the families and streams of the given settings, or of those of the working directory.

    Raises BadInput, SettingsError, TopologyError.
    """
    settings = options.get("settings")
    if settings is None:
        return _topology_here(os.getcwd(), *map(os.environ.get, VARIABLES))  # noqa: PTH109  (a tenth of the time)
    if not isinstance(settings, Settings):
        raise BadInput(f"settings must be aiqueue.Settings, not {type(settings).__name__}")
    key = settings.streams, settings.profile, settings.size, settings.families, str(settings.overlay)
    if (known := _topologies.get(key)) is None:
        known = _topologies[key] = Topology.of(settings)
    return known


@functools.lru_cache(16)
def _topology_here(_directory: str, *_variables: str | None) -> Topology:
    """As `topology_of`. The arguments are what the families depend on, besides the contents of aiqueue.toml."""
    return Topology.of(Settings.load())
