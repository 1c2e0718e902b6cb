"""A Dockerfile as its instructions, so that tests can do without Docker what a build does."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Stage:
    """One ``FROM … AS name``. `instructions`: its instructions in order, as (word, rest)."""

    name: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all_of(self, word: str) -> list[str]:
        return [rest for each, rest in self.instructions if each == word]

    def last(self, word: str) -> str:
        return self.all_of(word)[-1]

    @property
    def environment(self) -> dict[str, str]:
        """What ENV and ARG set. References to other variables are left as they stand."""
        found = {}
        for word, rest in self.instructions:
            if word in ("ENV", "ARG"):
                name, _, value = rest.partition("=")
                found[name] = value
        return found

    def command(self, word: str) -> list[str]:
        """The JSON form of CMD, ENTRYPOINT or HEALTHCHECK."""
        found: list[str] = json.loads(self.last(word)[self.last(word).index("[") :])
        return found


def parse(text: str) -> list[Stage]:
    stages: list[Stage] = []
    lines = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    for line in filter(str.strip, lines):
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            stages.append(Stage(rest.partition(" AS ")[2].strip()))
        elif stages:
            stages[-1].instructions.append((word, rest.strip()))
    return stages


def build(stage: Stage, context: Path, root: Path) -> dict[str, str]:
    """Do in `root`, an empty folder, what a build of this stage does: COPY from `context`, ENV, WORKDIR and RUN.

    Absolute paths of the image lie below `root`. Returns the environment at the end.
    """
    ignored = (context / ".dockerignore").read_text().split()
    kept = [each.removeprefix("!") for each in ignored if each.startswith("!")]
    environment = {"PATH": os.environ["PATH"], "HOME": str(root)}
    environment |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    where = root
    for word, rest in stage.instructions:
        if word in ("ENV", "ARG"):
            name, _, value = rest.partition("=")
            environment[name] = f"{root}{value}" if value.startswith("/") else value
        elif word == "WORKDIR":
            where = root / rest.lstrip("/")
            where.mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                assert source.split("/")[0] in kept, f"{source} is not in the build's context: .dockerignore"
                to = where / target / ("" if (context / source).is_dir() else source)
                if (context / source).is_dir():
                    shutil.copytree(context / source, to, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(context / source, to)
        elif word == "RUN":
            subprocess.run(["/bin/sh", "-ec", rest], cwd=where, env=environment, check=True, timeout=400)
        else:
            raise AssertionError(f"no test knows {word}")
    return environment
