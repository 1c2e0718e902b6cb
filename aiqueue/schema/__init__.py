"""Documents for programs in other languages: AsyncAPI and JSON Schema of the families, and of the kinds that a program
handles.

Plain values: reads classes and declarations, asks no server, and may not run handlers. What a document says of the wire
is what docs/reference/wire-contract.md says.
"""

from __future__ import annotations

from .asyncapi import ASYNCAPI, make_asyncapi
from .bundle import make_json_schema
from .kinds import HandledKind, select
from .servers import describe_servers

__all__ = ["ASYNCAPI", "HandledKind", "describe_servers", "make_asyncapi", "make_json_schema", "select"]
