"""The job of a batch."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic

from ...job import Message
from ...payload import Document


class GatewayBatch(Message[dict[str, Any]], kind="gateway.batch", family="gateway.batches"):
    """A batch that is to be run: what it asks for stands in the bucket. `input`: held for as long as the job exists."""

    batch_id: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    """Id of the batch, which is the id of its job."""
    input: Document
