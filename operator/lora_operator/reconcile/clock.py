"""The only clock of the reconcilers: whoever needs the time is given one, so that tests can give another."""

from __future__ import annotations

import time
from datetime import UTC, datetime


class Clock:
    """Wall time for what is written down or compared with the API server's times; monotonic time for waits of this process."""

    def now(self) -> datetime:
        """The wall clock's time, in UTC; it may be set back."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Seconds since some moment of the past; they never go back, and mean nothing to another process."""
        return time.monotonic()
