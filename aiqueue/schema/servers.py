"""The servers of a document: where they are, and which credentials they want, without any secret."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from ..config import Settings

# AsyncAPI's names for what NATS asks for
_SCHEMES: dict[str, dict[str, str]] = {
    "credentials": {
        "type": "asymmetricEncryption",
        "description": "A credentials file of NATS (a JWT and its nkey), or an nkey.",
    },
    "token": {"type": "apiKey", "in": "password", "description": "A token of NATS."},
    "password": {"type": "userPassword", "description": "A user and a password."},
}


def describe_servers(settings: Settings) -> dict[str, Any]:
    """Return the servers of AsyncAPI for the URLs that the settings name. Empty for the embedded server, whose address
    is another one at each start.
    """
    urls = settings.servers
    security = [_SCHEMES[each]] if (each := _credentials(settings)) else []
    return {
        "server" if len(urls) == 1 else f"server-{number}": _describe(url, security)
        for number, url in enumerate(urls, 1)
    }


def _describe(url: str, security: list[dict[str, str]]) -> dict[str, Any]:
    parts = urlsplit(url)
    found: dict[str, Any] = {"host": parts.netloc, "protocol": "nats" if parts.scheme == "tls" else parts.scheme}
    if parts.path:
        found["pathname"] = parts.path
    if parts.scheme == "tls":
        found["description"] = "Requires TLS."
    return {**found, "security": security} if security else found


def _credentials(settings: Settings) -> str:
    """Return which credentials a client needs, as far as the settings tell; "" for none."""
    if settings.creds or settings.nkey:
        return "credentials"
    in_url = [each for each in settings.url_credentials.values() if each]
    if settings.token or any(each.token for each in in_url):
        return "token"
    return "password" if settings.user or any(each.user for each in in_url) else ""
