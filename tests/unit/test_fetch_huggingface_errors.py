"""What the Hub, the network and the system say, and the reason and advice that follow."""

from __future__ import annotations

import errno

import httpx2
import pytest
from huggingface_hub.errors import FileMetadataError, LocalEntryNotFoundError
from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]  # exported lazily

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch.sources.huggingface import errors as module
from lora_operator.fetch.sources.huggingface.errors import HubSubject, translate
from lora_operator.wire.jobs import HuggingFaceRequest

ENDPOINT = "http://127.0.0.1:1"
SUBJECT = HubSubject.of(HuggingFaceRequest(repo="org/name", revision="v9", endpoint=ENDPOINT), authenticated=True)
ANONYMOUS = HubSubject.of(SUBJECT.source, authenticated=False)


def answer(
    status: int, code: str = "", *, said: str = "", url: str = f"{ENDPOINT}/api/models/org/name", **headers: str
) -> Exception:
    if code:
        headers["X-Error-Code"] = code
    if said:
        headers["X-Error-Message"] = said
    response = httpx2.Response(status, headers=headers, json={}, request=httpx2.Request("GET", url))
    with pytest.raises(Exception) as caught:
        hf_raise_for_status(response)
    return caught.value


def caused(cause: Exception) -> Exception:
    error = LocalEntryNotFoundError("not in the cache")
    error.__cause__ = cause
    return error


def timed_out() -> Exception:
    return httpx2.ReadTimeout("slow")


ANSWERS: dict[str, tuple[Exception, HubSubject, Reason, str]] = {
    "401 to nobody": (answer(401, "RepoNotFound"), ANONYMOUS, Reason.UNAUTHORIZED, "does not exist, or is private and needs a token"),
    "401 to nobody, without a code": (answer(401), ANONYMOUS, Reason.UNAUTHORIZED, "does not exist, or is private and needs a token"),
    "401 to a token": (
        answer(401, said="Invalid credentials in Authorization header"), SUBJECT, Reason.UNAUTHORIZED, "refused the token",
    ),
    "404 to a token": (answer(404, "RepoNotFound"), SUBJECT, Reason.REPOSITORY_NOT_FOUND, "does not exist, or this token may not see"),
    "404 to nobody": (answer(404, "RepoNotFound"), ANONYMOUS, Reason.REPOSITORY_NOT_FOUND, "does not exist (404)"),
    "gated, to a token": (answer(403, "GatedRepo"), SUBJECT, Reason.UNAUTHORIZED, f"request it at {ENDPOINT}/org/name"),
    "gated, to nobody": (answer(401, "GatedRepo"), ANONYMOUS, Reason.UNAUTHORIZED, "request access at"),
    "403 to a token": (answer(403, said="fine-grained"), SUBJECT, Reason.UNAUTHORIZED, "to this token: fine-grained"),
    "no such revision": (answer(404, "RevisionNotFound"), SUBJECT, Reason.REVISION_NOT_FOUND, "no branch, tag or commit 'v9'"),
    "no such file": (answer(404, "EntryNotFound"), SUBJECT, Reason.ENTRY_NOT_FOUND, "a file vanished"),
    "too many requests": (answer(429, **{"Retry-After": "30"}), SUBJECT, Reason.RATE_LIMITED, "wait 30 s"),
    "server error": (answer(503), SUBJECT, Reason.SOURCE_UNREACHABLE, "server error 503"),
    "unusual status": (answer(418), SUBJECT, Reason.SOURCE_UNREACHABLE, "unexpected answer 418"),
    "an expired signed address": (
        answer(403, url="http://127.0.0.2/x?Signature=abc"), SUBJECT, Reason.SOURCE_UNREACHABLE, "its storage at 127.0.0.2",
    ),
    "an answer wrapped by the library": (caused(answer(500)), SUBJECT, Reason.SOURCE_UNREACHABLE, "server error 500"),
    "a time-out": (timed_out(), SUBJECT, Reason.SOURCE_UNREACHABLE, "no answer in time"),
    "a time-out wrapped by the library": (caused(timed_out()), SUBJECT, Reason.SOURCE_UNREACHABLE, "no answer in time"),
    "no connection": (httpx2.ConnectError("refused"), SUBJECT, Reason.SOURCE_UNREACHABLE, f"{ENDPOINT}: ConnectError: refused"),
    "a broken connection": (httpx2.ReadError("reset"), SUBJECT, Reason.SOURCE_UNREACHABLE, "ReadError"),
    "no Hub": (FileMetadataError("no header"), SUBJECT, Reason.SOURCE_UNREACHABLE, "does not answer like a Hugging Face Hub"),
    "a body of another size": (OSError("Consistency check failed"), SUBJECT, Reason.SOURCE_UNREACHABLE, "Consistency check failed"),
    "a full volume": (OSError(errno.ENOSPC, "full", "/c/x"), SUBJECT, Reason.INSUFFICIENT_SPACE, "is full"),
    "a used-up quota": (OSError(errno.EDQUOT, "quota"), SUBJECT, Reason.INSUFFICIENT_SPACE, "is full"),
    "a read-only volume": (OSError(errno.EROFS, "read-only", "/nope/x"), SUBJECT, Reason.CACHE_NOT_WRITABLE, "/ belongs to 0:0"),
    "a domain error": (ReasonError(Reason.JOB_FAILED, "m"), SUBJECT, Reason.JOB_FAILED, "m"),
    "anything else": (RuntimeError("boom"), SUBJECT, Reason.JOB_FAILED, "RuntimeError: boom"),
}  # fmt: skip


@pytest.mark.parametrize("sentence", ANSWERS)
def test_translate(sentence: str) -> None:
    error, subject, reason, words = ANSWERS[sentence]
    found = translate(error, subject)
    assert (found.reason, words in found.message) == (reason, True), found.message


def test_what_a_server_says_is_bounded_and_on_one_line() -> None:
    said = answer(403, said="x" * 5000 + "\x7f")
    message = translate(said, SUBJECT).message
    assert message.isprintable()
    assert len(message.encode()) < 2 * module._SERVER_TEXT_BYTES


def test_a_chain_that_is_a_circle_ends() -> None:
    one, two = RuntimeError("one"), RuntimeError("two")
    one.__cause__, two.__cause__ = two, one
    assert translate(one, SUBJECT).reason is Reason.JOB_FAILED
