"""The queue as one tenant may use it."""

from __future__ import annotations

from typing import Any, Unpack, overload

from ..client import Client, EnqueueOptions, Handle, RequestOptions
from ..errors import ConfigMismatch, NotFound
from ..job import Message
from ..payload import R


class TenantClient:
    """The queue of one tenant: what is enqueued is this tenant's, and only its jobs are found.

    `client`: the application's open client, for what has nothing to do with a tenant.
    """

    def __init__(self, client: Client, tenant: str) -> None:
        self.client, self.tenant = client, tenant

    async def enqueue(self, message: Message[R], **options: Unpack[EnqueueOptions]) -> Handle[R]:
        """Store one job, as `Client.enqueue`. Raises ConfigMismatch if its stream is missing."""
        try:
            return await self.client.enqueue(message, tenant=self.tenant, **options)
        except NotFound as error:  # not for the caller, to whom it would mean that the job was not found
            raise ConfigMismatch(str(error)) from error

    async def request(self, message: Message[R], **options: Unpack[RequestOptions]) -> R:
        """Request the result of a message's job, and return it, as `Client.request`."""
        return await self.client.request(message, tenant=self.tenant, **options)

    @overload
    async def job(self, job_id: str, *, model: type[Message[R]], family: str | None = None) -> Handle[R]: ...
    @overload
    async def job(self, job_id: str, *, family: str | None = None) -> Handle: ...
    async def job(self, job_id: str, *, model: type[Message[Any]] | None = None, family: str | None = None) -> Handle:
        """Return the handle of a job of this tenant, as `Client.job`. A job of another tenant is NotFound, too."""
        if model is None:
            return await self.client.job(job_id, family=family, tenant=self.tenant)
        return await self.client.job(job_id, model=model, family=family, tenant=self.tenant)
