"""Settings: arguments over environment over ``aiqueue.toml`` over defaults."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import pydantic_settings

from .errors import SettingsError
from .units import seconds

Duration = Annotated[float, pydantic.BeforeValidator(seconds)]
FILE = "aiqueue.toml"


class Settings(pydantic_settings.BaseSettings):
    """How to reach the server and what to declare on it.

    Each can be an argument of `connect`, an environment variable ``AIQUEUE_<NAME>`` (the server's address also
    ``NATS_URL``) or a key of the nearest ``aiqueue.toml`` upwards. Durations are seconds or "30s". Without `url` and
    `context` the directory's embedded server is used.
    """

    model_config = pydantic_settings.SettingsConfigDict(env_prefix="AIQUEUE_", extra="forbid", frozen=True)

    url: Annotated[
        str | None, pydantic.Field(validation_alias=pydantic.AliasChoices("url", "AIQUEUE_URL", "NATS_URL"))
    ] = None
    """Addresses, separated by commas: ``nats://host:4222,nats://other:4222``; ``tls://`` demands TLS."""
    context: str | None = None
    """The name of a context of the nats command line tool, to take address and credentials from."""
    user: str | None = None
    password: pydantic.SecretStr | None = None
    token: pydantic.SecretStr | None = None
    creds: Path | None = None
    """A credentials file (JWT and seed); needs ``aiqueue[nkeys]``."""
    nkey: Path | None = None
    """A file with an nkey seed; needs ``aiqueue[nkeys]``."""
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
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
    streams: Path | None = None
    """A directory with more ``*.toml`` streams, beside the bundled ones."""
    profile: Literal["single", "cluster"] = "single"
    directory: Path | None = None
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
        found = find_file()
        from_file = pydantic_settings.InitSettingsSource(settings_cls, _read_file(found) if found else {})
        return init_settings, env_settings, from_file

    @staticmethod
    def secret(value: str) -> pydantic.SecretStr:
        """`value` as the settings keep passwords: never shown."""
        return pydantic.SecretStr(value)

    @property
    def servers(self) -> list[str]:
        return [part.strip() for part in (self.url or "").split(",") if part.strip()]

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
        by_context = settings.context and "url" not in given and ("context" in given or not settings.url)
        return _with_context(settings) if by_context else settings


def find_file(start: Path | None = None) -> Path | None:
    """The nearest ``aiqueue.toml`` from `start` (default: the working directory) upwards."""
    here = (start or Path.cwd()).resolve()
    return next((d / FILE for d in (here, *here.parents) if (d / FILE).is_file()), None)


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
    lower = name.lower().removeprefix("aiqueue_")
    variable = "NATS_URL" if name == "NATS_URL" else f"AIQUEUE_{lower.upper()}"
    if lower in given or name in given:
        where = f"argument {lower}"
    elif variable in os.environ:
        where = f"environment variable {variable}"
    else:
        where = f"{find_file() or 'setting'}: {lower}"
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
