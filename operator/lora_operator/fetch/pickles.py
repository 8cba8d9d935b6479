"""Scans pickled weights, which can run code when they are read, without reading them so: by picklescan, with its list of what is harmless.

Fails closed. Clean is what the scanner took apart without any complaint, and what names nothing but what rebuilds tensors. vLLM itself
reads such files with torch's `weights_only`, so this is the first of two lines.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from picklescan import scanner  # type: ignore[import-untyped]

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text

_TENSORS: Final = "torch._utils"
_SHOWN: Final = 5


class _Complaints(logging.Handler):
    """What the scanner warns of; parts of an archive that it can't read it only skips."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def require_clean(path: Path) -> None:
    """Raises ReasonError(UnsafeFormat) unless the file is a pickle of tensors and nothing else."""
    log, complaints = logging.getLogger("picklescan"), _Complaints()
    log.addHandler(complaints)
    log.propagate = False
    try:
        found = scanner.scan_file_path(str(path), strict=True)
    except Exception as error:  # whatever a hostile file makes of the scanner
        raise _unsafe(path, f"it can't be scanned ({type(error).__name__}: {error})") from error
    finally:
        log.removeHandler(complaints)
        log.propagate = True
    bad = [one for one in found.globals if one.safety is not scanner.SafetyLevel.Innocuous]
    if bad:
        names = ", ".join(f"{one.module}.{one.name}" for one in bad[:_SHOWN])
        raise _unsafe(path, f"it names {names}, which are no tensors")
    if found.scan_err or found.issues_count or complaints.lines:
        raise _unsafe(path, f"it can't be scanned ({'; '.join(complaints.lines) or 'damaged'})")
    if not any(one.module == _TENSORS for one in found.globals):
        raise _unsafe(path, "it holds no tensors")


def _unsafe(path: Path, why: str) -> ReasonError:
    return ReasonError(
        Reason.UNSAFE_FORMAT,
        text.clean(f"{path.name} is a pickle, and the scan did not find it clean: {why}; convert it to safetensors"),
    )
