"""``aiqueue work --processes``: a worker pool of real processes, and what its members and their parent go through."""

from __future__ import annotations

import asyncio
import datetime as dt
import fcntl
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
import textwrap
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import aiqueue
from aiqueue.units import seconds

from ..support import ROOT, Account, children, create_streams, processes, wait_until, whole_lines

STREAM = """
    [family]
    name = "test.holds"
    default_kind = "hold"
    [stream]
    name = "TEST_HOLDS"
    [consumer]
    ack_wait = "1s"
    """

# Files in the directory say what a member does: "die" ends it soon after it works, "die-early" before.
APP = """
    import asyncio, contextlib, os, pathlib, signal
    import aiqueue

    if os.path.exists("die-early"):
        os.kill(os.getpid(), signal.SIGKILL)

    LOG = os.open("jobs.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    class Hold(aiqueue.Message, kind="hold", family="test.holds"):
        n: int
        hold_s: float = 0.0

    async def end() -> None:
        while not os.path.exists("die"):
            await asyncio.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)

    @contextlib.asynccontextmanager
    async def lifespan():
        task = asyncio.create_task(end())
        yield
        task.cancel()

    worker = aiqueue.Worker(concurrency=1, lifespan=lifespan, name="holder")

    @worker.handle(Hold, timeout="60s")
    async def hold(job: aiqueue.Job[Hold]) -> None:
        os.write(LOG, f"start {job.message.n} {os.getpid()}\\n".encode())
        await asyncio.sleep(job.message.hold_s)
        os.write(LOG, f"end {job.message.n} {os.getpid()}\\n".encode())
    """

HANGS_UP = """
    import os, signal, socket, sys, time

    fd = next(int(word.partition("=")[2]) for word in sys.argv if word.startswith("--pool-fd="))
    socket.socket(fileno=os.dup(fd)).shutdown(socket.SHUT_WR)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)
    """

DEATH = re.compile(
    r"(\S+ \S+) WARNING \[\d+\] aiqueue\.cli\.worker_pool: process (\d) of .* killed by SIGKILL; "
    r"restarting it in (\S+)"
)


class Hold(aiqueue.Message, kind="hold", family="test.holds"):
    n: int
    hold_s: float = 0.0


class Place:
    """A directory with a worker's module, and the worker pool that runs there."""

    def __init__(self, directory: Path, account: Account) -> None:
        self.directory = directory
        self.account = account
        (directory / "streams").mkdir()
        (directory / "streams" / "test_holds.toml").write_text(textwrap.dedent(STREAM))
        (directory / "app.py").write_text(textwrap.dedent(APP))
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("AIQUEUE_", "NATS_"))}
        self.environment = {
            **kept,
            "PYTHONPATH": str(ROOT),
            "AIQUEUE_URL": account.url,
            "AIQUEUE_USER": account.user,
            "AIQUEUE_PASSWORD": account.password,
            "AIQUEUE_STREAMS": str(directory / "streams"),
        }
        self.parents: list[subprocess.Popen[str]] = []
        self.members: set[int] = set()
        asyncio.run(self._apply())

    async def _apply(self) -> None:
        async with self._client() as client:
            await create_streams(client)

    def _client(self) -> aiqueue.Client:
        settings = {"user": self.account.user, "password": self.account.password}
        return aiqueue.connect(self.account.url, **settings, streams=self.directory / "streams")  # type: ignore[no-any-return,arg-type]

    def enqueue(self, count: int, hold_s: float = 0.0) -> None:
        async def store() -> None:
            async with self._client() as client:
                for n in range(count):
                    await client.enqueue(Hold(n=n, hold_s=hold_s), tenant=f"t{n % 3}")

        asyncio.run(store())

    def start(
        self, size: int, *options: str, patch: str = "", terminal: int | None = None, target: str = "app:worker"
    ) -> subprocess.Popen[str]:
        """A worker pool in a session, and process group, of its own, as a shell or a service manager would give it."""
        begin = ["-c", f"from aiqueue.cli import main, worker_pool; {patch}; main()"] if patch else ["-m", "aiqueue"]
        with (self.directory / "out").open("w") as out, (self.directory / "err").open("w") as err:
            parent = subprocess.Popen(
                [sys.executable, *begin, "work", target, "--processes", str(size), *options],
                stdin=subprocess.DEVNULL if terminal is None else terminal,
                stdout=out, stderr=err, text=True, cwd=self.directory, env=self.environment, start_new_session=True,
                preexec_fn=None if terminal is None else lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509
            )  # fmt: skip
        self.parents.append(parent)
        return parent

    def started(self, size: int, *options: str, patch: str = "", terminal: int | None = None) -> subprocess.Popen[str]:
        """A worker pool all of whose processes work."""
        parent = self.start(size, *options, patch=patch, terminal=terminal)
        wait_until(lambda: self.working() == size or parent.poll() is not None)
        assert parent.poll() is None, self.output("err")
        self.members |= children(parent.pid)
        return parent

    def output(self, where: str) -> str:
        return (self.directory / where).read_text()

    def working(self) -> int:
        """How many members have begun to work, since the pool's start."""
        return len(re.findall(r"^worker \S+: \d+ slots?, ", self.output("out"), re.MULTILINE))

    def pool_lines(self) -> list[str]:
        return [line for line in self.output("out").splitlines() if line.startswith("worker pool ")]

    def jobs(self, word: str) -> list[tuple[int, int]]:
        split = (line.split() for line in whole_lines(self.directory / "jobs.log"))
        return [(int(n), int(pid)) for what, n, pid in split if what == word]

    def deaths(self, slot: int) -> list[tuple[dt.datetime, float]]:
        """When a slot's processes died, and how long after each another one was to start, as logged."""
        found = [match for line in self.output("err").splitlines() if (match := DEATH.fullmatch(line))]
        mine = [match for match in found if int(match[2]) == slot]
        return [(dt.datetime.strptime(m[1], "%Y-%m-%d %H:%M:%S,%f"), seconds(m[3])) for m in mine]  # noqa: DTZ007

    def end(self) -> None:
        for parent in self.parents:
            left = children(parent.pid) if parent.poll() is None else set()
            parent.kill()
            parent.wait()
            self.members |= left
        wait_until(lambda: not any(map(is_alive, self.members)))


