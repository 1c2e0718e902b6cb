"""Settings. Arguments take precedence over the environment, then ``aiqueue.toml``, then defaults."""

from __future__ import annotations

import contextlib
import json
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import pydantic_settings

from .errors import SettingsError
from .units import seconds, size_bytes


def _duration(value: Any) -> float:
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return seconds(float(value))  # in the environment, numbers are texts
    return seconds(value)


def _size(value: Any) -> int:
    if isinstance(value, str) and value.isdigit():
        return int(value)  # in the environment, numbers are texts
    return size_bytes(value)


Size = Annotated[int, pydantic.BeforeValidator(_size), pydantic.Field(ge=0)]
Duration = Annotated[float, pydantic.BeforeValidator(_duration), pydantic.Field(gt=0)]
UserPath = Annotated[Path, pydantic.AfterValidator(Path.expanduser)]
FILE = "aiqueue.toml"


class Settings(pydantic_settings.BaseSettings):
    """How to reach the server and which streams to declare on it.

    Each setting is an argument of `connect`, an environment variable ``AIQUEUE_<NAME>`` (for `url` also ``NATS_URL``)
    or a key of ``aiqueue.toml`` in the working directory or the nearest parent. Durations are seconds or "30s".
    Without `url` and `context`, the embedded server of the directory is used.
    """

    model_config = pydantic_settings.SettingsConfigDict(env_prefix="AIQUEUE_", extra="forbid", frozen=True)

    url: str | None = None
    """Server URLs, separated by commas: ``nats://host:4222,nats://other:4222``. ``tls://`` requires TLS."""
    context: str | None = None
    """Name of a nats CLI context that provides URL and credentials."""
    user: str | None = None
    password: pydantic.SecretStr | None = None
    token: pydantic.SecretStr | None = None
    creds: UserPath | None = None
    """Path of a credentials file (JWT and seed). Requires ``aiqueue[nkeys]``."""
    nkey: UserPath | None = None
    """Path of a file with an nkey seed. Requires ``aiqueue[nkeys]``."""
    tls_ca: UserPath | None = None
    tls_cert: UserPath | None = None
    tls_key: UserPath | None = None
    tls_hostname: str | None = None
    tls_handshake_first: bool = False
    inbox_prefix: str | None = None
    """Subject prefix for replies. Default: a random one below ``_INBOX``.

    Set it if the user may subscribe only to its own prefix."""
    name: str = "aiqueue"
    """Name of the connection in the server's monitoring."""
    connect_timeout: Duration = 5.0
    """Timeout of the first connection, in seconds. A lost connection is re-established without a time limit."""
    ping_interval: Duration = 2.0
    """Seconds between pings. After three unanswered pings the connection counts as lost."""
    streams: UserPath | None = None
    """A directory of further stream files (``*.toml``), beside the bundled ones."""
    profile: Literal["single", "cluster"] = "single"
    """Declare streams for one server (``single``) or with three replicas (``cluster``)."""
    claim_check: Size = 256 * 1024
    """Bodies larger than this many bytes are stored as documents. 0: never. At most half of max_payload is used."""
    directory: UserPath | None = None
    """Data directory of the embedded server. Default: ``.aiqueue`` in the working directory or the nearest parent."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[pydantic_settings.BaseSettings],
        init_settings: pydantic_settings.PydanticBaseSettingsSource,
        env_settings: pydantic_settings.PydanticBaseSettingsSource,
        dotenv_settings: pydantic_settings.PydanticBaseSettingsSource,
        file_secret_settings: pydantic_settings.PydanticBaseSettingsSource,
    ) -> tuple[pydantic_settings.PydanticBaseSettingsSource, ...]:
        def source(values: dict[str, Any]) -> pydantic_settings.InitSettingsSource:
            return pydantic_settings.InitSettingsSource(settings_cls, values)

        # no alias of `url`: with an alias, any variable named URL would be read too
        nats_url = {"url": os.environ["NATS_URL"]} if "NATS_URL" in os.environ else {}
        found = find_file()
        return init_settings, env_settings, source(nats_url), source(_read_file(found) if found else {})

    @staticmethod
    def secret(value: str) -> pydantic.SecretStr:
        """Wrap a password, so that it is never printed."""
        return pydantic.SecretStr(value)

    @property
    def servers(self) -> list[str]:
        return [part.strip() for part in (self.url or "").split(",") if part.strip()]

    @property
    def addresses(self) -> str:
        """The server URLs without credentials, for messages."""
        return ", ".join(_without_secret(url) for url in self.servers)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, self.addresses if name == "url" and value else value

    @classmethod
    def load(cls, **arguments: Any) -> Settings:
        """Return the settings in force. Arguments that are None count as not given.

        Raises SettingsError, which names the setting and, for a file, its path.
        """
        given = {name: value for name, value in arguments.items() if value is not None}
        try:
            settings = cls(**given)
        except pydantic.ValidationError as error:
            raise SettingsError(_first_problem(error, given)) from None
        except pydantic_settings.SettingsError as error:
            raise SettingsError(str(error)) from None
        # the source with precedence decides; if both have the same source, the URL does
        by_context = not settings.url or _precedence("context", given) < _precedence("url", given)
        return _with_context(settings) if settings.context and by_context else settings


def find_file(start: Path | None = None) -> Path | None:
    """Return the nearest ``aiqueue.toml`` in `start` (default: the working directory) or its parents."""
    here = (start or Path.cwd()).resolve()
    return next((d / FILE for d in (here, *here.parents) if (d / FILE).is_file()), None)


def _precedence(name: str, given: dict[str, Any]) -> int:
    """Return the source of a setting: 0 an argument, 1 the environment, 2 the file or the default."""
    if name in given:
        return 0
    return 2 if _variable(name) is None else 1


def _variable(name: str) -> str | None:
    """Return the environment variable that sets `name`, None if there is none. AIQUEUE_* ignores case."""
    ours = next((each for each in os.environ if each.lower() == f"aiqueue_{name}"), None)
    return "NATS_URL" if ours is None and name == "url" and "NATS_URL" in os.environ else ours


def _without_secret(url: str) -> str:
    scheme, found, rest = url.rpartition("://")
    return f"{scheme}{found}{rest.rpartition('@')[2]}"


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: {error}") from None
    for name in values:
        if name not in Settings.model_fields:
            raise SettingsError(f"{path}: unknown key {name!r}; known: {', '.join(sorted(Settings.model_fields))}")
    for name in ("creds", "nkey", "tls_ca", "tls_cert", "tls_key", "streams", "directory"):
        if isinstance(values.get(name), str):  # paths in the file are relative to the file
            values[name] = path.parent / Path(values[name]).expanduser()
    return values


def _first_problem(error: pydantic.ValidationError, given: dict[str, Any]) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    name = str(first["loc"][0]) if first["loc"] else "settings"
    if name in given:
        where = f"argument {name}"
    elif variable := _variable(name):
        where = f"environment variable {variable}"
    else:
        where = f"{find_file() or 'settings'}: {name}"
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown setting; known: {', '.join(sorted(Settings.model_fields))}"
    return f"{where}: {first['msg'].removeprefix('Value error, ')}"


def _with_context(settings: Settings) -> Settings:
    """Return `settings` with URL and credentials of their nats CLI context (natscli's JSON file).

    Settings that are given explicitly keep their values. Raises SettingsError.
    """
    root = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "nats" / "context"
    path = root / f"{settings.context}.json"
    try:
        context = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        have = ", ".join(sorted(p.stem for p in root.glob("*.json"))) or "none"
        raise SettingsError(f"there is no nats context {settings.context!r} ({path}); known: {have}") from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: {error}") from None
    if not isinstance(context, dict):
        raise SettingsError(f"{path}: not a nats context: it must be a JSON object")
    names = {"url": "url", "user": "user", "password": "password", "token": "token", "creds": "creds",
             "nkey": "nkey", "ca": "tls_ca", "cert": "tls_cert", "key": "tls_key"}  # fmt: skip
    found = {ours: context[theirs] for theirs, ours in names.items() if context.get(theirs)}
    if "url" not in found:
        raise SettingsError(f"{path}: this nats context has no url")
    explicit = settings.model_dump(exclude_unset=True, exclude={"url"})
    for name in ("creds", "nkey", "tls_ca", "tls_cert", "tls_key"):
        if name in found:
            found[name] = Path(found[name]).expanduser()
    try:
        return Settings(**{**found, **explicit})
    except pydantic.ValidationError as error:
        raise SettingsError(f"{path}: {_first_problem(error, {})}") from None
