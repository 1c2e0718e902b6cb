"""Settings. Arguments take precedence over the environment, then ``aiqueue.toml``, then defaults."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, Unpack

import pydantic

from . import units
from .errors import SettingsError
from .server_urls import Credentials, parse_urls
from .units import module_of_path, seconds, size_bytes


def _duration(value: Any) -> float:
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return seconds(float(value))  # in the environment, numbers are texts
    return seconds(value)


def _size(value: Any) -> int:
    if isinstance(value, str) and value.isdigit():
        return int(value)  # in the environment, numbers are texts
    return size_bytes(value)


def _names(value: Any) -> Any:
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",")]  # in the environment, a list is a text
    if not isinstance(value, list | tuple | None) or not all(isinstance(each, str) and each for each in value or ()):
        raise ValueError("must be a list of families, such as agent.tasks, in the environment separated by commas")
    return None if value is None else tuple(dict.fromkeys(value))


def _tables(value: Any) -> Any:
    if isinstance(value, str):
        try:  # in the environment, tables are a text
            value = json.loads(value) if value.lstrip().startswith("{") else tomllib.loads(value)
        except ValueError as error:
            raise ValueError(f"must be TOML such as dead.stream.max_age = '7d', or JSON: {error}") from None
    if not isinstance(value, Mapping):
        raise ValueError("must be tables by family or role, such as [overlay.dead]")
    return dict(value)


GENERATION_MAX = 2**53
Size = Annotated[int, pydantic.BeforeValidator(_size), pydantic.Field(ge=0)]
Duration = Annotated[float, pydantic.BeforeValidator(_duration), pydantic.Field(gt=0)]
Generation = Annotated[int, pydantic.Field(ge=0, le=GENERATION_MAX)]
FILE = "aiqueue.toml"
NONE = "none"  # in the environment: a setting that may be left out, whatever the file says

Redact = Callable[[str, str, dict[str, Any]], Any]
_FUNCTION = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*")
_INBOX_PREFIX = re.compile(r"(?=.{1,200}\Z)[^\s.*>]+(?:\.[^\s.*>]+)*")


def _check_url(url: Any) -> Any:
    if isinstance(url, Settings):
        raise ValueError("is the address of a server: pass settings as settings=")
    if isinstance(url, str) and not parse_urls(url):
        raise ValueError("is empty: set it to a server's URL, or leave it out to use the directory's embedded server")
    return url


def _check_path(path: Any) -> Any:
    if path == "":  # as a path this is the working directory
        raise ValueError("is empty: set it to a path, or leave it out")
    return path


UserPath = Annotated[Path, pydantic.BeforeValidator(_check_path), pydantic.AfterValidator(Path.expanduser)]


def _check_inbox_prefix(prefix: str | None) -> str | None:
    if prefix and not (_INBOX_PREFIX.fullmatch(prefix) and prefix.isprintable()):
        raise ValueError(
            "must be tokens without spaces and wildcards, joined by dots, in at most 200 characters: _INBOX.mine"
        )
    return prefix


def _check_redact(redact: Any) -> Any:
    if redact is None or callable(redact) or (isinstance(redact, str) and _FUNCTION.fullmatch(redact)):
        return redact
    module, _, name = redact.partition(":") if isinstance(redact, str) else ("", "", "")
    example = f"{found}:{name or 'redact'}" if (found := module_of_path(module)) else "app.privacy:redact"
    raise ValueError(f'must be a function, or its name such as "{example}"')


class SettingsOptions(TypedDict, total=False):
    """The settings as arguments of `connect` and `Settings`, but for `url`. None counts as not given."""

    context: str | None
    user: str | None
    password: str | pydantic.SecretStr | None
    token: str | pydantic.SecretStr | None
    creds: str | Path | None
    nkey: str | Path | None
    tls_ca: str | Path | None
    tls_cert: str | Path | None
    tls_key: str | Path | None
    tls_hostname: str | None
    tls_handshake_first: bool | None
    inbox_prefix: str | None
    name: str | None
    connect_timeout: units.Duration | None
    ping_interval: units.Duration | None
    streams: str | Path | None
    profile: Literal["single", "cluster"] | None
    size: Literal["small", "medium", "large"] | None
    families: Sequence[str] | None
    overlay: Mapping[str, Any] | None
    claim_check: int | str | None
    generation: int | None
    directory: str | Path | None
    embedded: Literal["auto", "never"] | None
    redact: str | Redact | None
    traces: Literal["auto", "otlp", "off"] | None
    trace_ratio: float | None
    metrics: bool | None


class Settings(pydantic.BaseModel):
    """How to reach the server and which streams to declare on it.

    Each setting is an argument of `connect`, an environment variable ``AIQUEUE_<NAME>`` (for `url` also ``NATS_URL``)
    or a key of ``aiqueue.toml`` in the working directory or the nearest parent. Durations are seconds or "30s".
    Without `url` and `context`, the embedded server of the directory is used.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    url: Annotated[str | None, pydantic.BeforeValidator(_check_url)] = None
    """Server URLs, separated by commas: ``nats://host:4222,nats://other:4222``. ``tls://`` requires TLS.

    The first URL may contain credentials, ``user:password@`` or ``token@``, special characters encoded as in ``%40``.
    They are used for all servers, those that the cluster announces included, except for a URL with its own."""
    context: str | None = None
    """Name of a nats CLI context that provides URL, credentials, TLS settings and inbox prefix."""
    user: str | None = None
    """Name of the user, with `password`. Default: what the URL says."""
    password: pydantic.SecretStr | None = None
    """Password of `user`. It is never printed."""
    token: pydantic.SecretStr | None = None
    """Authentication token, instead of a user. It is never printed."""
    creds: UserPath | None = None
    """Path of a credentials file (JWT and seed). Requires ``aiqueue[nkeys]``."""
    nkey: UserPath | None = None
    """Path of a file with an nkey seed. Requires ``aiqueue[nkeys]``."""
    tls_ca: UserPath | None = None
    """Path of a PEM file with the CAs to trust, instead of the system's. It turns TLS on."""
    tls_cert: UserPath | None = None
    """Path of a PEM file with this client's certificate, for mutual TLS. It turns TLS on."""
    tls_key: UserPath | None = None
    """Path of the private key of `tls_cert`."""
    tls_hostname: str | None = None
    """Name to check the server's certificate against. Default: the host in the URL."""
    tls_handshake_first: bool = False
    """Start TLS before the server's greeting, as its own setting handshake_first requires."""
    inbox_prefix: Annotated[str | None, pydantic.AfterValidator(_check_inbox_prefix)] = None
    """Subject prefix for replies. Default: a random one below ``_INBOX``.

    Set it if the user may subscribe only to its own prefix."""
    name: str = "aiqueue"
    """Name of the connection in the server's monitoring, and of the service in the stamps of `apply`."""
    connect_timeout: Duration = 5.0
    """Timeout of the first connection. A lost connection is re-established without a time limit."""
    ping_interval: Duration = 2.0
    """Time between pings. After three unanswered pings the connection counts as lost, and is made again."""
    streams: UserPath | None = None
    """A directory of further stream files (``*.toml``), beside the bundled ones."""
    profile: Literal["single", "cluster"] = "single"
    """Declare streams for one server (``single``) or with three replicas (``cluster``)."""
    size: Literal["small", "medium", "large"] = "medium"
    """How large the streams may grow: ``small`` fits a server with 1 GB of storage. `aiqueue plan` shows the sum."""
    families: Annotated[tuple[str, ...] | None, pydantic.BeforeValidator(_names)] = None
    """The families that are declared, optional ones too. Default: all bundled ones, and those in `streams`."""
    overlay: Annotated[dict[str, Any], pydantic.BeforeValidator(_tables)] = {}
    """Tables whose keys replace those of stream files, by family, or by role for streams of no family.

    In the environment it is TOML, such as ``dead.stream.max_age = "7d"``, or a JSON object."""
    claim_check: Size = 256 * 1024
    """Bodies above this size are stored as documents. 0: never. At most half of the server's max_payload counts."""
    generation: Generation = 0
    """Of this deployment: of versions of a worker that declare a schedule, the one with the greatest decides.

    ``Worker(generation=...)`` takes precedence."""
    directory: UserPath | None = None
    """Data directory of the embedded server. Default: ``.aiqueue`` in the working directory or the nearest parent."""
    embedded: Literal["auto", "never"] = "auto"
    """Whether the directory's embedded server may be used where no server address is set.

    ``auto``: yes, but it is not started in a container unless `directory` is set. ``never``: an address is required."""
    redact: Annotated[str | Redact | None, pydantic.BeforeValidator(_check_redact)] = None
    """A function of family, kind and data of a message, or its name ``MODULE:FUNCTION``. Lists show what it returns."""
    traces: Literal["auto", "otlp", "off"] = "auto"
    """Where spans go: to the program's provider of tracers, if it has set one (``auto``), by OTLP, or nowhere."""
    trace_ratio: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.01
    """Share of the jobs that begin a trace, among those that are part of none: 0 is none, 1 is all."""
    metrics: bool = True
    """Whether workers count what becomes of jobs, for `aiqueue history` and `aiqueue metrics`."""
    _sources: dict[str, str] = pydantic.PrivateAttr(default_factory=dict)
    _file: str = pydantic.PrivateAttr(default="")

    def __init__(self, *, url: str | None = None, **arguments: Unpack[SettingsOptions]) -> None:
        """Return the settings in force. An argument that is None counts as not given.

        Raises pydantic.ValidationError; `load` raises SettingsError instead, which says where a setting is set.
        """
        found, variables = find_file(), _read_environment()
        in_file = _read_file(found) if found else {}
        stated = {name: value for name, value in {"url": url, **arguments}.items() if value is not None}
        super().__init__(**{**in_file, **variables, **stated})
        names = _variables() if variables else {}
        self._file = str(found)
        self._sources = (
            dict.fromkeys(in_file, self._file)
            | {name: f"environment variable {names[name]}" for name in variables}
            | {name: f"argument {name}" for name in stated}
        )

    @staticmethod
    def secret(value: str) -> pydantic.SecretStr:
        """Wrap a password, so that it is never printed."""
        return pydantic.SecretStr(value)

    def to_plain(self) -> dict[str, Any]:
        """Return the settings as plain data, with their secrets: for the pipe to another process, and nothing else."""
        plain: dict[str, Any] = {}
        for name, value in self:
            if isinstance(value, pydantic.SecretStr):
                plain[name] = value.get_secret_value()
            elif isinstance(value, tuple):
                plain[name] = list(value)
            elif callable(value):
                plain[name] = None  # the hook of a process that lists jobs
            else:
                plain[name] = str(value.absolute()) if isinstance(value, Path) else value
        return plain

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> Settings:
        """Return the settings that `to_plain` was called on. Neither the environment nor a file adds to them."""
        settings = cls.__new__(cls)
        pydantic.BaseModel.__init__(settings, **plain)
        return settings

    @property
    def servers(self) -> list[str]:
        """The server URLs, without credentials."""
        return [each.address for each in parse_urls(self.url or "")]

    @property
    def url_credentials(self) -> dict[str, Credentials]:
        """The credentials in `url`, by server as in `servers`. The first are also those of servers without any."""
        return {each.address: each.credentials for each in parse_urls(self.url or "") if each.credentials}

    def source(self, name: str) -> str:
        """Where a setting was taken from, such as "environment variable NATS_URL"; "default" if nowhere."""
        return self._sources.get(name, "default")

    def place(self, name: str) -> tuple[str, str]:
        """Return where a setting is stated, as the file and the key of a TopologyError."""
        source = self._sources.get(name, f"setting {name}")
        return source, name if source == self._file else ""

    def with_arguments(self, **values: Any) -> Settings:
        """Return a copy with these values, which are not checked, as if they had been passed as arguments."""
        changed = self.model_copy(update=values)
        changed._sources = self._sources | {name: f"argument {name}" for name in values}
        return changed

    @property
    def addresses(self) -> str:
        """The server URLs without credentials, for messages."""
        return ", ".join(self.servers)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, self.addresses if name == "url" and value else value

    @classmethod
    def load(cls, *, url: str | None = None, **arguments: Unpack[SettingsOptions]) -> Settings:
        """Return the settings in force. An argument that is None counts as not given.

        Raises SettingsError, which names the setting and, for a file, its path.
        """
        given = {name: value for name, value in {"url": url, **arguments}.items() if value is not None}
        try:
            settings = cls(url=url, **arguments)
        except pydantic.ValidationError as error:
            raise SettingsError(_first_problem(error, given)) from None
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
    return 1 if name in _variables() else 2


