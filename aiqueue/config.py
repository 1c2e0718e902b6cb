"""Settings: arguments over environment over ``aiqueue.toml`` over defaults."""

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
            return seconds(float(value))  # the environment has numbers as text only
    return seconds(value)


def _size(value: Any) -> int:
    if isinstance(value, str) and value.isdigit():
        return int(value)  # the environment has numbers as text only
    return size_bytes(value)


Size = Annotated[int, pydantic.BeforeValidator(_size), pydantic.Field(ge=0)]
Duration = Annotated[float, pydantic.BeforeValidator(_duration), pydantic.Field(gt=0)]
UserPath = Annotated[Path, pydantic.AfterValidator(Path.expanduser)]
FILE = "aiqueue.toml"


class Settings(pydantic_settings.BaseSettings):
    """How to reach the server and what to declare on it.

    Each can be an argument of `connect`, an environment variable ``AIQUEUE_<NAME>`` (the server's address also
    ``NATS_URL``) or a key of the nearest ``aiqueue.toml`` upwards. Durations are seconds or "30s". Without `url` and
    `context` the directory's embedded server is used.
    """

    model_config = pydantic_settings.SettingsConfigDict(env_prefix="AIQUEUE_", extra="forbid", frozen=True)

    url: str | None = None
    """Addresses, separated by commas: ``nats://host:4222,nats://other:4222``; ``tls://`` demands TLS."""
    context: str | None = None
    """The name of a context of the nats command line tool, to take address and credentials from."""
    user: str | None = None
    password: pydantic.SecretStr | None = None
    token: pydantic.SecretStr | None = None
    creds: UserPath | None = None
    """A credentials file (JWT and seed); needs ``aiqueue[nkeys]``."""
    nkey: UserPath | None = None
    """A file with an nkey seed; needs ``aiqueue[nkeys]``."""
    tls_ca: UserPath | None = None
    tls_cert: UserPath | None = None
    tls_key: UserPath | None = None
    tls_hostname: str | None = None
    tls_handshake_first: bool = False
    inbox_prefix: str | None = None
    """Where answers come in; default a random one below ``_INBOX``.

    Set it where a user may subscribe only to his own."""
    name: str = "aiqueue"
    """The connection's name, as the server's monitoring shows it."""
    connect_timeout: Duration = 5.0
    """Seconds until a first connection must stand. A lost one is sought again without end."""
    ping_interval: Duration = 2.0
    """Seconds between pings; a peer that misses three is given up."""
    streams: UserPath | None = None
    """A directory with more ``*.toml`` streams, beside the bundled ones."""
    profile: Literal["single", "cluster"] = "single"
    claim_check: Size = 256 * 1024
    """Bodies above this many bytes (at most half of the server's max_payload) are stored as documents; 0: none."""
    directory: UserPath | None = None
    """Where the embedded server lives; default ``.aiqueue`` of the nearest ancestor that has one."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[pydantic_settings.BaseSettings],
        init_settings: pydantic_settings.PydanticBaseSettingsSource,
        env_settings: pydantic_settings.PydanticBaseSettingsSource,
        dotenv_settings: pydantic_settings.PydanticBaseSettingsSource,
        file_secret_settings: pydantic_settings.PydanticBaseSettingsSource,
    ) -> tuple[pydantic_settings.PydanticBaseSettingsSource, ...]:
        def told(values: dict[str, Any]) -> pydantic_settings.InitSettingsSource:
            return pydantic_settings.InitSettingsSource(settings_cls, values)

        # not an alias of `url`: with one, any variable named URL would be taken too
        customary = {"url": os.environ["NATS_URL"]} if "NATS_URL" in os.environ else {}
        found = find_file()
        return init_settings, env_settings, told(customary), told(_read_file(found) if found else {})

    @staticmethod
    def secret(value: str) -> pydantic.SecretStr:
        """`value` as the settings keep passwords: never shown."""
        return pydantic.SecretStr(value)

    @property
    def servers(self) -> list[str]:
        return [part.strip() for part in (self.url or "").split(",") if part.strip()]

    @property
    def addresses(self) -> str:
        """The servers as texts may show them, without credentials."""
        return ", ".join(_without_secret(url) for url in self.servers)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, self.addresses if name == "url" and value else value

    @classmethod
    def load(cls, **arguments: Any) -> Settings:
        """The settings in force; arguments that are None count as not given.

        Raises SettingsError naming the setting and, for a file, its path.
        """
        given = {name: value for name, value in arguments.items() if value is not None}
        try:
            settings = cls(**given)
        except pydantic.ValidationError as error:
            raise SettingsError(_first_problem(error, given)) from None
        except pydantic_settings.SettingsError as error:
            raise SettingsError(str(error)) from None
        # the nearer of the two decides; side by side, the plain address
        by_context = settings.context and (not settings.url or _distance("context", given) < _distance("url", given))
        return _with_context(settings) if by_context else settings


def find_file(start: Path | None = None) -> Path | None:
    """The nearest ``aiqueue.toml`` from `start` (default: the working directory) upwards."""
    here = (start or Path.cwd()).resolve()
    return next((d / FILE for d in (here, *here.parents) if (d / FILE).is_file()), None)


def _distance(name: str, given: dict[str, Any]) -> int:
    """Where a setting comes from: 0 an argument, 1 the environment, 2 the file or the default."""
    if name in given:
        return 0
    return 2 if _variable(name) is None else 1


def _variable(name: str) -> str | None:
    """The environment variable that sets `name`, None if there is none. Ours are read in either case."""
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
        if isinstance(values.get(name), str):  # a file's paths are relative to the file
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
        where = f"{find_file() or 'setting'}: {name}"
    if first["type"] == "extra_forbidden":
        return f"{where}: no such setting; known: {', '.join(sorted(Settings.model_fields))}"
    return f"{where}: {first['msg'].removeprefix('Value error, ')}"


def _with_context(settings: Settings) -> Settings:
    """Fill in what a context of the nats command line tool says (its file format: natscli's, JSON)."""
    root = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "nats" / "context"
    path = root / f"{settings.context}.json"
    try:
        told = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        have = ", ".join(sorted(p.stem for p in root.glob("*.json"))) or "none"
        raise SettingsError(f"there is no nats context {settings.context!r} ({path}); known: {have}") from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: {error}") from None
    if not isinstance(told, dict):
        raise SettingsError(f"{path}: not a nats context")
    names = {"url": "url", "user": "user", "password": "password", "token": "token", "creds": "creds",
             "nkey": "nkey", "ca": "tls_ca", "cert": "tls_cert", "key": "tls_key"}  # fmt: skip
    found = {ours: told[theirs] for theirs, ours in names.items() if told.get(theirs)}
    if "url" not in found:
        raise SettingsError(f"{path}: has no url")
    explicit = settings.model_dump(exclude_unset=True, exclude={"url"})
    for name in ("creds", "nkey", "tls_ca", "tls_cert", "tls_key"):
        if name in found:
            found[name] = Path(found[name]).expanduser()
    try:
        return Settings(**{**found, **explicit})
    except pydantic.ValidationError as error:
        raise SettingsError(f"{path}: {_first_problem(error, {})}") from None
