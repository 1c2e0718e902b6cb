"""The setting `url`: server URLs, separated by commas, and the credentials in them."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import unquote

import pydantic

SCHEMES = ("nats", "tls", "ws", "wss")
_SERVER = re.compile(
    r"(?:(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://)?"
    r"(?:(?P<user>[^\s:/?#]*)(?P<password>:[^\s/?#]*)?@)?"
    r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[^\s/?#@:\[\],]+)(?::(?P<port>[0-9]*))?(?P<path>/[^\s?#]*)?"
)


class Credentials(NamedTuple):
    """What a client sends to a server: a user and a password, or a token, or nothing of both."""

    user: str | None
    password: pydantic.SecretStr | None
    token: pydantic.SecretStr | None


class ServerUrl(NamedTuple):
    """One server of the setting `url`: its URL without credentials, and the credentials, if there are any, decoded."""

    address: str
    credentials: Credentials | None


def parse_urls(url: str) -> list[ServerUrl]:
    """Return the servers of the setting `url`. Raises ValueError, whose text repeats nothing of `url` but a scheme."""
    servers: list[ServerUrl] = []
    scheme_first = True
    parts = [part.strip() for part in url.split(",") if part.strip()]
    for number, part in enumerate(parts, 1):
        which = f"server {number}: " if len(parts) > 1 else ""
        found = _SERVER.fullmatch(part)
        if found is None or not 0 < int(found["port"] or 4222) < 65_536:
            raise ValueError(
                f"{which}not a server's URL: write nats://user:password@host:port and separate several by commas; "
                "encode special characters in user and password: %40 for @, %2C for a comma, %2F for /"
            )
        scheme = (found["scheme"] or "nats").lower()
        if scheme not in SCHEMES:
            raise ValueError(f"{which}not an address of NATS ({scheme}://): use {'://, '.join(SCHEMES)}://")
        path = "" if found["path"] in (None, "/") else found["path"]
        if path and not scheme.startswith("ws"):
            raise ValueError(f"{which}a server's URL has no path: write {scheme}://host:port")
        credentials = None
        if found["user"] is not None:
            user, password = unquote(found["user"]), found["password"]
            if password:
                credentials = Credentials(user, pydantic.SecretStr(unquote(password[1:])), None)
            else:
                credentials = Credentials(None, None, pydantic.SecretStr(user))
            # an unencoded comma in a password cuts the URL in two, the second part with an @ and without a scheme
            if servers and (servers[0].credentials is None or (scheme_first and not found["scheme"])):
                raise ValueError(
                    f"{which}this URL has credentials and the first URL has none: move them to the first URL. A comma "
                    "separates URLs: write %2C for a comma in a password"
                )
        if not servers:
            scheme_first = bool(found["scheme"])
        port = f":{found['port']}" if found["port"] else "" if scheme.startswith("ws") else ":4222"
        servers.append(ServerUrl(f"{scheme}://{found['host']}{port}{path}", credentials))
    return servers
