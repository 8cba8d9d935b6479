"""The program of an eviction Job: removes snapshots that are not to be kept, then the blobs that no snapshot links to any more.

A snapshot goes only under the exclusive locks of all stores that it links to, by one rename; a blob only under its store's, after the
snapshots were looked at again. What Jobs did not make is never touched: folders without a manifest, stores that somebody filled by hand,
commits that somebody put into a store of Jobs, files that a snapshot links to elsewhere. A program that is ended in between leaves nothing half visible, and the next one goes on.

While downloads are under way (the operator says so) no blob goes, only snapshots: on a volume whose locks hold for one node alone a Job
elsewhere may just have counted a blob as cached. What is released then is noted, and goes with the next eviction without downloads.

What can't be read is in use: every folder beside the snapshots counts with its links, whoever made it and whether its manifest is understood or
not, and an error of the volume while they are looked at ends the program before it removes anything.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import logging
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from lora_operator.fetch import text
from lora_operator.fetch.volume import layout, limits, released_blobs, snapshots, store_locks
from lora_operator.wire.jobs import (
    EVICT_REQUEST_ENV,
    KEEP_BYTES,
    TERMINATION_LOG_DEFAULT,
    TERMINATION_LOG_ENV,
    EvictRequest,
    EvictResult,
    keep_mark,
)

log = logging.getLogger(__name__)

_CLOCKS_S: Final = 120.0  # by which clocks may differ


def main() -> int:
    """Runs the eviction that the environment describes; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    try:
        request = EvictRequest.model_validate_json(os.environ.get(EVICT_REQUEST_ENV, ""))
        result = evict(request)
    except (OSError, ValueError) as error:
        result = EvictResult(ok=False, message=text.clean(f"{type(error).__name__}: {error}"))
    log.info("%s", result.model_dump_json(by_alias=True))
    target = Path(os.environ.get(TERMINATION_LOG_ENV) or TERMINATION_LOG_DEFAULT)
    target.write_text(result.model_dump_json(by_alias=True), "utf-8")
    return 0 if result.ok else 1


def evict(request: EvictRequest) -> EvictResult:
    """Removes what may go. Raises OSError where the volume fails."""
    root = Path(os.path.realpath(request.cache_root))
    if not root.is_dir():
        return EvictResult(ok=False, message=f"the cache is not mounted: there is no directory {root}")
    if others := store_locks.other_owners(root, request.owner):
        return EvictResult(
            ok=False,
            message=f"nothing is evicted: Jobs of other claims use this volume, too ({', '.join(others[:3])}), and their engines may; if "
            f"they don't any more, remove {store_locks.STATE}/owners/{others[0]} from the volume",
        )
    marks = base64.b64decode(request.keep)
    keep = {marks[start : start + KEEP_BYTES] for start in range(0, len(marks), KEEP_BYTES)}
    try:
        return _Eviction(root, request, keep, now=_volume_clock(root)).run()
    except store_locks.NoLocksError:
        return EvictResult(
            ok=False,
            message="nothing is evicted: the volume has no file locks, so downloads can't be kept away meanwhile",
        )


@dataclass
class _Eviction:
    root: Path
    request: EvictRequest
    keep: set[bytes]
    now: float
    links: dict[str, dict[Path, set[str]]] = field(default_factory=dict)  # folder → store → names of its blobs
    released: dict[Path, set[str]] = field(
        default_factory=dict
    )  # of snapshots that were removed, and not themselves yet
    removed: int = 0  # snapshots
    freed: int = 0
    left: int = 0  # bytes
    busy: set[Path] = field(default_factory=set)
    fresh: float = 0.0  # seconds

    def __post_init__(self) -> None:
        if self.request.built is not None:
            self.fresh = max(0.0, time.time() - self.request.built) + _CLOCKS_S

    def run(self) -> EvictResult:
        snapshots.remove_stale(self.root / layout.ARTIFACTS, now=self.now)
        self.released = released_blobs.read(self.root)
        self._read_links()
        for snapshot in self._going():
            if self._age(snapshot) >= self.fresh:
                self._remove_snapshot(snapshot, self.links[snapshot.name])
        stores = store_locks.own_stores(self.root)
        self.released = {store: names for store, names in self.released.items() if store in stores}
        released_blobs.write(self.root, self.released)  # whatever becomes of this program
        for store in stores:
            with store_locks.exclusive(self.root, store) as free:
                if free:
                    self._sweep(store)
                else:
                    self.busy.add(store)
        released_blobs.write(self.root, self.released)
        return EvictResult(
            ok=True,
            views=self.removed,
            freed_bytes=self.freed,
            busy=len(self.busy),
            left_bytes=self.left,
            volume=limits.volume_state(self.root),
        )

    def _read_links(self) -> None:
        """Reads the links of every folder that was not looked at before, or that a Job may be at work in. Raises OSError."""
        for folder in _folders(self.root):
            if folder.name not in self.links or folder.name.startswith(layout.TMP):
                with contextlib.suppress(_GoneError):
                    self.links[folder.name] = _links(self.root, folder)

    def _going(self) -> list[Path]:
        """Folders that Jobs published, which alone may go, and that are not to be kept. Raises OSError."""
        folders = (self.root / layout.ARTIFACTS / name for name in self.links if not name.startswith("."))
        going = (folder for folder in folders if keep_mark(folder.name) not in self.keep and not folder.is_symlink())
        return [folder for folder in going if snapshots.manifest_of(folder) is not None]

    def _remove_snapshot(self, snapshot: Path, stores: dict[Path, set[str]]) -> None:
        with contextlib.ExitStack() as locks:
            for store in sorted(stores):
                if not locks.enter_context(store_locks.exclusive(self.root, store)):
                    self.busy.add(store)
                    return
            if self._age(snapshot) < self.fresh:  # published again just now
                return
            aside = snapshot.with_name(f"{layout.TMP}{secrets.token_hex(8)}")
            snapshot.rename(aside)
            layout.sync_directory(snapshot.parent)
            shutil.rmtree(aside, ignore_errors=True)  # with what is left of it its blobs stay, until that is stale
        log.info("removed the view %s", snapshot.name)
        self.removed += 1
        for store, names in self.links.pop(snapshot.name).items():
            self.released.setdefault(store, set()).update(names)

    def _sweep(self, store: Path) -> None:
        """Removes the blobs of a store that no snapshot links to. Under its lock no snapshot of it can appear."""
        self._read_links()
        by_hand = self._by_hand(store)
        linked = {name for stores in (*self.links.values(), *by_hand) for name in stores.get(store, ())}
        unlinked = self.released.get(store, set())
        left = bool(by_hand)
        going = []
        for path in _entries(store / layout.BLOBS):
            old = self._age(path) >= self.request.unfinished_seconds
            if path.name in linked or not (old or path.name in unlinked) or path.is_dir():
                left = True
            else:
                going.append(path)
        if self.request.built is not None:
            self.left += sum(path.lstat().st_size for path in going)
            return
        for path in going:
            self.freed += path.lstat().st_size
            path.unlink()
            (store / "sums" / path.name).unlink(missing_ok=True)
        self.released.pop(store, None)
        if left:
            _tidy_hub_pointers(store)
        elif store.is_dir():
            shutil.rmtree(store)
            store_locks.forget(self.root, store)

    def _by_hand(self, store: Path) -> list[dict[Path, set[str]]]:
        """What the Hub's own pointers lead to, of commits that no Job has used. Raises OSError."""
        noted = store_locks.noted_commits(self.root, store)
        found = []
        for snapshot in _entries(store / "snapshots"):
            if snapshot.name not in noted:
                with contextlib.suppress(_GoneError):
                    found.append(_links(self.root, snapshot))
        return found

    def _age(self, path: Path) -> float:
        return self.now - path.lstat().st_mtime


