"""Calls of ``litellm.completion(model="aiqueue/small", …)`` become requests to the gateway: `register`, once.

LiteLLM's Router and proxy can use it, too: `provider` is what the proxy's ``custom_provider_map`` names. litellm is not
imported before either of them is used.
"""

from __future__ import annotations

import importlib.util
import threading
from typing import TYPE_CHECKING, Any, Final

from ..errors import BadInput
from .config import GatewayConfig

if TYPE_CHECKING:
    from .litellm_custom import GatewayLLM

    provider: GatewayLLM

PROVIDER: Final = "aiqueue"  # what stands before the slash in a model's name
_lock = threading.Lock()
_made: list[GatewayLLM] = []


def register(
    *, tenant: str | None = None, priority: str = "normal", config: GatewayConfig | None = None, **connection: Any
) -> GatewayLLM:
    """Let litellm call the gateway's models as ``aiqueue/<model>``. Registered again, it replaces the former one.

    - `tenant`: whose requests those are that come without an API key, ``api_key="aiq-…"``. None: such are refused.
    - `priority`: of requests whose header `priority` (``extra_headers``) says no other.
    - `config`: None: that of gateway.toml, see `load`. Keys of providers are needed by the workers only.
    - `connection`: as for `aiqueue.connect`. It is opened at the first call, in each process.

    Returns the provider, whose `close` disconnects. Raises BadInput if litellm is not installed.
    """
    made = _make(tenant=tenant, priority=priority, config=config, connection=connection)
    import litellm  # noqa: PLC0415
    from litellm.utils import custom_llm_setup  # noqa: PLC0415

    others = [each for each in litellm.custom_provider_map if each["provider"] != PROVIDER]
    litellm.custom_provider_map = [*others, {"provider": PROVIDER, "custom_handler": made}]
    custom_llm_setup()
    return made


def _make(**options: Any) -> GatewayLLM:
    if importlib.util.find_spec("litellm") is None:
        raise BadInput("aiqueue.gateway needs litellm: pip install 'aiqueue[gateway]'")
    from .litellm_custom import GatewayLLM  # noqa: PLC0415

    return GatewayLLM(**options)


def __getattr__(name: str) -> Any:
    """Make `provider` when it is first asked for: with the settings of the environment, and for API keys only."""
    if name != "provider":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _lock:
        if not _made:
            _made.append(_make(tenant=None, priority="normal", config=None, connection={}))
        return _made[0]
