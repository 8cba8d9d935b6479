"""Publishes a snapshot: a directory of relative links to exactly the manifest's files, which appears by one rename.

Engines may be reading a snapshot at any time, and one missing directory can end an engine. So a snapshot that is right is never touched, one
that is wrong is exchanged in a single step where the kernel can do that, and blobs are not this module's business at all.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from lora_operator.fetch.volume import layout
from lora_operator.wire.jobs import MANIFEST_FILE, Manifest

log = logging.getLogger(__name__)

# A live staging directory exists for seconds: it is made once everything is downloaded and verified.
_STALE_AFTER_S: Final = 900.0
_FILE_MODE: Final = 0o644
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
_ATTEMPTS: Final = 5
_HASH_DIGITS: Final = 20
_MANIFEST_BYTES: Final = 4 << 20


@contextlib.contextmanager
def staged(root: Path, links: Mapping[str, Path]) -> Iterator[Path]:
    """A directory artifacts/.tmp-<random> with `links` (name in the snapshot → real path of the blob); gone at the end unless published."""
    artifacts = root / layout.ARTIFACTS
    staging = artifacts / f"{layout.TMP}{secrets.token_hex(8)}"
    staging.mkdir()
    try:
        remove_stale(artifacts, now=staging.stat().st_mtime, keep=staging)
        _set_mode(staging, layout.SHARED_DIRECTORY)
        for name, blob in links.items():
            link = staging / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
        yield staging
    finally:
        _remove(staging)


def publish(root: Path, staging: Path, manifest: Manifest, *, title: str) -> str:
    """Makes `staging` the snapshot of its content; returns its path relative to `root`, whose readable part is `title`.

    The name is of the content and its place in the cache: what is fetched again and has not changed is no news to an engine, and
    artifacts of one content share a snapshot. One that already has the same files stays in place.
    """
    relative = f"{layout.ARTIFACTS}/{title}-{_content_hash(staging, manifest)}"
    target = root / relative
    _write_manifest(staging, manifest)
    for directory, _, _ in os.walk(staging, topdown=False):
        layout.sync_directory(Path(directory))
    for _ in range(_ATTEMPTS):
        if os.path.lexists(target):
            if _same_files(target, staging):
                _renew_manifest(target, staging, manifest)
                break
            log.warning("the view %s is not as it should be and is replaced", relative)
            _exchange(staging, target)
            break
        try:
            staging.rename(target)
            break
        except OSError as error:
            # Another Job was first; look at what it published.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
    else:
        raise FileExistsError(errno.EEXIST, "the view keeps changing", relative)
    with contextlib.suppress(OSError):
        os.utime(target)  # a snapshot that was there already is as new as one that was not, for evictions
    layout.sync_directory(target.parent)
    return relative


def read_manifest(snapshot: Path) -> Manifest | None:
    """The manifest of a snapshot, or None when it is missing or unreadable."""
    try:
        return manifest_of(snapshot)
    except OSError:
        return None


def manifest_of(folder: Path) -> Manifest | None:
    """The manifest in a folder; None where there is none, or none that is understood. Raises OSError where that can't be told."""
    try:
        with (folder / MANIFEST_FILE).open("rb") as file:
            return Manifest.model_validate_json(file.read(_MANIFEST_BYTES))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def _write_manifest(staging: Path, manifest: Manifest) -> None:
    path = staging / MANIFEST_FILE
    with path.open("wb") as file:
        file.write(manifest.model_dump_json(by_alias=True, indent=1).encode())
        file.flush()
        os.fsync(file.fileno())
    _set_mode(path, _FILE_MODE)


def _renew_manifest(target: Path, staging: Path, manifest: Manifest) -> None:
    if read_manifest(target) != manifest:
        (staging / MANIFEST_FILE).replace(target / MANIFEST_FILE)
        layout.sync_directory(target)


def _content_hash(staging: Path, manifest: Manifest) -> str:
    links = sorted((_content(staging) or {}).items())
    text = json.dumps([manifest.type, manifest.digest, links])
    return hashlib.sha256(text.encode()).hexdigest()[:_HASH_DIGITS]


def _same_files(one: Path, other: Path) -> bool:
    return _content(one) == _content(other)


def _content(snapshot: Path) -> dict[str, str] | None:
    """Every name below `snapshot` with its link's text; None for what is no snapshot. The manifest file is not looked at."""
    if snapshot.is_symlink() or not snapshot.is_dir():
        return None
    found: dict[str, str] = {}
    for directory, folders, files in os.walk(snapshot):
        for name in (*folders, *files):
            path = Path(directory, name)
            if name != MANIFEST_FILE and not (path.is_dir() and not path.is_symlink()):
                found[str(path.relative_to(snapshot))] = str(path.readlink()) if path.is_symlink() else "no link"
    return found


def _exchange(staging: Path, target: Path) -> None:
    """Puts `staging` in the place of `target` and the old `target` in that of `staging`."""
    libc = ctypes.CDLL(None, use_errno=True)
    renameat2 = getattr(libc, "renameat2", None)
    if renameat2 is not None:
        if renameat2(_AT_FDCWD, os.fsencode(staging), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(code, os.strerror(code), str(target))
    # Some network file systems can't exchange: two renames, with nothing in between.
    aside = staging.with_name(f"{staging.name}-old")
    target.rename(aside)
    staging.rename(target)
    _remove(aside)


def remove_stale(artifacts: Path, *, now: float, keep: Path | None = None) -> None:
    """Removes what dead Jobs left. `now` is the volume's own clock: that of a directory just made on it."""
    for entry in artifacts.iterdir():
        try:
            if entry == keep or not entry.name.startswith(layout.TMP) or now - entry.lstat().st_mtime < _STALE_AFTER_S:
                continue
        except OSError:
            continue
        _remove(entry)


def _remove(path: Path) -> None:
    """Removes a directory, file or link; what can't be removed is left to the next Job."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        log.info("a left-over stays: %s", error)


def _set_mode(path: Path, mode: int) -> None:
    # A volume without modes is still usable.
    with contextlib.suppress(PermissionError, NotImplementedError):
        path.chmod(mode)
