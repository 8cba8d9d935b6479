"""The plugin's small files in the pod's emptyDir, which outlive the engine's process and go with the pod.

A file that can't be read is as if it were not there: no damage to these files may stop an engine.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

LIST_FILE: Final = "modules.json"  # what was acknowledged last
MARKER_FILE: Final = "starting.json"  # there while an engine that got static entries is not up
REFUSED_FILE: Final = "refused.json"  # what the engine refused, by name and path
REPORT_FILE: Final = "launcher.json"  # what the launcher passed and dropped

Kept = TypeVar("Kept")


def write_file(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Put `content` at `path` in one step, which survives a crash of the machine if `durable`; raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if not durable:
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_report(path: Path, content: Any) -> None:
    """Write a report as JSON where that is possible; a report is never worth a failure."""
    try:
        write_file(path, json.dumps(content, sort_keys=True).encode())
    except (OSError, ValueError):
        return


def read_report(path: Path, take: Callable[[Any], Kept], otherwise: Kept) -> Kept:
    """What `take` finds in a file of write_report's kind; `otherwise` where that is missing, damaged or of another form."""
    try:
        return take(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return otherwise


def read_refused(path: Path) -> dict[tuple[str, str], str]:
    """The engine's refusals by (name, path)."""
    return read_report(
        path,
        lambda kept: {(str(one["name"]), str(one["path"])): str(one["message"]) for one in kept["refused"]},
        {},
    )


def write_refused(path: Path, refused: Mapping[tuple[str, str], str]) -> None:
    """Keep the engine's refusals for the launcher."""
    entries = [{"name": name, "path": where, "message": message} for (name, where), message in refused.items()]
    write_report(path, {"version": 1, "refused": entries})
