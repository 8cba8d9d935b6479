"""Where a running download is, as statuses of artifacts and adapters say it."""

from __future__ import annotations

from datetime import datetime

from pydantic import Field

from lora_operator.api.common import ApiModel


class Progress(ApiModel):
    """Where the running download is."""

    phase: str = Field(description="Authorising, Downloading, Verifying or Publishing.")
    bytes_done: int = Field(description="Bytes that are in the cache; while Verifying: that were read again.")
    bytes_total: int = Field(description="Bytes that are wanted.")
    percent: int = Field(description="bytesDone of bytesTotal, in percent.")
    bytes_per_second: int | None = Field(default=None, description="How fast bytesDone grew in the last 10 seconds.")
    rate: str | None = Field(default=None, description="bytesPerSecond for kubectl get.")
    eta_seconds: int | None = Field(
        default=None, description="In how many seconds this phase ends at this rate; absent while nothing moves."
    )
    eta: str | None = Field(default=None, description="etaSeconds for kubectl get.")
    time: datetime | None = Field(default=None, description="When these figures were read.")
