"""A clock that only the test moves."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from lora_operator.reconcile.clock import Clock


@dataclass
class FakeClock(Clock):
    """Both times pass together, by `seconds`; wall time began at `start`, and monotonic time at 1000 s."""

    seconds: float = 0.0
    start: datetime = datetime(2026, 1, 1, tzinfo=UTC)

    def now(self) -> datetime:
        """The test's wall time."""
        return self.start + timedelta(seconds=self.seconds)

    def monotonic(self) -> float:
        """The test's monotonic time."""
        return 1000.0 + self.seconds
