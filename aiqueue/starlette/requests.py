"""What a request says: whose it is, which job it is about, whether it is a repetition, and what the client has."""

from __future__ import annotations

import re
from typing import Any, Final, overload

from starlette.requests import HTTPConnection

from .. import subjects
from ..client import Handle
from ..errors import BadInput, InvalidToken, NotFound, SettingsError
from ..job import Message
from ..payload import R
from .application import state_of
from .tenant_client import TenantClient

KEY_HEADER: Final = "idempotency-key"
AFTER: Final = "after"  # in the query, of who can send no header
EVENT_ID_MAX: Final = 256
JOB_ID_MAX: Final = 512  # of what a path may name a job by: its id, or its `unique`

_TENANT: Final = "aiqueue_tenant"
_KEY = re.compile(r"[!-~]([ -~]{0,254}[!-~])?")


def set_tenant(connection: HTTPConnection, tenant: str) -> None:
    """Say whose request this is, after it was authenticated: in a middleware, or in a dependency.

    The tenant must come from the authentication, and from nothing that a user can write, such as the path. It must
    match ``[A-Za-z0-9_-]{1,64}``. Raises SettingsError, which is a 500.
    """
    if state_of(connection.scope).tenant is not None:
        raise SettingsError("the lifespan has one tenant for all requests: leave out its tenant=")
    try:
        tenant = subjects.token("tenant", tenant)
    except InvalidToken as error:
        raise SettingsError(f"{error}: map your users to such names") from None
    connection.scope.setdefault("state", {})[_TENANT] = tenant


def queue(connection: HTTPConnection) -> TenantClient:
    """Return the queue of the request's tenant. Raises SettingsError, which is a 500, if the request has none."""
    state = state_of(connection.scope)
    tenant = state.tenant or connection.scope.get("state", {}).get(_TENANT)
    if tenant is None:
        hint = "call set_tenant where it is authenticated, or pass tenant= to the lifespan"
        raise SettingsError(f"{connection.url.path}: the request has no tenant: {hint}")
    return TenantClient(state.client, tenant)


@overload
async def the_job(
    connection: HTTPConnection, *, param: str = "job_id", model: type[Message[R]], family: str | None = None
) -> Handle[R]: ...
@overload
async def the_job(connection: HTTPConnection, *, param: str = "job_id", family: str | None = None) -> Handle[Any]: ...
async def the_job(connection: HTTPConnection, *, param: str = "job_id", **options: Any) -> Handle[Any]:
    """Return the job that the path names, of the request's tenant. `model` and `family`: as of `Client.job`.

    Raises NotFound for a job that there is not, and for that of another tenant; SettingsError, which is a 500, if the
    path has no parameter `param`.
    """
    if param not in connection.path_params:
        raise SettingsError(f"{connection.url.path}: the route has no {{{param}}} in its path: add it, or pass param=")
    found: Handle[Any] = await find_job(queue(connection), connection.path_params[param], **options)
    return found


@overload
async def find_job(
    queue: TenantClient, job_id: str, *, model: type[Message[R]], family: str | None = None
) -> Handle[R]: ...
@overload
async def find_job(queue: TenantClient, job_id: str, *, family: str | None = None) -> Handle[Any]: ...
async def find_job(queue: TenantClient, job_id: str, **options: Any) -> Handle[Any]:
    """Return a job of a tenant. Raises NotFound for whatever can be no job's id, too."""
    if not job_id or len(job_id) > JOB_ID_MAX:
        raise NotFound(f"no job has the id {job_id[:80]!r}")
    found: Handle[Any] = await queue.job(job_id, **options)
    return found


def idempotency_key(connection: HTTPConnection) -> str | None:
    """Return what makes a repeated request one job, as `unique`: of its header Idempotency-Key. None: it has none.

    Raises BadInput if the header is not 1 to 256 printable characters of ASCII.
    """
    return scoped_key(connection, connection.headers.get(KEY_HEADER))


def scoped_key(connection: HTTPConnection, key: str | None) -> str | None:
    """Return a client's key with the method and path that it is for, so that the same key elsewhere is another job."""
    if key is None:
        return None
    if _KEY.fullmatch(key) is None:
        raise BadInput("Idempotency-Key must be 1 to 256 printable ASCII characters")
    return f"{connection.scope.get('method', '')} {connection.url.path} {key}"


def last_event_id(connection: HTTPConnection) -> str | None:
    """Return the id of the last event that the client has; None: it has none.

    By the header Last-Event-ID, which browsers send when they connect again, or else by ``?after=`` in the URL, for a
    page that begins anew. Raises BadInput if it is too long to be one.
    """
    return checked_event_id(connection.headers.get("last-event-id") or connection.query_params.get(AFTER))


def checked_event_id(given: str | None) -> str | None:
    """Return the id of an event that a client has sent; None for an empty one. Raises BadInput."""
    if given and len(given) > EVENT_ID_MAX:
        raise BadInput(f"Last-Event-ID of {len(given):,} characters is no id of an event: send it as it came")
    return given or None
