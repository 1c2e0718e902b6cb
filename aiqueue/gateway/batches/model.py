"""Files and batches as they are stored, and as OpenAI's clients see them. Pure: no server, no clock."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal, NamedTuple, Self

from ...errors import AIQueueError, BadInput
from ...payload import Document

Status = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]  # fmt: skip
ENDED: Final = frozenset({"failed", "completed", "expired", "cancelled"})
BATCH_ENDPOINTS: Final = ("/v1/chat/completions", "/v1/embeddings")
"""The paths of the requests that a batch may have, as OpenAI names them."""
WINDOW_S: Final = 24 * 3600.0  # OpenAI's only completion_window, "24h"
PURPOSES: Final = ("batch", "batch_output")  # of files: uploaded, and made by a batch
Part = tuple[str, int]  # SHA-256 and size of a document


class BatchQuota(AIQueueError):
    """A tenant has as many files, bytes or batches as it may have. Nothing was stored."""


@dataclass(frozen=True, slots=True)
class BatchQuotas:
    """What a tenant may have: bytes of a file, files and their bytes together, lines of a batch, and batches that have
    not ended.
    """

    file_bytes: int = 200 * 1024 * 1024
    """Maximum of bytes of one file."""
    files: int = 1_000
    """Maximum of files of a tenant."""
    total_bytes: int = 2 * 1024**3
    """Maximum of bytes of all files of a tenant together."""
    lines: int = 50_000
    """Maximum of lines of one batch."""
    batches: int = 20
    """Maximum of batches of a tenant that have not ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFile:
    """A file of a tenant. Its bytes are a document. Times: seconds since the epoch."""

    id: str
    """The file's id, such as in `input_file_id`."""
    tenant: str
    """Tenant that the file belongs to."""
    filename: str
    """Name that the uploader has given."""
    size: int
    """How many bytes the file has."""
    sha256: str
    """Hash of the bytes, in hexadecimal digits."""
    purpose: str
    """"batch" for an input, "batch_output" for an output."""
    created_at: int
    """When the file was stored."""
    expires_at: int
    """When the file is deleted."""

    @property
    def document(self) -> Document:
        """The bytes of the file, as a document of the tenant."""
        return Document(tenant=self.tenant, sha256=self.sha256, size=self.size)

    def plain(self) -> dict[str, Any]:
        """Return the file as it is stored, in JSON."""
        return {name: getattr(self, name) for name in _FILE_FIELDS}

    @classmethod
    def parse(cls, tenant: str, plain: dict[str, Any]) -> Self:
        """Read a stored file. What a later version has added is ignored. Raises BadInput."""
        try:
            found = cls(tenant=tenant, **{key: plain[key] for key in _FILE_FIELDS})
            found.document  # noqa: B018  (it is checked)
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"a stored file of tenant {tenant} is damaged: {error}") from None
        return found

    def public(self) -> dict[str, Any]:
        """Return OpenAI's file object."""
        return {
            "id": self.id, "object": "file", "bytes": self.size, "created_at": self.created_at,
            "expires_at": self.expires_at, "filename": self.filename, "purpose": self.purpose, "status": "processed",
            "status_details": None,
        }  # fmt: skip


_FILE_FIELDS = tuple(each.name for each in fields(BatchFile) if each.name != "tenant")


