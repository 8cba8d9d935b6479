"""The one tree of domain errors; foreign exceptions are translated into it at the edge that raised them.

OperatorError
├── ReasonError            a failure that a condition's reason names; constants.REASONS says whether to try again
├── SettingsError          the operator's environment is not usable; it does not start
├── EngineError            an engine pod refused or did not answer
│   ├── EngineUnreachable  no answer, or one that is not understood: try again
│   ├── EngineRefused      an answer other than success; has its HTTP status
│   └── StaleList          409: the pod's plugin holds a newer module list; has the plugin's state
└── KubeError              the API server refused or did not answer
    ├── NotFoundError      404
    ├── ForbiddenError     403: a right is missing, quota or admission refused
    ├── ConflictError      409: exists already, or changed meanwhile
    │   └── AlreadyExistsError  409 of a creation: another object has the name
    ├── InvalidObjectError 400, 413 or 422: the object is not acceptable
    └── UnavailableError   no answer, 401 (a token that just expired), 410, 429 or 5xx: try again
"""

from __future__ import annotations

from typing import Any

from lora_operator.constants import REASONS, Reason, Retry


class OperatorError(Exception):
    """Base of all errors of this project."""


class ReasonError(OperatorError):
    """A failure with a reason of constants.Reason and a message that says what happened, to what, and what to do."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message

    @property
    def retry(self) -> Retry:
        """Whether trying again can help, by the table of reasons."""
        return REASONS[self.reason].retry


class SettingsError(OperatorError):
    """The operator's environment is not usable."""


class EngineError(OperatorError):
    """An engine pod refused a request or did not answer it; the message never holds the gate's token."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class EngineUnreachable(EngineError):  # noqa: N818 - says what is true of the engine
    """No answer from the engine, or one that can't be understood: nothing is known of what it serves."""


class EngineRefused(EngineError):  # noqa: N818
    """The engine answered with another status than success."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class StaleList(EngineError):  # noqa: N818
    """The pod's plugin already holds a newer module list than the one that was sent (409)."""

    def __init__(self, state: Any, message: str = "the pod holds a newer module list") -> None:
        super().__init__(message)
        self.state = state  # a wire.plugin.PluginState


class KubeError(OperatorError):
    """The API server refused a request or did not answer it."""


class NotFoundError(KubeError):
    """The object does not exist (404)."""


class ForbiddenError(KubeError):
    """The request is not allowed: a right is missing, or quota or admission refused (403)."""


class ConflictError(KubeError):
    """The object exists already, or changed meanwhile (409)."""


class AlreadyExistsError(ConflictError):
    """An object of the name exists already (409, AlreadyExists)."""


class InvalidObjectError(KubeError):
    """The API server does not accept the object (400, 413 or 422)."""


class UnavailableError(KubeError):
    """The API server did not answer, or asks to try later (time-out, 401, 410, 429, 5xx)."""
