"""Takes a broken download up again: at once as long as bytes arrive, else a few times with growing waits."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final, TypeVar

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError

log = logging.getLogger(__name__)

_ATTEMPTS: Final = 4

T = TypeVar("T")


def persist(once: Callable[[], T], *, moving: Callable[[], int]) -> T:
    """`once()`, again after SourceUnreachable; `moving` is any number that grows with what is written."""
    tries, best = 0, moving()
    while True:
        try:
            return once()
        except ReasonError as error:
            if error.reason is not Reason.SOURCE_UNREACHABLE:
                raise
            now = moving()
            tries, best = (0, now) if now > best else (tries + 1, best)
            if tries >= _ATTEMPTS:
                raise
            log.warning("going on after: %s", error)
            time.sleep(2**tries)
