"""What the errors of every source have in common: of whom was asked for what, and the reasons that no library has a part in.

Each library's own exceptions become reasons in one place: `s3.errors` (boto3), `huggingface.errors`, `buckets.errors` (obstore) and
`http_client` (httpx2). Decisions are made on types and statuses, never on message texts.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text
from lora_operator.fetch.volume import layout


@dataclass(frozen=True)
class Subject:
    """What was asked for, for messages; never with credentials."""

    title: str
    endpoint: str  # the service that was asked
    authenticated: bool

    def unreachable(self, why: str) -> ReasonError:
        """SourceUnreachable with the service's address."""
        return unreachable(self.endpoint, why)

    def changed(self, what: str, *, advice: str) -> ReasonError:
        """SourceChanged: `what` differs from the listing."""
        return changed(self.title, f"during the download: {what}", advice=advice)


def unreachable(endpoint: str, why: str) -> ReasonError:
    """SourceUnreachable: tried again with growing pauses."""
    return ReasonError(Reason.SOURCE_UNREACHABLE, text.clean(f"{endpoint}: {why}"))


def changed(title: str, how: str, *, advice: str) -> ReasonError:
    """SourceChanged: nothing is published, and the next attempt takes the new listing."""
    return ReasonError(
        Reason.SOURCE_CHANGED,
        text.clean(
            f"{title} changed {how}; nothing was published, the next attempt takes what is there then; {advice}",
        ),
    )


def translate_rest(error: BaseException, endpoint: str) -> ReasonError:
    """The reason behind what no library raised: a reason, an error of the volume or of the connection, or something unforeseen."""
    match error:
        case ReasonError():
            return error
        case OSError():
            return layout.from_system(error) or unreachable(endpoint, f"{type(error).__name__}: {error}")
    return unforeseen(error)


def unforeseen(error: BaseException) -> ReasonError:
    """JobFailed, in the error's own words."""
    return ReasonError(Reason.JOB_FAILED, text.clean(f"{type(error).__name__}: {error}"))