def is_alive(pid: int) -> bool:
    return pid in processes("")


@pytest.fixture
def place(tmp_path: Path, account: Account) -> Iterator[Place]:
    found = Place(tmp_path, account)
    yield found
    found.end()


def test_members_share_the_jobs_with_the_options_of_the_pool_and_drain_together(place: Place) -> None:
    options = ["--concurrency", "2", "--tenants", "t0", "--tenants", "t1,t2", "--families", "test.holds"]
    parent = place.started(3, *options)
    place.enqueue(6, hold_s=0.5)
    wait_until(lambda: len({n for n, _ in place.jobs("start")}) == 6)
    assert len({pid for _, pid in place.jobs("start")} & place.members) > 1
    if Path("/proc/self/maps").exists():  # the compiled part of the codec tells who has loaded the client
        assert "cbor2" in Path(f"/proc/{min(place.members)}/maps").read_text()
        assert "cbor2" not in Path(f"/proc/{parent.pid}/maps").read_text()
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(40) == 0, place.output("err")
    assert len(place.jobs("end")) == 6
    for pid in place.members:
        assert f"worker holder-{pid}: 2 slots, test.holds of t0, t1, t2, at " in place.output("out")
        assert re.search(rf"^worker holder-{pid}: \d deliver\w+ in \S+; all jobs", place.output("out"), re.MULTILINE)
        assert f" INFO [{pid}] aiqueue.worker.session: " in place.output("err")
    first, last = place.pool_lines()
    assert first == f"worker pool {parent.pid}: 3 processes of app:worker; Ctrl-C or SIGTERM drains them"
    assert re.fullmatch(rf"worker pool {parent.pid}: 3 processes in \S+s; all jobs finished", last)


def test_member_killed_or_told_to_stop_is_replaced_and_no_job_is_lost(place: Place) -> None:
    place.enqueue(60, hold_s=0.05)
    parent = place.started(2)
    wait_until(lambda: len(place.jobs("end")) > 3)
    victim = min(place.members)
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: place.working() == 3)
    new = children(parent.pid) - place.members
    place.members |= new
    wait_until(lambda: {n for n, _ in place.jobs("end")} == set(range(60)), within=40)
    assert len(new) == 1
    place.enqueue(20, hold_s=0.2)  # those before may have been done before it worked
    wait_until(lambda: new <= {pid for _, pid in place.jobs("end")})
    os.kill(min(new), signal.SIGTERM)
    wait_until(lambda: place.working() == 4)
    assert f"(pid {min(new)}) ended with exit code 0; restarting it in" in place.output("err")
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(40) == 0
    assert "2 processes in " in place.pool_lines()[-1]
    assert ", 2 restarts; all jobs finished" in place.pool_lines()[-1]


