"""The gateway over HTTP, as OpenAI's clients call it. Needs starlette and uvicorn: ``pip install 'aiqueue[gateway]'``.

``build_app(Front.of(client, config, keys))`` is an ASGI application; `aiqueue gateway serve` runs it.
"""

from __future__ import annotations

from .app import build_app
from .context import Front, FrontSettings
from .errors import ApiError
from .serving import listen, reserve, serve, url_of

__all__ = [
    "ApiError", "Front", "FrontSettings", "build_app", "listen", "reserve", "serve", "url_of",
]  # fmt: skip