def _variables() -> dict[str, str]:
    """Return the environment variables that set something, by the setting's name. AIQUEUE_* ignores case."""
    found: dict[str, str] = {}
    for each in os.environ:
        prefix, underscore, name = each.lower().partition("_")
        if prefix == "aiqueue" and underscore:
            found.setdefault(name, each)
    if "NATS_URL" in os.environ:
        found.setdefault("url", "NATS_URL")
    return found


def _read_environment() -> dict[str, str | None]:
    """Return the settings in the environment. None: what the file says is taken away."""
    found: dict[str, str | None] = {}
    for name, variable in _variables().items():
        if (field := Settings.model_fields.get(name)) is not None:
            text = os.environ[variable]
            found[name] = None if text == NONE and field.default is None and name != "url" else text
    return found


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: {error}") from None
    for name in values:
        if name not in Settings.model_fields:
            raise SettingsError(f"{path}: unknown key {name!r}; {_hint(name)}")
    for name in ("creds", "nkey", "tls_ca", "tls_cert", "tls_key", "streams", "directory"):
        if isinstance(values.get(name), str) and values[name]:  # paths in the file are relative to the file
            values[name] = path.parent / Path(values[name]).expanduser()
    return values


def _hint(name: str) -> str:
    close = difflib.get_close_matches(name, Settings.model_fields, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(Settings.model_fields))}"


