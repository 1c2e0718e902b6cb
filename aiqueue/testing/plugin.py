"""The pytest plugin: the fixture `aiqueue_settings`. Its entry point is in pyproject.toml.

pytest loads this module in every run, so this module imports nothing but pytest: fixtures import what they need.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ..config import Settings
    from .server import AccountServer


@pytest.fixture(scope="session")
def aiqueue_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AccountServer]:
    """The nats-server of this test run, or of this xdist worker. It starts when a test first needs it."""
    from ..errors import AIQueueError  # noqa: PLC0415
    from .server import AccountServer, directory_in_memory  # noqa: PLC0415

    with directory_in_memory(tmp_path_factory.mktemp("aiqueue") / "server") as directory:
        server = AccountServer(directory)
        try:
            server.start()
        except AIQueueError as error:
            pytest.fail(f"aiqueue_settings: {error}", pytrace=False)
        yield server
        server.end()


@pytest.fixture
def aiqueue_settings(aiqueue_server: AccountServer) -> Iterator[Settings]:
    """Settings of an account that is empty, and this test's alone: for `aiqueue.testing.client` or `aiqueue.connect`.

    They are those of the working directory (environment, aiqueue.toml), except where the server is and who connects.
    """
    from ..errors import AIQueueError  # noqa: PLC0415
    from .server import settings_of_account  # noqa: PLC0415

    account = aiqueue_server.take()
    try:
        settings = settings_of_account(account)
    except AIQueueError as error:
        pytest.fail(f"aiqueue_settings: {error}", pytrace=False)
    yield settings
    aiqueue_server.return_account(account)
