"""Which tables each file has, and valid files to try their keys in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from aiqueue import limits, units
from aiqueue.gateway import config_file as gateway_file
from aiqueue.gateway import gateway_keys
from aiqueue.limits import rules
from aiqueue.rag import config_file as rag_file
from aiqueue.rag import rag_keys
from aiqueue.topology import Topology, file_keys, stream_keys, streamfile

from . import files, links, markdown
from .files import Table

_LIMITED = (
    '[family]\nname = "llm.calls"\ndefault_kind = "llm.call"\nlimit_key = "model"\n[stream]\nname = "LLM_CALLS"\n'
)


def _keep(*tables: tuple[str, Mapping[str, str]]) -> str:
    """Return a file of these tables: name as in TOML, keys with their values."""
    return "".join(f"{name}\n" + "".join(f"{key} = {value}\n" for key, value in keys.items()) for name, keys in tables)


def _trying(*tables: tuple[str, Mapping[str, str]]) -> Callable[[str, str | None], str]:
    """Return a function that gives a key of the last table another value, or leaves the key out."""
    *before, (name, keys) = tables

    def write(key: str, value: str | None) -> str:
        given = {**keys, key: value}
        return _keep(*before, (name, {each: stated for each, stated in given.items() if stated is not None}))

    return write


_PROVIDER = ("[[provider]]", {"name": '"p"', "kind": '"openai"'})
_MODEL = ("[[model]]", {"name": '"m"', "provider": '"p"', "context": "1000", "max_output_tokens": "100"})
_PRICE = ("[model.price]", {"input": "1", "output": "2"})
_BUDGET = ("[[budget]]", {"tenant": '"acme"', "month": "10"})
_PRICED = "Part of a `[[model]]`: `price = { input = 0.15, output = 0.6 }`."
GATEWAY = [
    Table("[[provider]]", gateway_keys.PROVIDER_KEYS, _trying(_PROVIDER)),
    Table("[[model]]", gateway_keys.MODEL_KEYS, _trying(_PROVIDER, _MODEL)),
    Table("price", gateway_keys.PRICE_KEYS, _trying(_PROVIDER, _MODEL, _PRICE), _PRICED),
    Table("[[budget]]", gateway_keys.BUDGET_KEYS, _trying(_BUDGET)),
]
RAG = [
    *(Table(f"[{name}]", keys, _trying((f"[{name}]", {}))) for name, keys in rag_keys.KEYS.items()),
    Table("[[tenant]]", rag_keys.TENANT_KEYS, _trying(("[[tenant]]", {"name": '"acme"'})), "One table a tenant."),
]
LIMITS = [Table("[[limit]]", rules.FIELDS, _trying(("[[limit]]", {"family": '"llm.calls"', "requests": "2"})))]
STREAMS = [
    Table("[family]", stream_keys.WORK_FAMILY, about="For work streams; inbox streams have the first four keys."),
    Table(
        "[stream]", stream_keys.STREAM, about="Named as JetStream names them. Defaults: [by role](#defaults-by-role)."
    ),
    Table("[stream.republish]", stream_keys.REPUBLISH, about="Messages that the server publishes again once stored."),
    Table("[consumer]", stream_keys.CONSUMER, about="For the lanes of work and inbox streams."),
]


def read_gateway(text: str) -> Any:
    """Parse a gateway.toml."""
    return gateway_file.parse("gateway.toml", text)


def read_rag(text: str) -> Any:
    """Parse a rag.toml."""
    return rag_file.parse("rag.toml", text)


def read_limits(text: str) -> Any:
    """Parse a limits.toml, beside a family with limits."""
    topology = Topology.build([*_bundled(), ("llm_calls.toml", _LIMITED)])
    return limits.parse_rules(topology, ("limits.toml", text))


def _bundled() -> list[tuple[str, str]]:
    from aiqueue.topology import files as topology_files  # noqa: PLC0415

    root = topology_files.bundled_directory()
    return [(str(path), topology_files.read_text(path)) for path in topology_files.list_files(root)]


def _page(title: str, opening: str, tables: list[Table], read: Callable[[str], Any], *more: str) -> str:
    found = [files.section(table, found) for table, found in files.rows(tables, read)]
    return markdown.page(title, opening, *found, *more)


_UNITS = (
    'A duration is a text such as `"30s"`, `"2m"` or `"7d"`; a size is a number of bytes or a text such as `"1GiB"`.'
)


def render_gateway() -> str:
    """Return the page of gateway.toml."""
    opening = (
        f"What the file is for, with an example: [the LLM gateway]({links.GATEWAY_CONFIG}). Its path is in the "
        f"environment variable `{gateway_file.VARIABLE}`, or the file lies in the directory of the setting `streams`. "
        f"An "
        f"error names the file and the key. {_UNITS}"
    )
    return _page("gateway.toml", opening, GATEWAY, read_gateway)


def render_rag() -> str:
    """Return the page of rag.toml."""
    opening = (
        f"What the file is for: [retrieval]({links.RAG_SETUP}). The file is optional. Its path is in the "
        f"environment variable `{rag_file.VARIABLE}`, or the file lies in the directory of the setting `streams`. "
        f"Relative "
        f"paths in it start from its directory. {_UNITS}"
    )
    return _page("rag.toml", opening, RAG, read_rag)


def render_limits() -> str:
    """Return the page of limits.toml."""
    opening = (
        f"How the rules work together, with examples: [limits]({links.LIMITS}). The file lies in the directory of the "
        "setting `streams`. Each rule is a table, and has at least one of `requests`, `cost` and `in_flight`."
    )
    return _page("limits.toml", opening, LIMITS, read_limits)


def render_streams() -> str:
    """Return the page of the stream files."""
    top = {
        "role": file_keys.FileKey("What the stream stores. Left out: the jobs of one family.", '"work"'),
        "profile": file_keys.FileKey(
            "Keys of `[stream]` and `[consumer]` for one profile: `[profile.cluster]`, `[profile.single]`.", "none"
        ),
    }
    opening = (
        f"How the files are found, and an example of one: [streams]({links.FAMILIES}#streams). Each file "
        "`*.toml` in the directory of the setting `streams` declares one stream. An error names the file and the "
        "key. A "
        'duration is a text such as `"30s"`; a size is a number of bytes or a text such as `"1GiB"`.'
    )
    roles = (
        f"Roles: {', '.join(markdown.code(each) for each in streamfile.ROLES)}. There is at most one stream of each "
        "role but `work` and `inbox`. aiqueue computes `subjects`, `subject_transform`, and `republish` of the limits "
        "and api_keys streams."
    )
    keys = [(markdown.code(name), files.shown_default(key.default), key.sentence) for name, key in top.items()]
    defaults = (
        "## Defaults by role\n\nWhat a file leaves out. Values in bold are required by the role: any other is refused. "
        "Without a value here, the server's own default holds."
    )
    return _page(
        "Stream files",
        opening + "\n\n" + markdown.table(("key", "default", "meaning"), keys) + "\n\n" + roles,
        STREAMS,
        read_rag,
        defaults,
        markdown.table(("role", "defaults"), _defaults()),
    )


def _defaults() -> list[tuple[str, str]]:
    """Return the roles with the same defaults, and these."""
    found: dict[str, list[str]] = {}
    for role in streamfile.ROLES:
        fixed, usual = streamfile.FIXED[role], {**streamfile.COMMON, **streamfile.DEFAULTS[role]}
        shown = [f"**{_stated(key, value)}**" for key, value in fixed.items()]
        shown += [_stated(key, value) for key, value in usual.items() if key not in fixed]
        found.setdefault(", ".join(shown), []).append(markdown.code(role))
    return [(", ".join(roles), shown) for shown, roles in found.items()]


_DURATIONS = ("max_age", "duplicate_window")


def _stated(key: str, value: Any) -> str:
    if isinstance(value, dict):
        sizes = ", ".join(f"{size} = {_size(each)}" for size, each in value.items())
        return markdown.code(f"{key} = {{ {sizes} }}")
    if isinstance(value, bool):
        return markdown.code(f"{key} = {str(value).lower()}")
    if key in _DURATIONS:
        return markdown.code(f'{key} = "{units.short_duration(value / 1e9) if value else "0s"}"')
    if key == "max_bytes" and value > 0:
        return markdown.code(f"{key} = {_size(value)}")
    return markdown.code(f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value:_}")


def _size(value: int) -> str:
    return f'"{units.short_size(value).replace(".0", "").replace(" ", "")}"'
