"""What the service has done in the background: `aiqueue work tasks:worker`."""

from __future__ import annotations

import asyncio
import os

import aiqueue

PAUSE_S = float(os.environ.get("PAUSE_S", "0.25"))  # in place of a model that writes
SENTENCES = (
    "{topic} is older than it looks.",
    "Most of what is written about {topic} was written by people who had none.",
    "Whoever starts with {topic} is surprised by how quiet it is.",
    "There are two schools of {topic}, and they do not greet each other.",
    "In winter, {topic} is mostly a matter of patience.",
    "Nobody has ever regretted a second look at {topic}.",
)


class Report(aiqueue.Message[int], kind="report", family="reports.live"):
    """A report about a topic; its result is how many lines it has."""

    topic: str
    lines: int


worker = aiqueue.Worker(concurrency=4)


@worker.handle(Report, timeout="5m", retry=aiqueue.Backoff(attempts=3))
async def write(job: aiqueue.Job[Report]) -> int:
    """Write a report, a line each moment; the page shows each line when it is written."""
    asked = job.message
    for number in range(asked.lines):
        await asyncio.sleep(PAUSE_S)
        sentence = SENTENCES[number % len(SENTENCES)].format(topic=asked.topic)
        await job.chunk(f"{number + 1}. {sentence[0].upper()}{sentence[1:]}\n")
        await job.progress((number + 1) / asked.lines, f"{number + 1} of {asked.lines} lines")
    return asked.lines
