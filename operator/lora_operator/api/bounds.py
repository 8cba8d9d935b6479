"""How much a ModelCache may hold, and how much its Jobs may take."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field

from lora_operator.api.common import ApiModel, cel

DEFAULT_MAX_CONCURRENT: Final = 16
_DURATION: Final = r"^([0-9]+(\.[0-9]+)?(h|m|s))+$"


EVICTION_RULES: Final = cel(
    (
        "!has(self.keepUnreferencedFor) || self.policy == 'LeastRecentlyUsed'",
        "keepUnreferencedFor is only for policy LeastRecentlyUsed: by policy Never nothing is removed unless you ask",
    )
)


class EvictionSpec(ApiModel):
    """What becomes of content that nothing wants any more."""

    policy: Literal["Never", "LeastRecentlyUsed"] = Field(
        default="Never",
        description="LeastRecentlyUsed: where a download does not fit, what nothing wants and no pod serves is removed, what was wanted "
        "longest ago first, until it fits. Never: content stays until you ask for its removal by the annotation "
        "lora-operator.dev/evict.",
    )
    keep_unreferenced_for: str | None = Field(
        default=None,
        max_length=32,
        description="With LeastRecentlyUsed: content that nothing has wanted for so long, a duration like 72h, is removed though there is "
        "room. Default: not before room is needed.",
        json_schema_extra=cel(
            (
                f"self.matches(r'{_DURATION}')",
                "keepUnreferencedFor must be a duration like 30m or 72h",
            )
        ),
    )


class DownloadSpec(ApiModel):
    """How the Jobs of a cache run."""

    max_concurrent: int = Field(
        default=DEFAULT_MAX_CONCURRENT,
        ge=1,
        le=1000,
        description="How many Jobs run at once; the namespaces that want content take turns. More are Queued.",
    )
    max_workers: int = Field(default=4, ge=1, le=64, description="How many files one Job downloads at once.")
    timeout: str | None = Field(
        default=None,
        max_length=32,
        description="How long an attempt may take, a duration like 90m or 12h; then it is JobTimeout, and the next one goes on from "
        "where it stopped. Default: the operator's setting job.deadlineSeconds.",
        json_schema_extra=cel(
            (
                f"self.matches(r'{_DURATION}') && duration(self) >= duration('10s') && duration(self) <= duration('720h')",
                "timeout must be a duration like 90m or 12h, from 10s to 720h",
            )
        ),
    )
