"""What a handler that `perform` calls may ask for: it is recorded in memory, by the checks and codecs of a worker."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

from .. import codec
from ..attempt import RawJob
from ..enqueue import inherited_headers, lane_of_child
from ..errors import BadInput, ChildCancelled, ChildFailed, ChildLost, Corrupt, NotFound, Stale, TooLarge
from ..job import Child, ChildOutcome, ChildSpec, MakeHeaders, Wait
from ..journal import (
    CALLS_MAX,
    CANCELLED,
    CHILDREN_MAX,
    FAILED,
    HEADERS_BYTES,
    LOST,
    RESULT,
    StepNames,
    decode_step,
    encode_call,
    encode_step,
)
from ..payload import Document
from ..subjects import ParentRun
from ..topology import Topology
from .calling import THREADS
from .performed import PerformedChild

PAYLOAD_MAX = 1024 * 1024  # of a message: the default of a server, and that of the embedded one
PIECE_BYTES = 512 * 1024  # of a document
FALLBACK_S = 300.0


class Recorder:
    """One attempt as its handler sees it (it implements `job.Progress`).

    `cancel_requested`: the job was cancelled. `is_over`: the attempt has ended, so that nothing is recorded any more.
    """

    def __init__(self, topology: Topology, raw: RawJob, job_id: str) -> None:
        self.loop = asyncio.get_running_loop()
        self.make_headers: MakeHeaders | None = None  # there is no client
        self._topology = topology
        self._raw = raw
        self._tenant = raw.tenant
        self._is_journaled = bool(raw.family.journal)
        self._parent = ParentRun(raw.family.name, job_id, "1")
        self.documents: dict[str, bytes] = {}  # by SHA-256
        self.steps: dict[str, Any] = {}
        self.earlier: list[Any] = []  # calls of earlier attempts
        self.outcomes: Mapping[str, Any] = {}  # of children, by name
        self.said: list[Any] = []  # the chunks
        self.reported: list[tuple[float, str]] = []
        self.calls: list[Any] = []
        self.children: dict[str, PerformedChild] = {}
        self.settled: float | None = None
        self.cancel_requested = self.is_over = False
        self._names = StepNames()
        self._joiner = codec.TextJoiner()

    @property
    def cancelled(self) -> bool:
        return self.cancel_requested or self.is_over

    @property
    def is_abandoned(self) -> bool:
        """Whether nobody waits any more for what the handler returns."""
        return self.is_over

    def cancel(self) -> None:
        """Note that the job was cancelled."""
        self.cancel_requested = True

    def end(self) -> None:
        """End the attempt: nothing more is recorded."""
        for part in self._joiner.rest():
            self._keep_chunk(part)
        self.is_over = True

    async def progress(self, fraction: float, note: str) -> None:
        self._refuse_if_over()
        entry = codec.encode_marked({"fraction": fraction, "note": note})
        if self._is_journaled:
            data = _decoded(entry.body)
            self.reported.append((data["fraction"], data["note"]))

    async def chunk(self, data: Any) -> None:
        """Raises EncodeError, TooLarge, Stale."""
        self._refuse_if_over()
        if self._is_journaled:
            for part in self._joiner.take(data):
                self._keep_chunk(part)

    def _keep_chunk(self, part: Any) -> None:
        body, size_max = codec.encode_marked(part).body, PAYLOAD_MAX - HEADERS_BYTES
        if len(body) > size_max:
            raise TooLarge(len(body), size_max)
        self.said.append(_decoded(body))

    def settle(self, cost: float) -> None:
        if self.is_over:
            raise Stale("this attempt is over: what it has used is settled", ended=False)
        self.settled = cost

    async def begin_call(self, cost: float | None, key: str) -> list[Any] | None:
        """No limits are heeded: the handler may start."""
        return None

    async def chunks(self, document: Document) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of a document. Raises NotFound, Corrupt; BadInput for another tenant's."""
        if document.tenant != self._tenant:
            raise BadInput(f"a document of tenant {document.tenant} cannot be read by a job of {self._tenant}")
        data = self.documents.get(document.sha256)
        name = f"{document.tenant}/{document.sha256}"
        if data is None:
            raise NotFound(f"document {name} is not stored: pass its bytes, as in documents={{document: data}}")
        if len(data) != document.size:
            raise Corrupt(f"document {name}: what is stored has another size or hash than the document that was put")
        for start in range(0, len(data), PIECE_BYTES):
            yield data[start : start + PIECE_BYTES]

    async def begin_step(self, name: str) -> tuple[Any] | None:
        """Raises BadInput, Stale."""
        self._refuse_if_over()
        self._names.use(name)
        return (self.steps[name],) if name in self.steps else None

    async def find_encoded_step(self, name: str) -> bytes | None:
        self._refuse_if_over()
        return encode_step(name, self.steps[name]).body if name in self.steps else None

    async def keep_step(self, name: str, result: Any) -> Any:
        """Return the result as a later attempt gets it. Raises EncodeError, Stale."""
        encoded = encode_step(name, result)
        other = await self.keep_encoded_step(name, encoded)
        return decode_step(name, encoded.body if other is None else other)

    async def keep_encoded_step(self, name: str, encoded: codec.Encoded) -> bytes | None:
        self._refuse_if_over()
        if name in self.steps:
            return encode_step(name, self.steps[name]).body
        self.steps[name] = decode_step(name, encoded.body)
        return None

    async def run_in_thread(self, function: Callable[[], Any]) -> Any:
        return await THREADS.run(function)

    async def keep_call(self, data: Any) -> None:
        """Raises EncodeError, TooLarge, BadInput, Stale."""
        self._refuse_if_over()
        encoded = encode_call(data)
        if len(self.earlier) + len(self.calls) >= CALLS_MAX:
            raise BadInput(f"a run keeps at most {CALLS_MAX:,} notes of calls: note several calls at once")
        self.calls.append(_decoded(encoded.body)["data"])

    async def earlier_calls(self) -> list[Any]:
        self._refuse_if_over()
        return list(self.earlier)

    async def enqueue_children(self, specs: Sequence[ChildSpec]) -> list[Child]:
        """Raises BadInput (UnknownFamily, DecodeError), Stale."""
        self._refuse_if_over()
        inherited_headers(self._parent, self._raw.headers, self._raw.deadline)  # refuses too many ancestors
        children = []
        for spec in specs:
            lane = lane_of_child(self._topology, spec, self._tenant, self._raw.priority)
            job_id = self._parent.child_id(self._tenant, spec.name, 0)
            known = self.children.setdefault(
                spec.name,
                PerformedChild(
                    spec.name, job_id, spec.kind, spec.family, lane.priority, codec.decode_map(spec.body, codec.CBOR),
                    spec.delay_s, spec.deadline_s, spec.headers,
                ),
            )  # fmt: skip
            is_duplicate = spec.name in self.outcomes  # an earlier attempt has enqueued it
            children.append(Child(spec.name, known.id, spec.family, self._tenant, known.priority, is_duplicate))
        if len(self.children) > CHILDREN_MAX:
            raise BadInput(f"a run has at most {CHILDREN_MAX:,} children: give one child several items")
        return children

    async def gather_children(self, specs: Sequence[ChildSpec], names: Sequence[str]) -> Sequence[ChildOutcome] | Wait:
        """Return the outcomes that were given for these children, or that the job waits for those without any."""
        await self.enqueue_children(specs)
        if missing := next((name for name in names if name not in self.children), None):
            raise BadInput(f"there is no child {missing!r}: enqueue it, or pass its name and its message")
        waits_for = [name for name in names if name not in self.outcomes]
        if waits_for:
            return Wait(1, len(waits_for), FALLBACK_S)
        return [self._outcome_of(name) for name in names]

    def _outcome_of(self, name: str) -> ChildOutcome:
        job_id, value = self.children[name].id, self.outcomes[name]
        match value:
            case ChildLost():
                return ChildOutcome(job_id, LOST, None, LOST, value.error, 0)
            case ChildCancelled():
                return ChildOutcome(job_id, CANCELLED, None, value.reason, value.error, value.attempt)
            case ChildFailed():
                return ChildOutcome(job_id, FAILED, None, value.reason, value.error, value.attempt)
            case BaseException():
                raise BadInput(
                    f"children: {name!r}: give a result, or ChildFailed, ChildCancelled or ChildLost of aiqueue.errors"
                )
            case _:
                return ChildOutcome(job_id, RESULT, codec.encode_marked(value).body, "", "", 1)

    def _refuse_if_over(self) -> None:
        """Raises Stale if the job was cancelled, or the attempt is over."""
        if self.cancel_requested:
            raise Stale("the job was cancelled", ended=True)
        if self.is_over:
            raise Stale("this attempt is over: it can write nothing more for its job", ended=False)


def document(data: bytes, *, tenant: str = "test", name: str = "", content_type: str = "") -> Document:
    """Return the document that ``client.documents.put(data, tenant=tenant)`` would return, without storing it.

    For `perform`: ``perform(worker, Read(document=found), documents={found: data})``. Raises BadInput for no bytes.
    """
    if not isinstance(data, bytes):
        raise BadInput(f"testing.document needs bytes, not {type(data).__name__}: encode a text first")
    sha256 = hashlib.sha256(data).hexdigest()
    return Document(tenant=tenant, sha256=sha256, size=len(data), name=name, content_type=content_type)


def _decoded(body: bytes) -> Any:
    return codec.decode(body, codec.CBOR, max_bytes=len(body))
