"""Daemons that outlive the command that started them, each known by a pid file, each ended by its own pid.

A pid file names the pid and the kernel's start time of the process, so that a recycled pid is never taken for ours.
Must never signal anything by name.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster.steps import ToolingError, tail


def start_time(pid: int) -> int | None:
    """The kernel's start time of a process in clock ticks since boot; None when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def boot_id() -> str:
    """The identity of this boot of the machine: pid files of an earlier one mean nothing."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def wait_until(condition: Callable[[], bool], *, timeout: float, interval: float = 0.05) -> bool:
    """Poll until the condition holds; False after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(interval)
    return True


def kill_and_wait(pid: int, started: int | None, *, grace: float) -> None:
    """SIGTERM, after `grace` seconds SIGKILL, until the process that began at `started` is gone."""

    def gone() -> bool:
        _reap(pid)
        return start_time(pid) != started

    if started is None or gone():
        return
    for sign, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
        if sign == signal.SIGTERM and grace <= 0:
            continue
        try:
            os.kill(pid, sign)
        except ProcessLookupError:
            return
        if wait_until(gone, timeout=patience, interval=0.02):
            return
    raise ToolingError(f"process {pid} did not end after SIGKILL")


def _reap(pid: int) -> None:
    """Take the exit status of a process that ended, when it is this program's own child."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


@dataclass(frozen=True)
class Daemon:
    """One background process: its name, pid file and log file."""

    name: str
    run_dir: Path
    log: Path

    @property
    def pid_file(self) -> Path:
        """Where the pid, its start time and the boot's identity are kept."""
        return self.run_dir / f"{self.name}.pid"

    def _read(self) -> tuple[int, int] | None:
        try:
            record = json.loads(self.pid_file.read_text())
            if record["boot"] != boot_id():
                return None
            return int(record["pid"]), int(record["started"])
        except (OSError, ValueError, KeyError):
            return None

    @property
    def pid(self) -> int | None:
        """The pid while the process lives, else None."""
        record = self._read()
        return record[0] if record and start_time(record[0]) == record[1] else None

    def start(
        self, command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, die_with_parent: bool = False
    ) -> None:
        """Start it in a session of its own, output appended to the log; raises ToolingError when it can't be executed.

        With `die_with_parent` the kernel ends it when the thread that called this ends.
        """
        prefix = ["setpriv", "--pdeathsig", "KILL", "--"] if die_with_parent else []
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as output:
            try:
                process = subprocess.Popen(
                    [*prefix, *(str(word) for word in command)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **(env or {})},
                    cwd="/",
                    start_new_session=True,
                )
            except OSError as error:
                raise ToolingError(f"cannot start {self.name}: {error}") from error
        record = {"pid": process.pid, "started": start_time(process.pid), "boot": boot_id(), "command": str(command[0])}
        process.returncode = 0  # it is meant to outlive this program: no "still running" warning when the object goes
        self.pid_file.write_text(json.dumps(record))

    def stop(self, *, grace: float = 10.0) -> None:
        """End it and wait for its end; a process that is gone is no error."""
        record = self._read()
        if record:
            kill_and_wait(record[0], record[1], grace=grace)
        self.pid_file.unlink(missing_ok=True)

    def failure(self, what: str) -> ToolingError:
        """An error that names this component and shows the end of its log."""
        state = f"running as pid {self.pid}" if self.pid else "not running"
        return ToolingError(f"{self.name} ({state}): {what}\n{tail(self.log)}")

    def wait_until(self, condition: Callable[[], bool], *, what: str, timeout: float) -> None:
        """Wait until the condition holds; raises this component's failure when it dies or `timeout` seconds pass."""
        deadline = time.monotonic() + timeout
        while not condition():
            self.reap()
            if self.pid is None:
                raise self.failure(f"ended before it was {what}")
            if time.monotonic() > deadline:
                raise self.failure(f"not {what} after {timeout:.0f} s")
            time.sleep(0.05)

    def reap(self) -> None:
        """Take the exit status of a dead child, so that it does not stay a zombie."""
        record = self._read()
        if record:
            _reap(record[0])
