"""What the server does not permit this user: who waits for it learns of it at once, and the log once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from ..errors import AccessDenied
from .faults import denied, denied_right, error_text, translate
from .listeners import Listeners
from .reply_inbox import ReplyInbox
from .subscription import Subscription

log = logging.getLogger(__name__)

LOGGED_ERRORS_MAX = 100

DeniedCallback = Callable[[str, AccessDenied], None]


class Permissions:
    """Takes the errors of a connection that no call raises, and passes on those about missing permissions."""

    def __init__(
        self, replies: ReplyInbox, subscriptions: Iterable[Subscription], is_probing: Callable[[], bool]
    ) -> None:
        """`is_probing`: whether a request is under way that need not be permitted. Denials are not logged then."""
        self._replies = replies
        self._subscriptions = subscriptions
        self._is_probing = is_probing
        self._listeners: Listeners[DeniedCallback] = Listeners()
        self._logged: set[str] = set()  # since the last reconnect: each is logged once
        self.denied_inbox = ""  # the reply inbox, if this user may not subscribe to it

    def listen(self, callback: DeniedCallback) -> Callable[[], None]:
        """Call `callback` with the subject and the error of each denied publish. Returns a function that ends this."""
        return self._listeners.add(callback)

    def on_error(self, error: Exception) -> None:
        """Handle an error that no call raises. A denied right ends the calls that wait for it; the rest is logged."""
        if isinstance(translate(error, "NATS"), AccessDenied):
            right = denied_right(error)
            if right is not None:
                self._on_denied(*right)
            if not self._is_probing():
                self.log_once(error_text(error))
        elif type(error).__module__.startswith("nats.") or isinstance(error, OSError | TimeoutError):
            level = logging.WARNING if "slow consumer" in str(error) else logging.DEBUG  # messages were dropped
            log.log(level, "error from the server: %s", error_text(error))
        else:
            log.error("nats-py failed: %s", error_text(error), exc_info=error)

    def _on_denied(self, verb: str, subject: str) -> None:
        problem = denied(verb, subject)
        if verb == "publish":
            self._replies.deny_subject(subject.lower())
            for callback in self._listeners.all():
                callback(subject, problem)
        elif subject.lower() == f"{self._replies.inbox}*".lower():
            self.denied_inbox = f"{self._replies.inbox}*"
        else:
            for subscription in list(self._subscriptions):
                if subscription.subject.lower() == subject.lower():
                    subscription.deny(problem)

    def forget_logged(self) -> None:
        """After a reconnect: log errors again."""
        self._logged.clear()

    def log_once(self, problem: str) -> None:
        if problem not in self._logged and len(self._logged) < LOGGED_ERRORS_MAX:
            self._logged.add(problem)
            log.error("the server refused an operation: %s", problem)
