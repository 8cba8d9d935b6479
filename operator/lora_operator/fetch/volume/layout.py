"""What a Job may expect of the cache's volume: writable, with symbolic links, with room, shared by users of one group.

Nothing here reads or judges content. Directories get the volume's group and the set-group-id bit, so that another Job or engine of
another user, but of the same group, can use what this one made.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path
from typing import Final

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text

HUB: Final = "hub"
ARTIFACTS: Final = "artifacts"
BLOBS: Final = "blobs"  # of every store: finished ones and unfinished ones
TMP: Final = ".tmp-"  # what a name begins with that means nothing to anybody but the process that made it
PROCESS: Final = secrets.token_hex(8)  # tells this process's files from those of others
SHARED_FILE: Final = 0o664
SHARED_DIRECTORY: Final = 0o2775
NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITABLE: Final = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_LINKS: Final = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def prepare(root: Path, content: str) -> None:
    """Makes the cache's directories, `content` for what is downloaded, and proves that they can be written and can hold links.

    Raises ReasonError: CacheNotReady without the mount, CacheNotWritable, InsufficientSpace.
    """
    if not root.is_dir():
        raise ReasonError(Reason.CACHE_NOT_READY, f"the cache is not mounted: there is no directory {root}")
    for name in (content, ARTIFACTS):
        directory = root / name
        try:
            if not directory.is_dir():
                make_shared(directory, like=root)
            _probe(directory)
        except OSError as error:
            if error.errno in NO_SPACE:
                raise ReasonError(Reason.INSUFFICIENT_SPACE, f"the cache's volume is full: {error.strerror}") from error
            raise not_writable(str(directory), error) from error


def not_writable(path: str, error: OSError) -> ReasonError:
    """The error for a user who must find out which owner, group or mode to change."""
    nearest = Path(path)
    while not nearest.is_dir() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        found = nearest.stat()
        owner = f"{nearest} belongs to {found.st_uid}:{found.st_gid} with mode {stat.S_IMODE(found.st_mode):04o}"
    except OSError:
        owner = f"{nearest} can't be examined"
    groups = ",".join(str(group) for group in sorted({os.getegid(), *os.getgroups()}))
    return ReasonError(
        Reason.CACHE_NOT_WRITABLE,
        text.clean(
            f"the Job's user {os.geteuid()} (groups {groups}) can't write: {error.strerror or error}; {owner}; "
            "change the volume's owner or mode, or set the ModelCache's securityContext (supplementalGroups, fsGroup, runAsUser)"
        ),
    )


def from_system(error: OSError) -> ReasonError | None:
    """The reason behind an error of the volume; None for any other one."""
    if error.errno in NO_SPACE:
        return ReasonError(
            Reason.INSUFFICIENT_SPACE,
            "the cache's volume (or its quota) is full; free space on it or enlarge it",
        )
    if error.errno in _NOT_WRITABLE and error.filename is not None:
        return not_writable(os.fspath(error.filename), error)
    return None


def inside(root: Path, relative: str) -> Path:
    """The real path of `relative` below `root`. Raises ReasonError when it leads out of it, by whatever links."""
    real_root = os.path.realpath(root)
    real = os.path.realpath(Path(real_root, relative))
    if os.path.commonpath([real_root, real]) != real_root or real == real_root:
        raise ReasonError(Reason.JOB_FAILED, text.clean(f"{relative!r} leads out of the cache"))
    return Path(real)


def sync_directory(path: Path) -> None:
    """Makes the entries of a directory durable where the file system can do it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def make_shared(directory: Path, *, like: Path) -> None:
    """Makes a directory of the volume's group, in which the group may write."""
    try:
        directory.mkdir()
    except FileExistsError:
        return
    # A volume that has no owners or modes (or maps them) is still usable.
    with contextlib.suppress(OSError):
        os.chown(directory, -1, like.stat().st_gid)
    with contextlib.suppress(OSError):
        directory.chmod(SHARED_DIRECTORY)


def _probe(directory: Path) -> None:
    probe = directory / f".tmp-probe-{secrets.token_hex(8)}"
    try:
        probe.symlink_to("nowhere")
    except OSError as error:
        if error.errno in _NO_LINKS and os.access(directory, os.W_OK):
            raise OSError(error.errno, "symbolic links are not possible on this volume", str(directory)) from error
        raise
    probe.unlink()