def _first_problem(error: pydantic.ValidationError, given: dict[str, Any], *, file: Path | None = None) -> str:
    """Return the first of the invalid settings, and where it is set: `given` as an argument, or `file`, if any."""
    first = error.errors(include_url=False, include_input=False)[0]
    name = str(first["loc"][0]) if first["loc"] else "settings"
    if file is not None:
        where = f"{file}: {name}"
    elif name in given:
        where = f"argument {name}"
    elif variable := _variables().get(name):
        where = f"environment variable {variable}"
    else:
        where = f"{find_file() or 'settings'}: {name}"
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown setting; {_hint(name)}"
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
    unsupported = [
        key
        for key, value in context.items()
        if value and key not in _CONTEXT_KEYS and (key, value) != ("jetstream_api_prefix", "$JS.API")
    ]
    if unsupported:
        raise SettingsError(_unsupported_in_context(path, unsupported))
    found = {ours: context[theirs] for theirs, ours in _CONTEXT_KEYS.items() if ours and context.get(theirs)}
    if "url" not in found:
        raise SettingsError(f"{path}: this nats context has no url")
    explicit = settings.model_dump(exclude_unset=True, exclude={"url"})
    for name in ("creds", "nkey", "tls_ca", "tls_cert", "tls_key"):
        if isinstance(found.get(name), str):
            found[name] = Path(found[name]).expanduser()
    try:
        complete = Settings(**{**found, **explicit})
    except pydantic.ValidationError as error:
        raise SettingsError(_first_problem(error, {}, file=path)) from None
    complete._sources.update(dict.fromkeys(found, f"nats context {settings.context}") | settings._sources)
    complete._sources["url"] = f"nats context {settings.context}"
    return complete


