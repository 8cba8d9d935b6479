"""Say what is being done and how long it took: one line per step, with the time since the program began.

Also the one place that runs foreign commands: their output goes to a log file and is shown only when they fail.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_BEGAN = time.monotonic()


class ToolingError(RuntimeError):
    """A step of the tooling failed; the message says which one and where its output is."""


def say(message: str) -> None:
    """Print one line with the seconds since the program began (to stderr: stdout belongs to the program's result)."""
    print(f"[{time.monotonic() - _BEGAN:6.1f} s] {message}", file=sys.stderr, flush=True)


@contextmanager
def step(name: str, *, announce: bool = True) -> Iterator[None]:
    """Announce a long step, then say how long it took."""
    if announce:
        say(f"{name} …")
    began = time.monotonic()
    yield
    say(f"{name}: done in {time.monotonic() - began:.1f} s")


def tail(path: Path, lines: int = 25) -> str:
    """The last lines of a log, indented, under its path."""
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        return f"  (no log at {path}: {error.strerror})"
    shown = "\n".join(f"  | {line}" for line in text.splitlines()[-lines:])
    return f"  {path}:\n{shown or '  | (empty)'}"


def run_logged(
    command: Sequence[str | Path],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 1800,
) -> None:
    """Run a command with its output in `log` (seconds of `timeout`); raise ToolingError with the log's end when it fails."""
    words = [str(word) for word in command]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        try:
            result = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                cwd=cwd,
                timeout=timeout,
                check=False,
            )
            status = f"exit status {result.returncode}" if result.returncode else ""
        except subprocess.TimeoutExpired:
            status = f"not done after {timeout:.0f} s"
        except OSError as error:
            status = str(error)
    if status:
        raise ToolingError(f"`{' '.join(words[:6])}` failed ({status})\n{tail(log)}")
