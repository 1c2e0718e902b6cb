"""A shop's tasks, as moved from Celery: docs/guides/from-flower.md asks it what operators ask Flower."""

import time

import aiqueue


class Fetch(aiqueue.Message[str], kind="fetch", family="shop.jobs"):
    url: str


class Mail(aiqueue.Message[str], kind="mail", family="shop.jobs"):
    to: str
    account: str = "smtp"  # streams/limits.toml has its rate limit


class Report(aiqueue.Message[int], kind="report", family="shop.reports"):
    customer: str
    seconds: float = 0


class Total(aiqueue.Message[int], kind="total", family="shop.reports"):
    customers: list[str]


worker = aiqueue.Worker(owner="shop", concurrency=2)
ONCE = aiqueue.Backoff(attempts=1)  # as in Celery: only what `on` names is retried, and no timeout


@worker.handle(Fetch, retry=ONCE, on={OSError: aiqueue.Backoff(attempts=4, first="1m", cap="10m")})
def fetch(job: aiqueue.Job[Fetch]) -> str:
    url = job.message.url
    if not url.startswith("https:"):
        raise ValueError(f"only https: {url}")
    if "down" in url:
        raise OSError(f"no answer from {url}")
    return f"the page of {url}"


@worker.handle(Mail, retry=ONCE)
def mail(job: aiqueue.Job[Mail]) -> str:
    return f"sent to {job.message.to}"


@worker.handle(Report, retry=ONCE, timeout="10m", process=True)
def report(job: aiqueue.Job[Report]) -> int:
    time.sleep(job.message.seconds)
    return len(job.message.customer)


@worker.handle(Total, retry=ONCE)
async def total(job: aiqueue.Job[Total]) -> int:
    return sum(await job.gather([(each, Report(customer=each)) for each in job.message.customers]))
