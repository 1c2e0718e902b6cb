"""The former version (commit eb423bd) as code that runs: its package is packed in ``aiqueue-eb423bd.tar.xz``.

The archive has the package and the stream files as they were, without ``cli/demo``. To make it anew::

    git archive eb423bd aiqueue | tar x -C /srv/former && rm -r /srv/former/aiqueue/cli/demo
    git archive eb423bd streams | tar x -C /srv/former/aiqueue
    cd /srv/former && tar c --sort=name --owner=0 --group=0 --numeric-owner aiqueue | xz -9e

That version needs pydantic-settings, which nothing here installs any more: SETTINGS does as much of its work.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path
from typing import Any

from .. import forks

HERE = Path(__file__).resolve().parent
ARCHIVE = HERE / "aiqueue-eb423bd.tar.xz"

SETTINGS = '''
    """As much of pydantic-settings as the former version uses."""

    import os
    from typing import Any

    import pydantic

    SettingsConfigDict = dict
    PydanticBaseSettingsSource = Any


    class SettingsError(ValueError): ...


    def InitSettingsSource(settings_cls, values):
        return values


    class BaseSettings(pydantic.BaseModel):
        def __init__(self, **given):
            cls, prefix = type(self), type(self).model_config["env_prefix"]
            found = {name: os.environ.get(prefix + name.upper()) for name in cls.model_fields}
            found = {name: value for name, value in found.items() if value is not None}
            values = {}
            for source in reversed(cls.settings_customise_sources(cls, given, found, {}, {})):
                values.update(source)
            super().__init__(**values)
    '''


def unpack(place: Path) -> Path:
    """Unpack the former version, and return the directory that PYTHONPATH must name."""
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(place, filter="data")
    (place / "pydantic_settings.py").write_text(textwrap.dedent(SETTINGS))
    (place / "aiohttp.py").write_text("raise ImportError\n")  # nats-py would load it for each program, and do without
    return place


Started = subprocess.Popen[bytes] | forks.Program


class Versions:
    """Programs of both versions, in one directory, on one account. `log`: what they have written."""

    def __init__(
        self, directory: Path, former: Path, account: Any, *, app: str, stream: str, former_stream: str | None = None
    ) -> None:
        """`former`: what `unpack` returned. `former_stream`: the stream file of the former version, if that of this one
        has what it does not know.
        """
        (directory / "streams").mkdir()
        (directory / "streams" / "test.toml").write_text(textwrap.dedent(stream))
        self._former_streams = directory / "streams"
        if former_stream is not None:
            self._former_streams = directory / "former-streams"
            self._former_streams.mkdir()
            (self._former_streams / "test.toml").write_text(textwrap.dedent(former_stream))
        (directory / "app.py").write_text(textwrap.dedent(app))
        self.streams = directory / "streams"
        self.log = directory / "jobs.log"
        self.log.touch()
        self.alive: list[Started] = []
        self._directory = directory
        self._former = former
        self._environment = {
            **os.environ,
            "JOB_LOG": str(self.log),
            "AIQUEUE_URL": account.url,
            "AIQUEUE_USER": account.user,
            "AIQUEUE_PASSWORD": account.password,
            "AIQUEUE_STREAMS": str(self.streams),
        }

    def start(self, *command: str, former: bool) -> Started:
        """Start `python COMMAND` with the code of one version."""
        here = str(self._former) if former else str(HERE.parent.parent)
        streams = str(self._former_streams) if former else str(self.streams)
        env = {**self._environment, "PYTHONPATH": here, "AIQUEUE_STREAMS": streams}
        with (self._directory / "errors.log").open("ab") as errors:
            options: dict[str, Any] = {"cwd": self._directory, "stdout": errors, "stderr": errors, "env": env}
            if former:
                self.alive.append(subprocess.Popen([sys.executable, *command], **options))
            else:
                self.alive.append(forks.start(*(word for word in command if word != "-m"), **options))
        return self.alive[-1]

    def start_worker(self, *, former: bool) -> Started:
        return self.start("-m", "aiqueue", "work", "app:worker", former=former)

    def run(self, *command: str, former: bool) -> None:
        """Run a program to its end, which must be a good one."""
        process = self.start(*command, former=former)
        assert process.wait(timeout=60) == 0, self.errors()
        self.alive.remove(process)

    def kill(self, process: Started) -> None:
        process.kill()
        process.wait()
        self.alive.remove(process)

    def works(self, process: Started) -> bool:
        """Whether a worker has begun to work."""
        return f"works {process.pid}\n" in self.log.read_text()

    def lines(self, event: str) -> list[list[str]]:
        """Return the rest of the lines in the log that begin with `event`."""
        whole = self.log.read_text().rpartition("\n")[0]  # the last line may be half written
        return [line.split()[1:] for line in whole.splitlines() if line.split()[0] == event]

    def errors(self) -> str:
        return (self._directory / "errors.log").read_text(errors="replace")[-4_000:]

    def end(self) -> None:
        for process in [*self.alive]:
            self.kill(process)
