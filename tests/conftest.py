"""The server that the tests run on, chosen by ``--server``. There is no fake one.

embedded (default)
    One nats-server for the run, and an account of its own for each test. It dies with pytest, even by kill -9.
container
    The image of compose.yaml in Docker; skips where no Docker engine answers.
nats://user:password@host:port
    A server of yours, which must hold no stream: every test deletes all streams when it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import os
import re
import secrets
import signal
import subprocess
import tempfile
import warnings
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import nats
import pytest
from hypothesis import HealthCheck, settings
from typer.testing import CliRunner

import aiqueue
from aiqueue import testing
from aiqueue.server import supervisor
from aiqueue.testing.server import settings_of_account

from . import forks, support
from .support import Account, Cluster, Eventually, NatsProcess, Server, WholeServer

for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):  # of numpy and of tokenizers
    os.environ.setdefault(_threads, "1")  # four test processes share the cores
os.environ.setdefault("GOGC", "400")  # nats-servers of the tests keep little: rarer garbage collections are cheaper

MEMORY = Path("/dev/shm")  # on Linux
SMALL = """
[family]
name = "small.jobs"
default_kind = "small"
priorities = ["high", "normal"]
key = "ticket"
[stream]
name = "SMALL"
storage = "memory"
max_msgs_per_subject = 3
max_bytes = "1MiB"
max_msg_size = "100KiB"
"""


# How long an example takes is up to the machine, and decides no test. Each run draws other ones; more at a time with
# --hypothesis-profile=thorough.
settings.register_profile("any-machine", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", settings.get_profile("any-machine"), max_examples=400)
settings.load_profile("any-machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--server", default="embedded", metavar="embedded|container|URL", help="the server to test on")


def pytest_configure(config: pytest.Config) -> None:
    _keep_files_in_memory()
    forks.build_command_lines_once()
    # A shell without job control has what it starts in the background ignore SIGINT, which children inherit: they are
    # to heed it here, as they do in a terminal.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    choice = config.getoption("--server")
    if choice not in ("embedded", "container") and not choice.startswith("nats://"):
        raise pytest.UsageError(f"--server={choice}: give embedded, container, or nats://user:password@host:port")


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Of several workers that run all tests, each first makes its share of the files that all of them need.

    These are the tests compiled with their assertions, and the constants which Hypothesis finds in the sources. In a
    new clone they cost 10 s of CPU, in each worker that does not find them.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers == 1 or session.config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return
    mine = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    for path in sorted((support.ROOT / "tests").rglob("test_*.py"))[mine::workers]:
        with contextlib.suppress(Exception, pytest.skip.Exception):  # the collection will tell
            importlib.import_module(".".join(path.relative_to(support.ROOT).with_suffix("").parts))
    with contextlib.suppress(ImportError):  # it is Hypothesis's own affair where they are
        from hypothesis.internal.constants_ast import constants_from_module  # noqa: PLC0415

        for path in sorted((support.ROOT / "aiqueue").rglob("*.py"))[mine::workers]:
            module = ModuleType(path.stem)
            module.__file__ = str(path)
            constants_from_module(module)


def pytest_collection_finish() -> None:
    """Keep the tests themselves out of the garbage collections that run amid them, and have these run more rarely."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


@pytest.fixture(scope="session")
def nats_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server of this run."""
    choice = request.config.getoption("--server")
    if choice == "embedded":
        with testing.AccountServer(tmp_path_factory.mktemp("nats") / "server", accounts=400) as server:
            yield server
    elif choice == "container":
        yield from _container()
    else:
        yield _given(choice)


@pytest.fixture(scope="session", autouse=True)
def compared() -> Iterator[None]:
    """Compare what commands print with --json in the test's own process with the keys that are declared for them."""
    invoke = CliRunner.invoke

    def run(runner: CliRunner, app: Any, args: Any = None, *more: Any, **options: Any) -> Any:
        done = invoke(runner, app, args, *more, **options)
        words = [str(each) for each in args] if isinstance(args, list | tuple) else []
        if "--json" in words and done.stdout_bytes and getattr(app, "info", None) and app.info.name == "aiqueue":
            from aiqueue.cli.json_keys import OUTPUTS  # noqa: PLC0415  (imports every room)
            from tools.docs.json_text import problems_of  # noqa: PLC0415

            assert problems_of(words, done.stdout, OUTPUTS) == []
        return done

    CliRunner.invoke = run  # type: ignore[method-assign]
    yield
    CliRunner.invoke = invoke  # type: ignore[method-assign]


@pytest.fixture
def streams(tmp_path: Path) -> Path:
    """A directory of stream files with a small one: family small.jobs, three jobs a lane."""
    directory = tmp_path / "streams"
    directory.mkdir()
    (directory / "small.toml").write_text(SMALL)
    return directory


@pytest.fixture
def account(nats_server: Server) -> Iterator[Account]:
    """An account that is empty and nobody else's."""
    taken = nats_server.take()
    yield taken
    nats_server.return_account(taken)


