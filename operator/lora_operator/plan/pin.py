"""Whether content is what a source's digest pins. The pin says what is accepted, not what is downloaded: wants with and without share one."""

from __future__ import annotations

from lora_operator.api.sources.source import Source
from lora_operator.constants import Reason
from lora_operator.errors import ReasonError


def refused_by_pin(source: Source, digest: str | None) -> ReasonError | None:
    """DigestMismatch where `digest`, that of content which is there, is not the one that the source pins."""
    if source.digest is None or digest == source.digest:
        return None
    return ReasonError(
        Reason.DIGEST_MISMATCH,
        f"the content of {source.member.title} has the digest {digest}, source.digest pins {source.digest}: "
        "correct the pin, or name the revision that it is the digest of",
    )
