"""The AsyncAPI document of an example: what `aiqueue schema` prints for it, and a page of its channels and messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from . import links, markdown

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "live_job"
TARGET = "tasks:worker"
FAMILY = "reports.live"


@cache
def document() -> str:
    """Return what the command prints, with the files of the example and no other settings."""
    settings = ("AIQUEUE_", "NATS_URL")
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith(settings)}
    command = [sys.executable, "-m", "aiqueue", "schema", TARGET, "--family", FAMILY, "--title", "Reports"]
    path = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    done = subprocess.run(  # noqa: S603  (our own command)
        command, cwd=EXAMPLE, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    return done.stdout


def render() -> str:
    """Return the page that leads to the document."""
    found: dict[str, Any] = json.loads(document())
    channels = [
        (markdown.code(name), markdown.code(each["address"]), markdown.sentence(each.get("description", "")))
        for name, each in found["channels"].items()
    ]
    opening = (
        f"`aiqueue schema` prints an AsyncAPI {found['asyncapi']} document of your program: "
        f"[schemas for other languages]({links.SCHEMAS}). This is that of the example in `examples/live_job`, made by "
        f"`aiqueue schema {TARGET} --family {FAMILY} --title Reports`: [asyncapi.json](asyncapi.json)."
    )
    messages = [(markdown.code(name), markdown.code(each.get("name", ""))) for name, each in _messages(found)]
    return markdown.page(
        "AsyncAPI",
        opening,
        "## Channels",
        markdown.table(("channel", "subject", "meaning"), channels),
        "## Messages",
        markdown.table(("message", "name"), messages),
    )


def _messages(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return list(found.get("components", {}).get("messages", {}).items())
