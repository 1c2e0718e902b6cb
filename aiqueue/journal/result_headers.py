"""The headers of results that are sent without a `Writer`."""

from __future__ import annotations

from .. import headers
from ..connection import block
from .entries import RESULT, entry_headers, kind_header
from .writer import Retention, msg_id_of

KINDS_MAX = 1_000  # for which templates are kept: a handler may run any kind


class ResultHeaders:
    """The headers of results that are the first entries of their jobs' journals, prepared for one family."""

    def __init__(self, retention: Retention) -> None:
        fields = entry_headers(RESULT, 0, 1, 1, "") | {headers.RUN: "%d", headers.MSG_ID: "%b", headers.EXPECTED: "0"}
        fields |= retention.ttl_header(RESULT) | {headers.ENQUEUED: "%.6f", headers.STARTED_AT: "%.6f"}
        self._fields = fields
        self._templates: dict[str, bytes] = {}  # by kind

    def block(self, subject: str, kind: str, run: int, nonce: str, enqueued_at: float, started_at: float) -> bytes:
        """Return what `Writer.write` would send as its first entry, encoded. `nonce`: as that of one writer."""
        template = self._templates.get(kind) or self._make_template(kind)
        return template % (run, msg_id_of(subject, nonce, 1, 1).encode(), enqueued_at, started_at)

    def _make_template(self, kind: str) -> bytes:
        template = block(self._fields | {name: text.replace("%", "%%") for name, text in kind_header(kind).items()})
        if len(self._templates) < KINDS_MAX:
            self._templates[kind] = template
        return template