def test_members_that_die_again_and_again_come_back_ever_later(place: Place) -> None:
    parent = place.started(2)
    (place.directory / "die").touch()
    wait_until(lambda: min(len(place.deaths(1)), len(place.deaths(2))) >= 3)
    for slot in (1, 2):
        at, delays = zip(*place.deaths(slot)[:3], strict=True)
        for n, delay_s in enumerate(delays):
            assert 0.099 * 2**n <= delay_s <= 0.201 * 2**n
        for before, after, delay_s in zip(at, at[1:], delays, strict=False):
            assert (after - before).total_seconds() > delay_s
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(40) == 0  # nothing ran


def test_steady_life_makes_the_next_restart_quick_again(place: Place) -> None:
    place.started(2, patch="worker_pool.STEADY_S = 0.1")
    (place.directory / "die").touch()
    wait_until(
        lambda: len(place.deaths(1)) >= 2
    )  # after an unsteady life, the second one takes above 0.198 s, to 0.402
    assert all(delay_s <= 0.201 for _, delay_s in place.deaths(1))


def test_members_that_cannot_start_any_more_are_waited_for_and_the_others_go_on(place: Place) -> None:
    app = place.directory / "app.py"
    good = app.read_text()
    parent = place.started(2)
    app.write_text("import nothing_here\n")
    victim, other = sorted(place.members)
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: place.output("err").count("ended with exit code 2; restarting it in") >= 1, within=40)
    place.enqueue(1)
    wait_until(lambda: place.jobs("end") == [(0, other)])
    app.write_text(good)
    wait_until(lambda: place.working() == 3)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(40) == 0


@pytest.mark.parametrize(
    ("options", "target", "said"),
    [
        ([], "nowhere:worker", "no module 'nowhere'"),
        (["--tenants", "t0,a.b"], "app:worker", "tenant 'a.b' must be"),
        (["--families", "no.family"], "app:worker", "unknown family 'no.family'"),
        (["--families", ","], "app:worker", "--families is empty"),
        (["--tenants", ""], "app:worker", "--tenants is empty"),
        (["--processes", "65"], "app:worker", "--processes"),
    ],
)
def test_what_cannot_start_says_so_once_with_exit_code_2(
    place: Place, options: list[str], target: str, said: str
) -> None:
    assert place.start(4, *options, target=target).wait(40) == 2
    assert place.output("out") == ""
    (line,) = (each for each in place.output("err").splitlines() if "using the server " not in each)
    assert line.startswith("error: ")
    assert said in line


def test_no_server_is_said_once_with_exit_code_1(place: Place) -> None:
    place.environment["AIQUEUE_CONNECT_TIMEOUT"] = "500ms"
    assert place.start(4, "--url", "nats://127.0.0.1:9").wait(40) == 1
    (line,) = place.output("err").splitlines()
    assert "no NATS server answers" in line


def test_first_process_killed_before_it_works_ends_the_pool(place: Place) -> None:
    (place.directory / "die-early").touch()
    assert place.start(3).wait(40) == 1
    (line,) = place.output("err").splitlines()
    assert "process 1 of 3" in line
    assert "was killed by SIGKILL before it was ready; stopping the worker pool" in line


def test_process_that_ends_while_the_parent_looks_at_others_is_not_missed(place: Place) -> None:
    """Its socket is closed already, so that nothing but SIGCHLD tells of it; and the parent has just looked."""
    (place.directory / "hangs_up.py").write_text(textwrap.dedent(HANGS_UP))
    slow = (
        "import time; pool = worker_pool.WorkerPool; look = pool._reap; "
        "pool._reap = lambda self: (look(self), time.sleep(0.6))[0]"
    )
    assert place.start(2, patch=slow, target="hangs_up:worker").wait(40) == 1
    assert "was killed by SIGKILL before it was ready" in place.output("err")


def test_no_room_for_a_process_is_said_with_exit_code_1(place: Place) -> None:
    no_room = (
        "import errno; no = OSError(errno.EAGAIN, 'no room'); "
        "worker_pool.PoolSlot.start = lambda *_: (_ for _ in ()).throw(no)"
    )
    assert place.start(2, patch=no_room).wait(40) == 1
    assert place.output("err") == "error: process 1 of 2 cannot be started (no room); stopping the worker pool\n"


def test_jobs_given_up_are_exit_code_1(place: Place) -> None:
    place.enqueue(1, hold_s=50)
    parent = place.started(2, "--drain-timeout", "100ms")
    wait_until(lambda: place.jobs("start"))
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(40) == 1
    assert "1 process did not finish all jobs; these go to other workers" in place.pool_lines()[-1]


