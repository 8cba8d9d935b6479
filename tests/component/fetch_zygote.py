"""Starts the download program many times at the price of one: a process that has imported all of it and forks for each Job.

Every Job is a process of its own, with its own environment and files, that can be killed like any other. What the libraries read at
their import is that of the first environment, so one of these serves one endpoint. As a program it reads a line of JSON per Job on
standard input ({"env", "folder", "dieAt"}) and answers with its process id; a line {"wait": pid} with how it ended.

`dieAt` kills the Job at its so manieth audited event (opening, renaming, linking, removing, connecting): between any two of them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from lora_operator.wire.jobs import FetchResult
from tests.component.fetch_support import ROOT

_EVENTS = ("open", "os.", "socket.connect", "shutil.", "fcntl.")


@dataclass(frozen=True)
class ForkedJob:
    """One Job's process. `died` waits for its end."""

    zygote: Zygote
    pid: int
    folder: Path

    def kill(self) -> None:
        """SIGKILL, if it is still there: it is reaped only by `died`."""
        os.kill(self.pid, signal.SIGKILL)

    @property
    def is_over(self) -> bool:
        """Whether it has ended, one way or the other."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    def died(self) -> bool:
        """Waits for its end; whether a signal ended it."""
        return os.WIFSIGNALED(self.zygote.ask({"wait": self.pid}))

    @property
    def ok(self) -> FetchResult:
        """Its result; it must have succeeded."""
        data = (self.folder / "termination-log").read_bytes()
        assert data, (self.folder / "stderr").read_text()
        found = FetchResult.model_validate_json(data)
        assert found.ok, f"{found.reason}: {found.message}\n{(self.folder / 'stderr').read_text()}"
        return found


class Zygote:
    """The process that forks; use as a context manager."""

    def __init__(self, request: dict[str, Any], scratch: Path, *, env: dict[str, str] | None = None) -> None:
        self._request, self._scratch, self._env, self._count = request, scratch, env or {}, 0

    def __enter__(self) -> Zygote:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.component.fetch_zygote", json.dumps(self._request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": f"{ROOT / 'operator'}:{ROOT}",
                "PYTHONDONTWRITEBYTECODE": "1",
                **self._env,
            },
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def ask(self, what: dict[str, Any]) -> int:
        """One line there, one number back."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what).encode() + b"\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, *, die_at: int = 0, **changes: Any) -> ForkedJob:
        """A Job for the request with these changes."""
        self._count += 1
        folder = self._scratch / f"forked-{self._count}"
        folder.mkdir(parents=True)
        (folder / "termination-log").touch()
        env = {
            "PATH": os.environ["PATH"],
            "LORA_OPERATOR_FETCH": json.dumps({**self._request, **changes}),
            "LORA_OPERATOR_TERMINATION_LOG": str(folder / "termination-log"),
        }
        return ForkedJob(self, self.ask({"env": env, "folder": str(folder), "dieAt": die_at}), folder)


def _serve() -> None:
    from lora_operator.fetch import download, environment
    from lora_operator.wire.jobs import FetchRequest

    request = FetchRequest.model_validate_json(sys.argv[1])
    with environment.private_home() as home:
        environment.prepare(request, home=Path(home))
        if request.source.kind == "huggingFace":
            import lora_operator.fetch.sources.huggingface.source
        else:
            import lora_operator.fetch.sources.s3.source  # noqa: F401
        for line in sys.stdin.buffer:
            order = json.loads(line)
            if "wait" in order:
                print(os.waitpid(order["wait"], 0)[1], flush=True)
            elif (pid := os.fork()) == 0:
                _become(order)
                os._exit(download.main())
            else:
                print(pid, flush=True)


def _become(order: dict[str, Any]) -> None:
    folder = Path(order["folder"])
    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(order["env"])
    left = order["dieAt"]
    if not left:
        return

    def count(event: str, _arguments: object) -> None:
        nonlocal left
        if event.startswith(_EVENTS):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


if __name__ == "__main__":
    _serve()