# the keys of natscli's contexts that aiqueue heeds, and the settings they become; empty: they change no connection
_CONTEXT_KEYS = {
    "url": "url", "user": "user", "password": "password", "token": "token", "creds": "creds", "nkey": "nkey",
    "ca": "tls_ca", "cert": "tls_cert", "key": "tls_key", "tls_first": "tls_handshake_first",
    "inbox_prefix": "inbox_prefix", "name": "", "description": "", "color_scheme": "",
}  # fmt: skip
_CONTEXT_ADVICE = {
    "jetstream_domain": "aiqueue uses the JetStream of the server it connects to; set url to a server of the domain",
    "jetstream_api_prefix": "aiqueue calls the JetStream API as $JS.API; connect with a user of the streams' account",
    "user_jwt": "write JWT and seed into a credentials file, and set creds",
    "user_seed": "write JWT and seed into a credentials file, and set creds",
    "nsc": "export the user with `nsc generate creds`, and set creds",
}


def _unsupported_in_context(path: Path, keys: list[str]) -> str:
    """Return the error for a nats context with `keys` that would be ignored."""
    advice = next((_CONTEXT_ADVICE[key] for key in keys if key in _CONTEXT_ADVICE), "make a context without")
    return f"{path}: aiqueue does not support {', '.join(keys)} of a nats context: {advice}"
