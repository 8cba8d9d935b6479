"""The one place where foreign exceptions of a Hub's Job become reasons with a message that says what to do.

The Hub answers 401 for unknown and for private repositories alike when no token is sent, for any repository when the token is no good,
and 404 to a good token that may not see the repository. Decisions are made on status and error code, never on message texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import httpx2
from huggingface_hub.errors import FileMetadataError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text
from lora_operator.fetch.sources.errors import Subject, unforeseen
from lora_operator.fetch.volume import layout
from lora_operator.wire.jobs import HuggingFaceRequest

_SERVER_TEXT_BYTES: Final = 300


@dataclass(frozen=True)
class HubSubject(Subject):
    """A repository of a Hub."""

    source: HuggingFaceRequest

    @classmethod
    def of(cls, source: HuggingFaceRequest, *, authenticated: bool) -> HubSubject:
        """The subject of a request; its endpoint is without a trailing slash."""
        return cls(source.repo, source.endpoint.rstrip("/"), authenticated, source)

    @property
    def repo(self) -> str:
        """The repository with its Hub: `org/name at https://hub`."""
        return f"{self.title} at {self.endpoint}"


def translate(error: BaseException, subject: HubSubject) -> ReasonError:
    """The reason behind `error`, found along its chain of causes; JobFailed with the error's own words when none is known."""
    chain = list(_chain(error))
    for link in chain:
        found = _translate_one(link, subject)
        if found is not None:
            return found
    # The library's own complaints about incomplete or inconsistent answers are OSErrors without a number.
    for link in chain:
        if isinstance(link, OSError) and link.errno is None:
            return subject.unreachable(f"{type(link).__name__}: {link}")
    return unforeseen(error)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, then its causes: the library wraps what the Hub answered in 'not found in the local cache'."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _translate_one(error: BaseException, subject: HubSubject) -> ReasonError | None:
    match error:
        case ReasonError():
            return error
        case HfHubHTTPError():
            return _from_answer(error, subject)
        case httpx2.TimeoutException():
            return subject.unreachable(f"no answer in time ({type(error).__name__})")
        case httpx2.RequestError() | httpx2.InvalidURL():
            return subject.unreachable(f"{type(error).__name__}: {error}")
        case FileMetadataError():
            return subject.unreachable(f"it does not answer like a Hugging Face Hub: {error}")
        case HFValidationError():
            return ReasonError(Reason.REPOSITORY_NOT_FOUND, f"{subject.source.repo!r} is not a repository id: {error}")
        case OfflineModeIsEnabled():
            return subject.unreachable("this Job is in offline mode")
        case OSError():
            return layout.from_system(error)
    return None


def _from_answer(error: HfHubHTTPError, subject: HubSubject) -> ReasonError:
    response = error.response
    status, code = response.status_code, response.headers.get("X-Error-Code", "")
    said = _server_words(error)
    if status == 429:
        wait = text.clean(response.headers.get("Retry-After", ""), limit=64)
        message = f"{subject.source.endpoint} asks for fewer requests (429)" + (
            f", and to wait {wait} s" if wait else ""
        )
        return ReasonError(Reason.RATE_LIMITED, message + said)
    if status >= 500 or status == 408:
        return subject.unreachable(f"server error {status}{said}")
    if not _from_endpoint(response, subject):
        # Signed addresses of the Hub's storage run out after a while; the Hub hands out new ones to whoever may read.
        return subject.unreachable(f"its storage at {response.request.url.host} answered {status}{said}")
    if code == "RevisionNotFound":
        return ReasonError(
            Reason.REVISION_NOT_FOUND,
            f"{subject.repo} has no branch, tag or commit {subject.source.revision!r}; correct source.huggingFace.revision",
        )
    if code == "EntryNotFound":
        return ReasonError(Reason.ENTRY_NOT_FOUND, f"a file vanished from {subject.repo}: {_path(response)}")
    if code == "GatedRepo":
        return ReasonError(Reason.UNAUTHORIZED, _gated(subject))
    if status == 401:
        return ReasonError(Reason.UNAUTHORIZED, _unauthorized(subject) + said)
    if status == 403:
        return ReasonError(Reason.UNAUTHORIZED, f"{subject.repo} forbids access (403) to {_who(subject)}{said}")
    if status in (404, 410):
        return ReasonError(Reason.REPOSITORY_NOT_FOUND, _not_found(subject))
    return subject.unreachable(f"unexpected answer {status}{said}")


def _unauthorized(subject: HubSubject) -> str:
    if subject.authenticated:
        return f"{subject.source.endpoint} refused the token (401) for {subject.source.repo}; put a valid token into the Secret"
    return (
        f"{subject.repo} does not exist, or is private and needs a token (401); "
        "correct source.huggingFace.repo or set tokenSecretRef"
    )


def _not_found(subject: HubSubject) -> str:
    if subject.authenticated:
        return f"{subject.repo} does not exist, or this token may not see it (404); correct the repository or use another token"
    return f"{subject.repo} does not exist (404); correct source.huggingFace.repo"


def _gated(subject: HubSubject) -> str:
    page = f"{subject.source.endpoint.rstrip('/')}/{subject.source.repo}"
    if subject.authenticated:
        return f"{subject.source.repo} is gated and this token's account has no access; request it at {page}"
    return (
        f"{subject.source.repo} is gated: request access at {page}, then set tokenSecretRef to a token of that account"
    )


def _who(subject: HubSubject) -> str:
    return "this token" if subject.authenticated else "anonymous clients"


def _from_endpoint(response: httpx2.Response, subject: HubSubject) -> bool:
    asked, endpoint = response.request.url, httpx2.URL(subject.source.endpoint)
    return (asked.host, asked.port) == (endpoint.host, endpoint.port)


def _server_words(error: HfHubHTTPError) -> str:
    said = text.clean(error.server_message or "", limit=_SERVER_TEXT_BYTES)
    return f": {said}" if said else ""


def _path(response: httpx2.Response) -> str:
    return text.clean(response.request.url.path, limit=_SERVER_TEXT_BYTES)
