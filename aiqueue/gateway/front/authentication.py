"""Whose request it is: by the API key in ``Authorization: Bearer``. What has no key reaches no route but health."""

from __future__ import annotations

from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from ..api_key_store import ApiKey
from ..failures import MODEL_NOT_ALLOWED, MODEL_NOT_FOUND
from .context import Front
from .errors import ApiError

OPEN_PATHS: Final = frozenset({"/healthz", "/readyz"})
TOKEN_CHARS_MAX: Final = 512
PRIORITY_HEADER: Final = "x-aiqueue-priority"


class Authentication:
    """ASGI middleware that sets `request.state.key`. Without a valid key the answer is 401."""

    def __init__(self, app: ASGIApp, front: Front) -> None:
        self._app, self._front = app, front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            try:
                key = find_key(self._front, scope)
            except ApiError as error:
                await error.response({"www-authenticate": "Bearer"})(scope, receive, send)
                return
            scope.setdefault("state", {})["key"] = key
        await self._app(scope, receive, send)


def find_key(front: Front, scope: Scope) -> ApiKey:
    """Return the API key of a request. Raises ApiError, without the token."""
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    if not given:
        raise ApiError(401, "no API key: send it as `Authorization: Bearer KEY`", code="missing_api_key")
    kind, _, token = given[0].decode("latin-1").partition(" ")
    token = token.strip()
    if len(given) > 1 or kind.lower() != "bearer" or not token or len(token) > TOKEN_CHARS_MAX or not token.isascii():
        raise ApiError(401, "the header Authorization must be `Bearer KEY`", code="invalid_api_key")
    key = front.keys.find(token)
    if key is None:
        raise ApiError(401, "the API key is not known, or is revoked", code="invalid_api_key")
    return key


def check_model(front: Front, key: ApiKey, model: str) -> None:
    """Raise ApiError if this key may not call a model of this name: 403, or 404 if there is none."""
    if model not in front.config.models:
        known = ", ".join(sorted(front.models_of(key))[:20]) or "none"
        problem = f"there is no model {model[:80]!r}; models of this API key: {known}"
        raise ApiError.of(MODEL_NOT_FOUND, problem)
    if not key.allows(model):
        problem = f"this API key may not call the model {model[:80]!r}"
        raise ApiError.of(MODEL_NOT_ALLOWED, problem)


def priority_of(key: ApiKey, asked: str | None) -> str:
    """Return the lane of a request: as its header asks, else "normal" or the first that its key allows. Raises
    ApiError.
    """
    allowed = key.priorities
    if asked is None:
        return "normal" if key.allows_priority("normal") or not allowed else allowed[0]
    if not key.allows_priority(asked):
        problem = f"this API key may not use the priority {asked[:40]!r}; allowed: {', '.join(allowed or ())}"
        raise ApiError(403, problem, code="priority_not_allowed")
    return asked
