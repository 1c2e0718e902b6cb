"""Which class calls a provider, imported when it is needed."""

from __future__ import annotations

from ..errors import BadInput
from .config import ProviderConfig
from .providers import Provider


def open_provider(config: ProviderConfig) -> Provider:
    """Return what calls the models of this provider, in the running event loop. Close it with `close`.

    Raises BadInput if the key is missing, or if the package that it needs is not installed.
    """
    try:
        if config.kind == "litellm":
            from .litellm_provider import LitellmProvider  # noqa: PLC0415

            return LitellmProvider(config)
        from .http_provider import HttpProvider  # noqa: PLC0415

        return HttpProvider(config)
    except ModuleNotFoundError as error:
        raise BadInput(f"aiqueue.gateway needs {error.name}: pip install 'aiqueue[gateway]'") from None