def test_member_that_does_not_drain_is_killed(place: Place) -> None:
    parent = place.started(2, "--drain-timeout", "100ms", patch="worker_pool.SLACK_S = 0.5")
    os.kill(min(place.members), signal.SIGSTOP)
    begun = time.monotonic()
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(40) == 1
    assert time.monotonic() - begun >= 0.6
    assert "did not end within its drain timeout; killing it" in place.output("err")
    assert not any(map(is_alive, place.members))


def test_second_signal_ends_it_at_once(place: Place) -> None:
    place.enqueue(2, hold_s=50)
    parent = place.started(2)
    wait_until(lambda: place.jobs("start"))
    parent.send_signal(signal.SIGTERM)
    wait_until(lambda: "draining 1 running job" in place.output("err"))
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(40) == 143  # not after the 50 s of its job
    assert not any(map(is_alive, place.members))
    assert "; killed: " in place.pool_lines()[-1]


def test_signal_to_the_whole_group_is_one_signal(place: Place) -> None:
    """A service manager's stop: each process gets it, and each member again from the parent."""
    parent = place.started(2)
    place.enqueue(2, hold_s=0.7)
    wait_until(lambda: len(place.jobs("start")) == 2)
    assert all(os.getpgid(pid) == parent.pid for pid in place.members)
    os.killpg(parent.pid, signal.SIGTERM)
    assert parent.wait(40) == 0, place.output("err")
    assert len(place.jobs("end")) == 2
    assert "Traceback" not in place.output("err")


def test_ctrl_c_in_a_terminal_drains_and_another_one_ends_it(place: Place) -> None:
    place.enqueue(1, hold_s=50)
    ours, theirs = pty.openpty()
    try:
        parent = place.started(2, terminal=theirs)
        wait_until(lambda: place.jobs("start"))
        os.write(ours, b"\x03")
        wait_until(lambda: "draining 1 running job" in place.output("err"))
        wait_until(lambda: len(children(parent.pid)) == 1)  # the idle one has gone, the other goes on
        os.write(ours, b"\x03")
        assert parent.wait(40) == 130
    finally:
        os.close(theirs)
        os.close(ours)
    assert not any(map(is_alive, place.members))
    assert "Traceback" not in place.output("err")


def test_ctrl_c_while_it_starts_is_quiet(place: Place) -> None:
    for after_s in (0.0, 0.1, 0.3, 0.6):
        parent = place.start(2)
        wait_until(partial(children, parent.pid))
        time.sleep(after_s)
        os.killpg(parent.pid, signal.SIGINT)
        assert parent.wait(40) == 0
        assert "error" not in place.output("err")
        assert "Traceback" not in place.output("err")


def test_the_parent_needs_neither_the_client_nor_an_event_loop() -> None:
    code = (
        "import sys; from aiqueue.cli import worker_pool; "
        "print(sorted({'nats', 'pydantic', 'cbor2', 'asyncio', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_no_member_outlives_a_parent_that_is_killed(place: Place) -> None:
    place.enqueue(1, hold_s=50)
    parent = place.started(2)
    wait_until(lambda: place.jobs("start"))
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(map(is_alive, place.members)))


@pytest.mark.parametrize("when", ["before", "after"])
def test_member_ends_with_its_parent_where_no_kernel_sees_to_it(tmp_path: Path, when: str) -> None:
    code = (
        "import sys, time; from aiqueue.server import supervisor; supervisor._LIBC = None; "
        "from aiqueue.cli import pool_member; pool_member.join(int(sys.argv[1])); "
        "print('joined', flush=True); time.sleep(30)"
    )
    ours, theirs = socket.socketpair()
    if when == "before":
        ours.close()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(theirs.fileno())],
            stdout=subprocess.PIPE, pass_fds=(theirs.fileno(),), env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    with process:
        if when == "after":
            assert process.stdout is not None
            assert process.stdout.readline() == b"joined\n"
            assert process.poll() is None
            ours.close()
        assert process.wait(40) == -signal.SIGKILL


def test_options_reach_the_members_as_they_were_given(place: Place) -> None:
    """What the environment says stays there: others can read a command line."""
    parent = place.started(2, "--drain-timeout", "250ms", "--log-level", "warning")
    command = ["ps", "-wwo", "command=", "-p", str(min(place.members))]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    words = listed.stdout.split()
    given = words[words.index("work") + 2 :]
    assert given == ["--drain-timeout=0.25", "--log-level=warning", "--log-format=text", "--", "app:worker"]
    assert place.output("err") == ""
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(40) == 0
