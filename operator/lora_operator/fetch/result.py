"""Writes the one result of a Job to the termination log, whatever way the Job ends.

The kubelet keeps at most 3 KiB of it in this project (4 KiB in Kubernetes, 12 KiB for a pod's containers together), so it is made
to fit here: the list of target modules goes first, then the end of the message.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Final

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text
from lora_operator.fetch.volume.limits import NoRoomError
from lora_operator.wire.jobs import TERMINATION_LOG_BYTES, TERMINATION_LOG_DEFAULT, TERMINATION_LOG_ENV, FetchResult

log = logging.getLogger(__name__)

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1

_written = threading.Lock()


def failure(error: BaseException) -> FetchResult:
    """The result of a Job that `error` ended; an error without a reason is JobFailed, with its type."""
    if isinstance(error, NoRoomError):
        return FetchResult(ok=False, reason=error.reason, message=text.clean(error.message), needed_bytes=error.needed)
    if isinstance(error, ReasonError):
        return FetchResult(ok=False, reason=error.reason, message=text.clean(error.message))
    return FetchResult(ok=False, reason=Reason.JOB_FAILED, message=text.clean(f"{type(error).__name__}: {error}"))


def encode(result: FetchResult) -> bytes:
    """JSON of the result in at most TERMINATION_LOG_BYTES bytes."""
    for modules in (len(result.target_modules), 32, 16, 8, 4, 0):
        fitted = result.model_copy(update={"target_modules": result.target_modules[:modules]})
        data = _json(fitted)
        if len(data) <= TERMINATION_LOG_BYTES:
            return data
    # Escapes can make a message of 1 KiB much longer in JSON.
    for limit in (512, 128, 0):
        data = _json(fitted.model_copy(update={"message": text.cut(fitted.message, limit) if limit else ""}))
        if len(data) <= TERMINATION_LOG_BYTES:
            break
    return data


def finish(result: FetchResult) -> int:
    """Writes the result and returns the exit code. Only the first call writes: a Job has one outcome."""
    code = EXIT_OK if result.ok else EXIT_FAILED
    if not _written.acquire(blocking=False):
        return code
    if result.ok:
        log.info("done: %s, %d files, %s", result.path, result.files, text.size(result.size_bytes))
    else:
        log.error("failed: %s: %s", result.reason, result.message)
    target = Path(os.environ.get(TERMINATION_LOG_ENV) or TERMINATION_LOG_DEFAULT)
    try:
        target.write_bytes(encode(result))
    except OSError as error:
        # A lost result means a new attempt, which authorises again and reuses what is there.
        log.error("the result can't be written to %s: %s", target, error)
        return EXIT_FAILED
    return code


def _json(result: FetchResult) -> bytes:
    return result.model_dump_json(by_alias=True, exclude_defaults=False).encode()