@pytest.fixture
def families(request: pytest.FixtureRequest) -> Collection[str] | None:
    """The families whose streams `client` has: those of the mark `families`. None: all, which costs twice as much."""
    mark = request.node.get_closest_marker("families")
    return None if mark is None else mark.args


@pytest.fixture
async def client(account: Account, families: Collection[str] | None) -> AsyncIterator[aiqueue.Client]:
    """A client on the test's account, which has the streams of `families`."""
    async with testing.client(settings_of_account(account), families=families) as client:
        yield client


@pytest.fixture
async def plain(account: Account) -> AsyncIterator[Any]:
    """A plain nats-py client on the test's account."""
    plain = await nats.connect(account.url, user=account.user, password=account.password)
    yield plain
    await plain.close()


@pytest.fixture(scope="module")
def shared(nats_server: Server) -> Iterator[Account]:
    """An account with all streams for the tests of one file, which each take a `tenant`."""
    taken = nats_server.take()

    async def create() -> None:
        async with aiqueue.connect(taken.url, user=taken.user, password=taken.password) as client:
            await support.create_streams(client)

    asyncio.run(create())
    yield taken
    nats_server.return_account(taken)


@pytest.fixture
def tenant() -> str:
    """A tenant that no other test has."""
    return f"t{secrets.token_hex(6)}"


@pytest.fixture
async def bus(shared: Account) -> AsyncIterator[aiqueue.NATSClient]:
    """The client of the integration guide, on the account of the file."""
    async with aiqueue.NATSClient(shared.url, user=shared.user, password=shared.password) as bus:
        yield bus


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Callable[..., NatsProcess]]:
    """A factory of servers for fault tests, started: ``own_server("max_payload: 1000")``. They end with the test."""
    made: list[NatsProcess] = []

    def make(extra: str = "", *, storage: str = "") -> NatsProcess:
        server = NatsProcess(tmp_path / f"own-server-{len(made)}", extra, storage=storage)
        made.append(server)
        server.start()
        return server

    yield make
    for server in made:
        server.kill()


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Three servers that are one cluster, started and ready; they end with the test."""
    cluster = Cluster(tmp_path / "own-cluster")
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.end()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ca.pem, other.pem (another CA), server.pem and server.key for localhost and 127.0.0.1."""
    home = tmp_path_factory.mktemp("tls")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=home, check=True, capture_output=True, timeout=30)

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("ca", "other"):
        openssl(
            *("req", "-x509", *curve, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-days", "2"),
            *("-subj", f"/CN={name}", "-addext", "keyUsage=critical,keyCertSign,cRLSign"),
        )
    openssl("req", *curve, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=localhost")
    (home / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\nauthorityKeyIdentifier=keyid")
    openssl(
        *("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"),
        *("-out", "server.pem", "-days", "2", "-extfile", "names"),
    )
    return home


@pytest.fixture
def eventually() -> Eventually:
    """`support.eventually`: wait for a fact."""
    return support.eventually


def _keep_files_in_memory() -> None:
    """Have temporary files lie in memory where there is enough: a server's streams cost half as much there as on disk.

    ``TMPDIR=/tmp make test`` leaves them on disk.
    """
    if "TMPDIR" in os.environ or not MEMORY.is_dir() or not os.access(MEMORY, os.W_OK):
        return
    found = os.statvfs(MEMORY)
    if not found.f_flag & os.ST_NOEXEC and found.f_bavail * found.f_frsize >= 4 * 1024**3:  # Docker gives 64 MiB
        os.environ["TMPDIR"] = str(MEMORY)
        tempfile.tempdir = None  # it is read anew


def _given(url: str) -> Server:
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.exit(f"--server={url} runs one test after the other: leave out -n", returncode=4)
    server = WholeServer(url)
    try:
        names = server.take().stream_names()
    except OSError as error:
        pytest.exit(f"--server: {server.url} does not serve: {error}", returncode=4)
    if names:
        pytest.exit(
            f"--server: {server.url} is not empty ({len(names)} streams, {names[0]} among them) and the tests "
            "delete every stream: give an empty server",
            returncode=4,
        )
    return server


def _engine_problem(docker: Any) -> str:
    try:
        with contextlib.closing(docker.from_env(timeout=5)) as engine:
            engine.ping()
    except docker.errors.DockerException as error:
        return str(error)
    return ""


def _container() -> Iterator[Server]:
    image = re.search(r"^\s*image:\s*(\S+)", (support.ROOT / "compose.yaml").read_text(), re.MULTILINE)
    assert image, "compose.yaml names no image"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs: of the import, and of the socket left open by a failed call
        docker = pytest.importorskip("docker")
        containers = pytest.importorskip("testcontainers.core.container")
        problem = _engine_problem(docker)
        gc.collect()
    if problem:
        pytest.skip(f"no Docker engine answers here: {problem}")
    container = containers.DockerContainer(image[1]).with_exposed_ports(4222)
    with container.with_command("-js --user test --pass test") as running:
        host, port = running.get_container_host_ip(), int(running.get_exposed_port(4222))
        support.wait_until(lambda: supervisor.ready((host, port), "test", "test"), within=60)
        yield WholeServer(f"nats://test:test@{host}:{port}")
