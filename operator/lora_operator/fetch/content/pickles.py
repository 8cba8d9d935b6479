"""Scans pickled weights, which can run code when they are read, without reading them so: by picklescan, with its list of what is harmless.

Fails closed. Clean is what the scanner took apart without any complaint, and what names nothing but what rebuilds tensors. An archive that
readers may understand in two ways is not clean: of two entries of a name one takes the first, another one the last. vLLM itself reads
such files with torch's `weights_only`, so this is the first of two lines.
"""

from __future__ import annotations

import logging
import zipfile
from collections import Counter
from pathlib import Path
from typing import Final

from picklescan import scanner  # type: ignore[import-untyped]

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text

_TENSORS: Final = "torch._utils"
_PICKLE: Final = "data.pkl"  # that torch reads
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
    _require_one_meaning(path)
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


def _require_one_meaning(path: Path) -> None:
    """That no two readers of the archive find different entries; torch compares names without regard to case."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            names = [name.lower() for name in archive.namelist()]
    except Exception as error:  # whatever a hostile file makes of the reader
        raise _unsafe(path, f"it can't be scanned ({type(error).__name__}: {error})") from error
    if twice := [name for name, count in Counter(names).items() if count > 1][:_SHOWN]:
        raise _unsafe(path, f"its archive has {', '.join(twice)} twice")
    if len(pickled := [name for name in names if name.rpartition("/")[2] == _PICKLE]) > 1:
        raise _unsafe(path, f"its archive has more than one {_PICKLE} ({', '.join(sorted(pickled)[:_SHOWN])})")


def _unsafe(path: Path, why: str) -> ReasonError:
    return ReasonError(
        Reason.UNSAFE_FORMAT,
        text.clean(f"{path.name} is a pickle, and the scan did not find it clean: {why}; convert it to safetensors"),
    )
