"""What all routes of the front share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ..api_key_store import ApiKey
from ..api_keys import ApiKeys
from ..batches import BatchQuotas
from ..client import Gateway
from ..config import GatewayConfig, ModelConfig

if TYPE_CHECKING:
    from ...client import Client

MIB: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class FrontSettings:
    """Bounds of the front. Times in seconds.

    - `body_bytes_max`: of a request's body; a larger one is refused with 413. `bodies_bytes_max`: of all bodies that
      this process holds at once; above it, requests are refused with 503, to be sent again.
    - `body_s`: how long a body may take; then 408.
    - `status_s`: how long a stream waits for its first chunk before its status is sent; an error after that is an event
      of the stream.
    - `ping_s`: after which silence a stream gets a comment, so that proxies keep it open.
    - `store_s`: how long a request may take to be stored, while the server is away; then 503.
    - `answer_s`: how long a request waits for its answer; then 504, and the request goes on.
    - `file_s`: how long the body of a file may take. `uploads_max`: files that this process receives at once. They lie
      in the directory for temporary files meanwhile. One tenant has half of this, and of `bodies_bytes_max`, at most.
      `quotas`: of files and batches.
    """

    body_bytes_max: int = 20 * MIB
    bodies_bytes_max: int = 256 * MIB
    body_s: float = 60.0
    status_s: float = 20.0
    ping_s: float = 15.0
    store_s: float = 10.0
    answer_s: float = 3_600.0
    file_s: float = 900.0
    uploads_max: int = 8
    quotas: BatchQuotas = field(default_factory=BatchQuotas)


class Shares:
    """How much of something tenants hold at once: together at most `most`, and each of them half of that, or `least`.
    Otherwise a tenant that sends slowly would keep all others out.
    """

    def __init__(self, most: int, least: int) -> None:
        self._most, self._share = most, max(most // 2, least)
        self._held: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self._held.total()

    def take(self, tenant: str, amount: int) -> bool:
        """Return whether there is room for so much more, which is held then."""
        if self.total + amount > self._most or self._held[tenant] + amount > self._share:
            return False
        self._held[tenant] += amount
        return True

    def give_back(self, tenant: str, amount: int) -> None:
        self._held[tenant] -= amount
        if not self._held[tenant]:
            del self._held[tenant]


@dataclass(slots=True)
class Front:
    """What all routes share: an open client, the gateway on it, gateway.toml, and the API keys, which were started.
    `bodies`: bytes of the bodies that are held now. `uploads`: files that are received now. `is_draining`: new requests
    go elsewhere, see `/readyz`.
    """

    client: Client
    gateway: Gateway
    config: GatewayConfig
    keys: ApiKeys
    settings: FrontSettings = field(default_factory=FrontSettings)
    bodies: Shares = field(init=False)
    uploads: Shares = field(init=False)
    is_draining: bool = False

    def __post_init__(self) -> None:
        settings = self.settings
        self.bodies = Shares(settings.bodies_bytes_max, settings.body_bytes_max)
        self.uploads = Shares(settings.uploads_max, 1)

    @classmethod
    def of(cls, client: Client, config: GatewayConfig, keys: ApiKeys, settings: FrontSettings | None = None) -> Front:
        """Return the front of an open client. Only the workers need the keys of providers."""
        gateway = Gateway(client, config, needs_keys=False)
        return cls(client, gateway, config, keys, settings or FrontSettings())

    def use(self, config: GatewayConfig) -> None:
        """Use this configuration from the next request on."""
        self.gateway = Gateway(self.client, config, needs_keys=False)
        self.config = config

    def models_of(self, key: ApiKey) -> Mapping[str, ModelConfig]:
        """Return the models that a key may call, by name."""
        return {name: model for name, model in self.config.models.items() if key.allows(name)}
