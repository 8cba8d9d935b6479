"""Keeps downloads and evictions of one store apart, in whatever process, pod or cluster: by locks in files on the volume itself.

    artifacts/.lora-operator/stores/<store>     one per store (a repository, a bucket): its lock, and whether Jobs made the store
    artifacts/.lora-operator/commits/<store>/   of a repository in the Hub's layout: the commits that Jobs brought, or used
    artifacts/.lora-operator/owners/<claim>     one per claim through which Jobs came to this volume

A download holds the shared lock of its store from before it looks at what is there until what it published is in place. An eviction
removes blobs, and snapshots of them, under the exclusive one. Locks end with the process that holds them, so none is ever stale.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch.heartbeat import HEARTBEAT
from lora_operator.fetch.volume import file_locks
from lora_operator.fetch.volume.layout import ARTIFACTS, BLOBS, SHARED_FILE, from_system, make_shared

log = logging.getLogger(__name__)

STATE: Final = f"{ARTIFACTS}/.lora-operator"  # where Jobs may write, whoever the volume's root belongs to
_STORES: Final = "stores"
_OWNERS: Final = "owners"
_COMMITS: Final = "commits"
_NOT_PLAIN: Final = re.compile(r"[^A-Za-z0-9._-]+")
_OWNER: Final = re.compile(r"[A-Za-z0-9-]{1,64}")
_WAIT_S: Final = 600.0
_POLL_S: Final = 0.2


class NoLocksError(Exception):
    """The volume has no locks."""


def claim_volume(root: Path, owner: str | None) -> None:
    """Notes that Jobs of this claim use the volume."""
    if owner is not None and _OWNER.fullmatch(owner):
        path = _folder(root, _OWNERS) / owner
        if not path.exists():
            path.touch()


def other_owners(root: Path, owner: str | None) -> list[str]:
    """The claims other than this one through which Jobs came to the volume: those of another cluster, for instance."""
    try:
        return sorted(path.name for path in (root / STATE / _OWNERS).iterdir() if path.name != owner)
    except FileNotFoundError:
        return []


@contextlib.contextmanager
def held(root: Path, blobs: Path, *, owner: str | None) -> Iterator[None]:
    """`shared` for a Job of this claim. Raises ReasonError."""
    with contextlib.ExitStack() as stack:
        try:
            claim_volume(root, owner)
            stack.enter_context(shared(root, blobs))
        except OSError as error:
            raise from_system(error) or error from error
        yield


@contextlib.contextmanager
def shared(root: Path, blobs: Path) -> Iterator[None]:
    """Keeps evictions from the store with this folder of blobs; waits for one that is under way. Raises ReasonError when that takes 10 minutes.

    A folder that has nothing in it when the first Job comes is the Jobs' own; what somebody put there is not. On a volume without
    locks nothing is kept away, and nothing is ever evicted.
    """
    store = blobs.parent
    record = _record(root, store)
    descriptor = _open(record)
    try:
        with contextlib.suppress(NoLocksError):
            _lock(descriptor, fcntl.LOCK_EX if not record.stat().st_size else fcntl.LOCK_SH, store)
            if not record.stat().st_size:
                about = {
                    "folder": _relative(root, store),
                    "ours": blobs.name == BLOBS and not _holds_files(store),
                }
                record.write_text(json.dumps(about), "utf-8")
            _lock(descriptor, fcntl.LOCK_SH, store)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def exclusive(root: Path, store: Path) -> Iterator[bool]:
    """Whether the store is this process's alone inside the block; False where a download has it. Raises NoLocksError."""
    descriptor = _open(_record(root, store))
    try:
        try:
            if not file_locks.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                raise NoLocksError
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def own_stores(root: Path) -> list[Path]:
    """The folders of the stores that Jobs made."""
    found = []
    try:
        records = sorted((root / STATE / _STORES).iterdir())
    except FileNotFoundError:
        return []
    for record in records:
        try:
            about = json.loads(record.read_text("utf-8") or "{}")
            folder = root / str(about["folder"])
            if about["ours"] is True and record == _record(root, folder) and ".." not in folder.parts:
                found.append(folder)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def forget(root: Path, store: Path) -> None:
    """The store's folder is gone: who fills it next decides anew whose it is. To be called under the exclusive lock."""
    os.truncate(_record(root, store), 0)
    shutil.rmtree(root / STATE / _COMMITS / _record(root, store).name, ignore_errors=True)


def note_commit(root: Path, store: Path, commit: str) -> None:
    """Notes, before anything of it is brought, that a Job uses this commit; others in the store are somebody else's. Raises ReasonError."""
    try:
        folder = _folder(root, _COMMITS) / _record(root, store).name
        make_shared(folder, like=root)
        if not (folder / commit).exists():
            (folder / commit).touch()
    except OSError as error:
        raise from_system(error) or error from error


def noted_commits(root: Path, store: Path) -> frozenset[str]:
    """The commits that Jobs noted. Raises OSError."""
    try:
        return frozenset(path.name for path in (root / STATE / _COMMITS / _record(root, store).name).iterdir())
    except FileNotFoundError:
        return frozenset()


def _folder(root: Path, name: str) -> Path:
    for folder in (root / STATE, root / STATE / name):
        if not folder.is_dir():
            make_shared(folder, like=root)
    return root / STATE / name


def _record(root: Path, store: Path) -> Path:
    relative = _relative(root, store)
    digest = hashlib.sha256(relative.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return root / STATE / _STORES / f"{_NOT_PLAIN.sub('-', relative)[:100]}-{digest}"


def _relative(root: Path, store: Path) -> str:
    """Some stores are named by the volume's real path."""
    return str(store.relative_to(root if store.is_relative_to(root) else os.path.realpath(root)))


def _open(record: Path) -> int:
    _folder(record.parents[3], _STORES)
    try:
        descriptor = os.open(record, os.O_RDWR | os.O_CREAT, SHARED_FILE)
    except PermissionError:
        return os.open(record, os.O_RDONLY)  # another user's
    with contextlib.suppress(OSError):
        os.fchmod(descriptor, SHARED_FILE)
    return descriptor


def _lock(descriptor: int, how: int, store: Path) -> None:
    end = time.monotonic() + _WAIT_S
    logged = False
    while True:
        try:
            if not file_locks.flock(descriptor, how | fcntl.LOCK_NB):
                raise NoLocksError
            return
        except BlockingIOError:
            if time.monotonic() >= end:
                raise ReasonError(
                    Reason.JOB_FAILED,
                    f"an eviction, or another Job, has held the lock of {store.name} in the cache for {_WAIT_S:.0f} s; tried again",
                ) from None
            if not logged:
                log.info("waiting for the lock of %s in the cache, which an eviction or another Job has", store.name)
                logged = True
            HEARTBEAT.add(1)  # it is no source that is waited for
            time.sleep(_POLL_S)


def _holds_files(store: Path) -> bool:
    return any(files for _, _, files in os.walk(store))