class LineProblem(NamedTuple):
    """Why a batch is refused. `line`: its number in the file, from 1; None: the problem is of no line."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestBatch:
    """A batch: what it asks for, how far it is, and what of its output is stored. Times: seconds since the epoch.

    - `input`: SHA-256 and size of the input. `models`: that it may call; None: all. `headers`: of its lines' jobs.
    - `times`: by OpenAI's names, such as ``in_progress_at``.
    - `total`, `completed`, `failed`: numbers of lines. `stopped`: those of the failed ones that were not called,
      because the batch was cancelled or has expired. `usage`: tokens of prompts, cached ones, completions, and
      those of reasoning.
    - `month`: of the budget in which the batch has reserved `reserved_micros` for its lines; "": it has not.
    - `owner`: the execution that writes. `line`, `offset`: all lines up to this number, and byte, are in the parts.
      `done`: ranges of numbers above `line` that are in them, too. `sent`: no line above it has a job.
    - `output`, `error_output`: the parts, each of which ends with a line.
    - `failed_run`: the run of its job that has failed, after which it is run once more, to end it; 0: none has.
    - `seq`: the sequence under which it is stored; 0: it is not. `written_at`: when it was written.
    """

    id: str
    """The batch's id."""
    tenant: str
    """Tenant that the batch belongs to."""
    endpoint: str
    """Path of OpenAI's API that each line calls, such as /v1/embeddings."""
    input_file_id: str
    """Id of the file with the requests."""
    input: Part
    completion_window: str
    """Within which time the batch ends, "24h"."""
    created_at: int
    """When the batch was created."""
    expires_at: int
    """When the batch ends, even if lines are left."""
    status: Status = "validating"
    """How far the batch is, in OpenAI's words, such as "in_progress"."""
    metadata: dict[str, str] | None = None
    """Texts of the caller, by name; None: none."""
    models: tuple[str, ...] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    output_keep_s: int
    """How long the output files are kept, in seconds."""
    times: dict[str, int] = field(default_factory=dict)
    problems: tuple[LineProblem, ...] = ()
    """Why the batch was refused or has failed."""
    total: int = 0
    completed: int = 0
    failed: int = 0
    stopped: int = 0
    usage: tuple[int, int, int, int] = (0, 0, 0, 0)
    month: str = ""
    reserved_micros: int = 0
    """Micro-dollars that the batch has reserved from the tenant's budget for its lines."""
    owner: str = ""
    line: int = 0
    offset: int = 0
    done: tuple[tuple[int, int], ...] = ()
    sent: int = 0
    output: tuple[Part, ...] = ()
    error_output: tuple[Part, ...] = ()
    output_file_id: str | None = None
    """Id of the file with the answers; None: there is none yet."""
    error_file_id: str | None = None
    """Id of the file with the errors; None: there is none."""
    failed_run: int = 0
    seq: int = 0
    written_at: float = 0.0

    @property
    def has_ended(self) -> bool:
        """Whether all lines are answered, or the batch failed, expired or was cancelled."""
        return self.status in ENDED

    @property
    def document(self) -> Document:
        """The bytes of the input file, as a document of the tenant."""
        return Document(tenant=self.tenant, sha256=self.input[0], size=self.input[1])

    @property
    def ended(self) -> int:
        """How many lines have ended."""
        return self.completed + self.failed

    def plain(self) -> dict[str, Any]:
        """Return the batch as it is stored, in JSON."""
        return {name: getattr(self, name) for name in _BATCH_FIELDS}

    @classmethod
    def parse(cls, tenant: str, plain: dict[str, Any], *, seq: int, written_at: float) -> Self:
        """Read a stored batch. What a later version has added is ignored. Raises BadInput."""
        try:
            known = {key: value for key, value in plain.items() if key in _BATCH_FIELDS}
            for key in ("done", "output", "error_output"):
                known[key] = tuple((first, second) for first, second in known[key])
            known["problems"] = tuple(LineProblem(*each) for each in known["problems"])
            known["input"], known["usage"] = tuple(known["input"]), tuple(known["usage"])
            known["models"] = None if known["models"] is None else tuple(known["models"])
            return cls(tenant=tenant, seq=seq, written_at=written_at, **known)
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"a stored batch of tenant {tenant} is damaged: {error}") from None

    def public(self) -> dict[str, Any]:
        """Return OpenAI's batch object."""
        prompt, cached, completion, reasoning = self.usage
        errors = [{**each._asdict()} for each in self.problems]
        times = {name: self.times.get(name) for name in _TIMES}
        return {
            "id": self.id, "object": "batch", "endpoint": self.endpoint,
            "errors": {"object": "list", "data": errors} if errors else None,
            "input_file_id": self.input_file_id, "completion_window": self.completion_window, "status": self.status,
            "output_file_id": self.output_file_id, "error_file_id": self.error_file_id, "created_at": self.created_at,
            "expires_at": self.expires_at, **times,
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "usage": {
                "input_tokens": prompt, "input_tokens_details": {"cached_tokens": cached}, "output_tokens": completion,
                "output_tokens_details": {"reasoning_tokens": reasoning}, "total_tokens": prompt + completion,
            },
            "metadata": self.metadata,
        }  # fmt: skip


_BATCH_FIELDS = tuple(each.name for each in fields(RequestBatch) if each.name not in ("tenant", "seq", "written_at"))
_TIMES = (
    "in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at", "cancelled_at",
)  # fmt: skip
