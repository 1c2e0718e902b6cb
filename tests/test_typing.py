"""What mypy --strict says of user code: aiqueue is typed end to end."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PRELUDE = """
    import aiqueue

    class Summarise(aiqueue.Message, kind="summarise"):
        text: str

    class Translate(aiqueue.Message, kind="translate"):
        language: str

    worker = aiqueue.Worker()
    agent = aiqueue.Agent("a", tenant="acme")
    """

RIGHT = """
    @worker.handle(Summarise, retry=aiqueue.Backoff(attempts=5), timeout="2m")
    async def summarise(job: aiqueue.Job[Summarise]) -> str:
        await job.progress(0.5, "reading")
        return job.message.text

    class Busy(Exception):
        after: float = 1.0

    def after(error: Busy) -> float:
        return error.after

    @worker.handle(
        Translate,
        on={ValueError: aiqueue.Reject, OSError: aiqueue.Backoff(first="9s"), KeyError: lambda _: None, Busy: after},
    )
    def translate(job: aiqueue.Job[Translate]) -> int:
        return len(job.message.language)

    def any_job(job: aiqueue.Job[aiqueue.Message]) -> None: ...

    worker.handle(Summarise)(any_job)

    @worker.handle_any("agent.tasks", retry=aiqueue.Backoff(attempts=5), process=False)
    async def every_kind(job: aiqueue.Job[aiqueue.RawMessage]) -> int:
        return len(job.message.body) + len(job.message.decode())
    """

WRONG = """
    @worker.handle(Summarise)
    async def translate(job: aiqueue.Job[Translate]) -> str:
        return job.message.language
    """

UNKNOWN_FIELD = """
    @worker.handle(Summarise)
    async def summarise(job: aiqueue.Job[Summarise]) -> str:
        return job.message.language
    """


WRONG_MAIL = """
    from aiqueue.agent import Mail

    @agent.handle(Summarise)
    async def translate(mail: Mail[Translate]) -> None: ...
    """

RIGHT_MAIL = """
    from aiqueue.agent import Mail

    @agent.handle(Summarise)
    async def summarise(mail: Mail[Summarise]) -> None:
        said = await agent.request(Translate(language="de"), to="b", reply=Summarise)
        await mail.reply(Translate(language=said.message.text))

    @agent.handle_any()
    def every_kind(mail: Mail[aiqueue.RawMessage]) -> None:
        print(mail.kind, mail.message.body)
    """

WRONG_RAW = """
    @worker.handle_any("agent.tasks")
    async def translate(job: aiqueue.Job[Translate]) -> None: ...
    """

NO_POLICY = """
    @worker.handle(Summarise, on={ValueError: "reject"})
    async def summarise(job: aiqueue.Job[Summarise]) -> str:
        return job.message.text
    """


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        pytest.param(RIGHT, "", id="right"),
        pytest.param(WRONG, "Callable[[Job[Summarise]]", id="wrong"),
        pytest.param(RIGHT_MAIL, "", id="right_mail"),
        pytest.param(WRONG_MAIL, "Callable[[Mail[Summarise]]", id="wrong_mail"),
        pytest.param(WRONG_RAW, "Callable[[Job[RawMessage]]", id="wrong_raw"),
        pytest.param(NO_POLICY, '"str"; expected', id="no_policy"),
        pytest.param(UNKNOWN_FIELD, 'has no attribute "language"', id="unknown_field"),
    ],
)
def test_mypy_strict_refuses_a_handler_for_another_message_than_it_takes_and_what_is_no_policy(
    tmp_path: Path, code: str, complaint: str, request: pytest.FixtureRequest
) -> None:
    app = f"{request.node.callspec.id}.py"  # a name of its own: the cache that they share goes by it
    (tmp_path / app).write_text(textwrap.dedent(PRELUDE) + textwrap.dedent(code))
    root = Path(__file__).parent.parent
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file", "", "--cache-dir", str(root / ".mypy_cache"), app],
        cwd=tmp_path, env={"MYPYPATH": str(root), "PATH": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if complaint:
        assert ran.returncode == 1
        assert complaint in ran.stdout
    else:
        assert ran.returncode == 0, ran.stdout
