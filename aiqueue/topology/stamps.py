"""Who applied a stream last, and from which declaration: in the metadata of the stream. No setting, so never drift."""

from __future__ import annotations

import hashlib
import json
import secrets
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

from .declared import StreamSpec, Topology

PREFIX = "aiqueue."
_UNNAMED = "aiqueue"  # the default of the setting `name`
_SHARED = ("work", "inbox")  # the others take subjects of other services' families, too


def hash_declaration(topology: Topology, spec: StreamSpec) -> str:
    """Return 16 characters that two declarations of a stream and its lanes share only if they are the same."""
    config = {key: value for key, value in spec.config.items() if key != "subjects" or spec.role in _SHARED}
    lanes = [
        [each.lane_limits("*"), each.lane_storage, {tenant: each.lane_limits(tenant) for tenant in each.tenants}]
        for each in topology.work_families
        if each.stream == spec.name
    ]
    return hashlib.sha256(json.dumps([config, lanes], sort_keys=True).encode()).hexdigest()[:16]


def service_of(name: str) -> str:
    """Return the service that the setting `name` names, "" for the default."""
    return "" if name == _UNNAMED else name


@dataclass(frozen=True, slots=True)
class Applier:
    """Who applies: what its streams are stamped with."""

    service: str
    host: str
    version: str
    at: str
    run: str  # of this apply, by which it knows what it created

    @classmethod
    def here(cls, name: str) -> Self:
        """Return this process. `name` is the setting, the name of the service unless it is the default."""
        version = sys.modules[__name__.partition(".")[0]].__version__  # of the package, which imports this module
        at = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(service_of(name), socket.gethostname(), version, at, secrets.token_hex(8))

    def stamp(self, metadata: Mapping[str, str] | None, declaration: str) -> dict[str, str]:
        """Return a stream's metadata with the stamp of this apply in place of the last one."""
        others = {key: value for key, value in (metadata or {}).items() if not key.startswith(PREFIX)}
        values = {
            "config": declaration, "service": self.service, "host": self.host, "version": self.version,
            "at": self.at, "apply": self.run,
        }  # fmt: skip
        return others | {f"{PREFIX}{key}": value for key, value in values.items() if value}

    def made(self, config: Mapping[str, Any]) -> bool:
        """Return whether a stream was created or changed last by this apply."""
        return bool((config.get("metadata") or {}).get(f"{PREFIX}apply") == self.run)


@dataclass(frozen=True, slots=True)
class Applied:
    """Who applied a stream last. `same`: from the declaration that this process has. `at` is of the host's clock.

    `service` is the setting `name`, "" if it was not set.
    """

    stream: str
    service: str
    """Setting `name` of the service that applied; empty: none was set."""
    host: str
    """Host on which apply ran."""
    version: str
    """Version of aiqueue that applied."""
    at: str
    """When the stream was applied, as ISO 8601 in UTC, by the host's clock."""
    same: bool

    @property
    def by(self) -> str:
        """Return who, as a phrase."""
        who = f"{self.service} on {self.host}" if self.service else self.host
        return f"{who} (aiqueue {self.version}, {self.at})"

    def explain(self, service: str, *, lacks_subjects: bool) -> str:
        """Return who applied the stream, which differs now, and what that means for `service`, this one.

        `lacks_subjects`: it differs in nothing but subjects that it lacks.
        """
        if self.same and lacks_subjects:  # those of a stream that all families share are not compared
            return f"last applied by {self.by}; it lacks the subjects of families that are declared here, as new ones"
        if self.same:
            return f"applied as declared here by {self.by}, and changed since by another program"
        if self.service and self.service == service:
            return f"last applied by {self.by}, from an earlier declaration"
        return (
            f"applied from another declaration by {self.by}: where two services apply different ones, each undoes the "
            "other's"
        )


def read_stamp(stream: str, live: Mapping[str, Any], declaration: str) -> Applied | None:
    """Return who applied a live stream last; None: nobody, or a version that left no stamp."""
    found = {key.removeprefix(PREFIX): str(value) for key, value in (live.get("metadata") or {}).items()}
    if "config" not in found:
        return None
    service, host, version, at = (found.get(each, "") for each in ("service", "host", "version", "at"))
    return Applied(stream, service, host, version, at, same=found["config"] == declaration)
