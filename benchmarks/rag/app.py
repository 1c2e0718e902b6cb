"""The worker that the scenarios start: that of ``aiqueue work aiqueue.rag:worker``, with an embedder that writes down
what it is given.
"""

from __future__ import annotations

import os
from pathlib import Path

from aiqueue.rag import RagWorker

from . import parts
from .bench import DELAY_ENV, WITNESS_ENV
from .witness import Witness

worker = RagWorker(embedder=Witness(parts.open_embedder(), Path(os.environ[WITNESS_ENV]), float(os.environ[DELAY_ENV])))