class _GoneError(Exception):
    """A folder that was listed is not there any more: a Job has published or removed what it prepared in it."""


def _folders(root: Path) -> list[Path]:
    """All that may have links to blobs, but what the store locks keep for themselves."""
    state = root / store_locks.STATE
    return [path for path in _entries(root / layout.ARTIFACTS) if path != state]


def _entries(folder: Path) -> Iterable[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return ()


def _links(root: Path, snapshot: Path) -> dict[Path, set[str]]:
    """The blobs <store>/blobs/<name> below `root` that a folder links to, or a link itself, by store. Raises OSError, _GoneError."""
    found: dict[Path, set[str]] = {}
    try:
        for link, text in _all_links(snapshot):
            direct = os.path.normpath(link.parent / text)
            parts = _parts(root, direct) or _parts(
                root, os.path.realpath(link)
            )  # what is made by hand may lead through other links
            if parts:
                depth = parts.index(layout.BLOBS)
                found.setdefault(root.joinpath(*parts[:depth]), set()).add(parts[depth + 1])
    except FileNotFoundError as error:
        if os.path.lexists(snapshot):
            raise
        raise _GoneError from error
    return found


def _parts(root: Path, target: str) -> tuple[str, ...]:
    """The path below `root` of a blob; empty for what is none."""
    parts = Path(target).relative_to(root).parts if Path(target).is_relative_to(root) else ()
    return parts if layout.BLOBS in parts[:-1] else ()


def _all_links(path: Path) -> Iterator[tuple[Path, str]]:
    """Every link at and below a path, and where it leads. Nothing but what is known to be none is passed over."""
    found = [path]
    if stat.S_ISDIR(path.lstat().st_mode):
        walked = os.walk(path, onerror=_raise)
        found = [Path(folder, name) for folder, folders, files in walked for name in (*folders, *files)]
    for one in found:
        try:
            yield one, str(one.readlink())
        except OSError as error:
            if error.errno != errno.EINVAL:  # what it is of all but links
                raise


def _raise(error: OSError) -> None:
    raise error


def _tidy_hub_pointers(store: Path) -> None:
    """Removes the pointers of the Hub's own layout to blobs that are gone, and the refs to commits that have none left."""
    for folder, _, files in os.walk(store / "snapshots", topdown=False):
        for name in files:
            link = Path(folder, name)
            if link.is_symlink() and not link.exists():
                link.unlink()
        with contextlib.suppress(OSError):
            Path(folder).rmdir()
    commits = {path.name for path in _entries(store / "snapshots")}
    for folder, _, files in os.walk(store / "refs"):
        for name in files:
            ref = Path(folder, name)
            if ref.read_text("utf-8").strip() not in commits:
                ref.unlink()


def _volume_clock(root: Path) -> float:
    """The volume's own time; this node's where the volume takes no file."""
    probe = root / layout.ARTIFACTS / f"{layout.TMP}clock-{secrets.token_hex(8)}"
    try:
        probe.mkdir()
        try:
            return probe.lstat().st_mtime
        finally:
            probe.rmdir()
    except OSError:
        return time.time()
