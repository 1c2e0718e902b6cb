import aiqueue.attempt.handler as H
from aiqueue.worker.context import JobContext
from aiqueue.attempt.outcome_types import Raised
if not hasattr(H.Handler,'cost'): H.Handler.cost=None
if not hasattr(JobContext,'settled'): JobContext.settled=None
if not hasattr(Raised,'pauses_key'): Raised.pauses_key=False
