"""The one tree of domain errors; foreign exceptions are translated into it at the edge that raised them.

OperatorError
├── ReasonError            a failure that a condition's reason names; constants.REASONS says whether to try again
└── KubeError              the API server refused or did not answer
    ├── NotFoundError      404
    ├── ForbiddenError     403: a right is missing, quota or admission refused
    ├── ConflictError      409: exists already, or changed meanwhile
    ├── InvalidObjectError 400 or 422: the object is not acceptable
    └── UnavailableError   no answer, 429 or 5xx: try again
"""

from __future__ import annotations

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


class KubeError(OperatorError):
    """The API server refused a request or did not answer it."""


class NotFoundError(KubeError):
    """The object does not exist (404)."""


class ForbiddenError(KubeError):
    """The request is not allowed: a right is missing, or quota or admission refused (403)."""


class ConflictError(KubeError):
    """The object exists already, or changed meanwhile (409)."""


class InvalidObjectError(KubeError):
    """The API server does not accept the object (400 or 422)."""


class UnavailableError(KubeError):
    """The API server did not answer, or asks to try later (time-out, 429, 5xx)."""
