"""From a message to its body and back, and from a job's result to the type that its message declares.

This room may not know jobs: a message is a pydantic model here.
"""

from __future__ import annotations

from .messages import encode_message, error_text, parse_message
from .results import R, R_co, TypedModel, parse_result

__all__ = ["R", "R_co", "TypedModel", "encode_message", "error_text", "parse_message", "parse_result"]
