"""The one place where what obstore raises becomes reasons with a message that says what to do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import httpx2
from obstore import exceptions

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch.sources.buckets import checksums as bucket_checksums
from lora_operator.fetch.sources.errors import Subject, translate_rest

_STATUS: Final = re.compile(r"status code: (\d{3})\b")
_ADVICE: Final = "write each version to a prefix of its own"


@dataclass(frozen=True)
class BucketSubject(Subject):
    """A folder of a bucket or container, and which kind of source it is."""

    kind: str  # of source
    bucket: str

    def moved(self, what: str) -> ReasonError:
        """SourceChanged, with advice for buckets."""
        return self.changed(what, advice=_ADVICE)

    @property
    def refused(self) -> ReasonError:
        """Unauthorized, with who was refused."""
        if self.authenticated:
            return ReasonError(
                Reason.UNAUTHORIZED,
                f"{self.title} at {self.endpoint} is denied to the credentials of the Secret; put valid ones into it, allow them to list "
                "and to read, or correct the source",
            )
        return ReasonError(
            Reason.UNAUTHORIZED,
            f"{self.title} at {self.endpoint} can't be read anonymously; set source.{self.kind}.credentialsSecretRef, or correct the "
            "source",
        )


def translate(error: Exception, subject: BucketSubject) -> ReasonError:
    """The reason behind `error`; JobFailed with the error's own words when none is known."""
    match error:
        case exceptions.PermissionDeniedError() | exceptions.UnauthenticatedError():
            return subject.refused
        case exceptions.PreconditionError() | bucket_checksums.ChangedError():
            return subject.moved("an object is not the one that was listed")
        case FileNotFoundError() if error.errno is None:
            return subject.moved("an object that was listed is gone")
        case exceptions.BaseError():
            return _from_status(_status_of(error), error, subject)
        case httpx2.HTTPError() | bucket_checksums.NoAnswerError():
            return subject.unreachable(f"{type(error).__name__}: {error}")
    return translate_rest(error, subject.endpoint)


def translate_listing(error: Exception, subject: BucketSubject) -> ReasonError:
    """The same of a listing, where what is not found is the bucket."""
    if isinstance(error, FileNotFoundError) or _status_of(error) == 404:
        return ReasonError(
            Reason.REPOSITORY_NOT_FOUND,
            f"{subject.bucket} does not exist at {subject.endpoint}; correct source.{subject.kind}",
        )
    return translate(error, subject)


def _from_status(status: int | None, error: Exception, subject: BucketSubject) -> ReasonError:
    if status in (401, 403):
        return subject.refused
    if status == 429:
        return ReasonError(Reason.RATE_LIMITED, f"{subject.endpoint} asks for fewer requests (429)")
    return subject.unreachable(str(error))


def _status_of(error: Exception) -> int | None:
    """The status of an answer that obstore has no exception for: those of listings. It stands in the library's own words alone."""
    match = _STATUS.search(str(error)) if isinstance(error, exceptions.BaseError) else None
    return int(match[1]) if match else None
