"""The load that the engine works on, and contents whose load it never answered: memory that outlives the container.

An engine that a load ends, or that never answers one (a pattern that takes it for ever, a volume that hangs), must not meet the same
content at every start. So what is being loaded is noted before the engine is asked; where the note is still there at the next start,
its content is left out by launcher and plugin until no entry of the list has it any more. The notes lie in the pod's emptyDir: a new
pod tries once for itself. Times are monotonic seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Set
from pathlib import Path
from typing import Final

from .list_file import ListedAdapter
from .state_files import read_report, write_file, write_report

LOADING_FILE: Final = "loading.json"  # there while the engine loads one adapter
SUSPECTS_FILE: Final = "suspects.json"  # contents whose load an engine did not outlive or answer
UNREADY_SECONDS: Final = 60.0  # a load without an answer for so long: requests wait behind it, and no more should come
DEAD_SECONDS: Final = 300.0  # and for so long: only another process helps
STATIC_SECONDS: Final = 30.0  # that each adapter of an engine's arguments adds
BLAME: Final = (
    "the engine ended while it loaded this adapter, or never answered: this pod leaves it out until its content changes; if the adapter"
    " is right, delete the pod, and the next one tries it again"
)
UNANSWERED: Final = (
    f"the engine has not answered for more than {UNREADY_SECONDS:.0f} s while loading this adapter: the pod is not ready, and is"
    f" restarted without the adapter after {DEAD_SECONDS:.0f} s"
)


class Loads:
    """What one engine process loads now, and what is left out for what happened to an earlier one."""

    def __init__(self, folder: Path) -> None:
        self.entry: ListedAdapter | None = None
        self._folder = folder
        self._since = 0.0
        self._suspects: dict[str, str] = {}  # path to the name that it was loaded under

    def recover(self) -> None:
        """At the start of a process: what the last one was loading when it ended is left out from now on."""
        self._suspects = read_suspects(self._folder)
        self._keep()
        self._forget_note()

    def begin(self, entry: ListedAdapter, *, note: bool) -> None:
        """The engine is about to be asked to load; without a `note` for content that this process has loaded under another name."""
        self.entry, self._since = entry, time.monotonic()
        if not note:
            return
        with contextlib.suppress(OSError):
            note_of = {"name": entry.name, "path": entry.path}
            write_file(self._folder / LOADING_FILE, json.dumps(note_of).encode(), durable=False)

    def ask_again(self) -> None:
        """The engine has answered, and is asked once more: for the cause."""
        self._since = time.monotonic()

    def end(self, *, blameless: bool) -> None:
        """The engine answered, or nobody waits any more; with `blameless` false its content is left out from now on."""
        entry, self.entry = self.entry, None
        if entry is not None and not blameless:
            self._suspects[entry.path] = entry.name
            self._keep()
        self._forget_note()

    def unanswered(self) -> float:
        """For how many seconds the engine has not answered a load; 0 when there is none."""
        return 0.0 if self.entry is None else time.monotonic() - self._since

    @property
    def suspects(self) -> Set[str]:
        """Paths of contents that are left out."""
        return self._suspects.keys()

    def keep_suspects(self, paths: Set[str]) -> None:
        """Forget what is at no path of these; blocks for a moment."""
        self._suspects = {path: name for path, name in self._suspects.items() if path in paths}
        self._keep()

    def _keep(self) -> None:
        suspects = [{"name": name, "path": path} for path, name in self._suspects.items()]
        write_report(self._folder / SUSPECTS_FILE, {"version": 1, "suspects": suspects})

    def _forget_note(self) -> None:
        with contextlib.suppress(OSError):
            (self._folder / LOADING_FILE).unlink(missing_ok=True)


def patience(marker: Path) -> float | None:
    """How many seconds an engine may take for the adapters that it was given as arguments; None where there are none."""
    return read_report(marker, lambda kept: DEAD_SECONDS + STATIC_SECONDS * int(kept["static"]), None)


def watch_static(marker: Path) -> threading.Event:
    """End this process where the adapters of its arguments take too long; who gets further sets the event.

    The launcher passes none at the next start, for its marker is still there, and the plugin loads them one by one.
    """
    listens, limit = threading.Event(), patience(marker)

    def watch() -> None:
        if not listens.wait(limit):
            message = f"lora-operator: the adapters of the arguments are not loaded after {limit:.0f} s: the next start passes none"
            print(message, file=sys.stderr, flush=True)
            os._exit(1)  # the event loop may wait for ever for the engine's core, which goes with this process

    if limit is not None:
        threading.Thread(target=watch, name="lora-operator-static", daemon=True).start()
    return listens


def read_loading(path: Path) -> tuple[str, str] | None:
    """Name and path of the adapter that was being loaded when the last engine process ended, if one was."""
    return read_report(path, lambda kept: (str(kept["name"]), str(kept["path"])), None)


def read_suspects(folder: Path) -> dict[str, str]:
    """Contents to leave out, path to name, with what the last process was loading when it ended."""
    found = read_report(
        folder / SUSPECTS_FILE,
        lambda kept: {str(one["path"]): str(one["name"]) for one in kept["suspects"]},
        dict[str, str](),
    )
    loading = read_loading(folder / LOADING_FILE)
    return found if loading is None else found | {loading[1]: loading[0]}
