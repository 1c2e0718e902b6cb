"""A suite that tests any VectorStore by its protocol. For a store of your own, in a file of your tests:

    from aiqueue.rag.store.conformance import StoreConformance

    class TestMyStore(StoreConformance):
        def connect(self):
            return MyStore("…")

`python -m pytest` then runs about 30 tests, without a plugin. `connect` is called once or twice a test, and returns a
new object for the same data each time. Every test has tenants of its own, so that nothing need be deleted between.
"""

from __future__ import annotations

from .documents import DocumentsSuite
from .questions import QuestionsSuite

__all__ = ["StoreConformance"]


class StoreConformance(DocumentsSuite, QuestionsSuite):
    """Subclass it, and give `connect`."""
