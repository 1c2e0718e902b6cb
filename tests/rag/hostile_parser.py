"""A parser of a user's that does what no parser should."""

from __future__ import annotations

import os
import resource
import signal
import time

from aiqueue.rag import DocumentSource, ParsedDocument, Section


class HostileParser:
    """Does to its process what the document says."""

    format = "hostile"
    suffixes = (".hostile",)
    content_types = ()
    in_child = True

    def recognises(self, head: bytes, source: DocumentSource) -> bool:
        return False

    def parse(self, content: bytes, source: DocumentSource) -> ParsedDocument:
        match content:
            case b"exit":
                os._exit(7)
            case b"abort":
                os.abort()
            case b"spin":
                while True:
                    pass
            case b"sleep":
                time.sleep(60)
            case b"memory":
                bytearray(10 * 1024**3)
            case b"exit later":
                signal.signal(signal.SIGALRM, lambda *_: os._exit(8))
                signal.setitimer(signal.ITIMER_REAL, 0.05)
            case b"limits":
                limits = [resource.getrlimit(each)[0] for each in (resource.RLIMIT_AS, resource.RLIMIT_CORE)]
                return ParsedDocument("", [Section("", str(limits))])
            case b"bad fields":
                return ParsedDocument("", [Section("", 5)])  # type: ignore[arg-type]
        return ParsedDocument("", [Section("", content.decode())])
