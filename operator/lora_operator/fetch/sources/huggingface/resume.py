"""Downloads big files so that an interrupted download goes on where it stopped, also in another process.

huggingface_hub 2 writes each download to a file with a random name and drops it on failure; a Job that is evicted at 90 % of a shard
would start that shard anew, and a killed one leaves its file for ever. So files from RESUMABLE_BYTES on are downloaded here, by `xet`
or with the library's own request and resume code, into `blobs/<etag>.incomplete`, under the very lock that the library takes for that blob. What
an interrupted library download left is adopted or removed under that lock too. `snapshot_download` then finds the blob and links it.
Nothing here vouches for content: `verify` does that, and a wrong blob goes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import threading
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Final

from huggingface_hub import file_download, get_hf_file_metadata, hf_hub_url
from huggingface_hub.file_download import HfFileMetadata, http_get, repo_folder_name
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # exported lazily

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text
from lora_operator.fetch.content.select import RemoteFile
from lora_operator.fetch.environment import METADATA_TIMEOUT_S
from lora_operator.fetch.sources.huggingface.xet import Xet, beyond_http
from lora_operator.fetch.volume import file_locks
from lora_operator.fetch.volume.layout import NO_SPACE, SHARED_FILE

log = logging.getLogger(__name__)

RESUMABLE_BYTES: Final = 1 << 20
_NAME: Final = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")


@dataclass(frozen=True)
class HubPlace:
    """One repository in the Hub's cache layout."""

    hub: Path
    repo: str
    arrived: dict[str, str] = field(
        default_factory=dict, compare=False
    )  # sha256 of what this process wrote whole, by ETag

    @property
    def storage(self) -> Path:
        """The repository's folder as huggingface_hub names it."""
        return self.hub / repo_folder_name(repo_id=self.repo, repo_type="model")

    @property
    def blobs(self) -> Path:
        """Where blobs lie, named by their ETag."""
        return self.storage / "blobs"

    def lock(self, etag: str) -> Path:
        """The lock file that huggingface_hub takes while it downloads a blob."""
        return self.hub / ".locks" / self.storage.name / f"{etag}.lock"


def spare_library_locks(place: HubPlace) -> None:
    """Keeps huggingface_hub from locking, for the rest of the process, on a volume where nothing can be locked.

    It would make files there whose presence is the lock, and one that a killed Job leaves would stop all others for ever. Its
    locks save a second download, no more: what it downloads gets its name in one step from a file of the process's own.
    """
    place.blobs.mkdir(parents=True, exist_ok=True)
    if not file_locks.supported(place.blobs):
        log.warning("nothing can be locked on this volume: what two Jobs want at once is downloaded twice")
        setattr(file_download, "WeakFileLock", lambda *_, **__: contextlib.nullcontext())  # noqa: B010  not its to export


def missing_bytes(place: HubPlace, files: Iterable[RemoteFile]) -> int:
    """Bytes that a download of `files` still has to write."""
    sizes = {file.blob: file.size for file in files}
    return sum(max(0, size - _present(place, etag, size)) for etag, size in sizes.items())


def download_big(
    place: HubPlace,
    files: Iterable[RemoteFile],
    *,
    commit: str,
    xet: Xet,
    workers: int,
) -> None:
    """Downloads those of `files` that are big and absent; removes what dead downloads left of the others.

    From the Hub that `xet` knows, with its token.
    """
    place.blobs.mkdir(parents=True, exist_ok=True)
    for path in place.blobs.glob("tmp_*"):  # the library's, to learn the umask; one that was killed then leaves it
        file_locks.discard_old(path)
    full = threading.Event()

    with ThreadPoolExecutor(workers, thread_name_prefix="download") as pool:
        futures = [pool.submit(_bring, file, place, full, commit=commit, xet=xet) for file in _to_resume(place, files)]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            # After a failure those under way end by themselves, and keep what they have; the others don't begin. On a full
            # volume they end with their next bytes, and that is awaited: their unfinished files go.
            pool.shutdown(wait=full.is_set(), cancel_futures=True)


def _bring(file: RemoteFile, place: HubPlace, full: threading.Event, *, commit: str, xet: Xet) -> None:
    """Under the blob's lock: downloads a big file on from what is there, and removes what is there of a small one.

    Sets `full` where the volume has no space for it.
    """
    with file_locks.held(place.lock(file.blob)) as alone:
        if (place.blobs / file.blob).exists():
            return
        partial = _adopt(place, file) if alone else _own(place, file)
        if file.size < RESUMABLE_BYTES:
            partial.unlink(missing_ok=True)
            return
        # Who is overtaken finds the finished blob, or begins anew.
        while not (place.blobs / file.blob).exists():
            try:
                _download(file, partial, place, full, commit=commit, xet=xet)
                return
            except file_locks.Overtaken:
                continue
            except OSError as error:
                if error.errno in NO_SPACE:
                    full.set()
                raise


def _to_resume(place: HubPlace, files: Iterable[RemoteFile]) -> Collection[RemoteFile]:
    """Absent files that are big, or of which dead downloads left something; of several with one blob, one."""
    left_over = {path.name.partition(".")[0] for path in place.blobs.glob("*.incomplete")}
    return {
        file.blob: file
        for file in files
        if (file.size >= RESUMABLE_BYTES or file.blob in left_over)
        and _NAME.fullmatch(file.blob)
        and not (place.blobs / file.blob).exists()
    }.values()


def discard_partial(place: HubPlace, files: Iterable[RemoteFile]) -> None:
    """Gives the space of unfinished downloads back, where nobody is working on them."""
    for file in files:
        unfinished = (_partial(place, file.blob), *_left_over(place, file.blob))
        if any(path.exists() for path in unfinished):
            with file_locks.held(place.lock(file.blob), wait=False) as alone:
                for path in unfinished:
                    if alone or path == file_locks.own(_partial(place, file.blob)):
                        path.unlink(missing_ok=True)


class _Target(file_locks.Guarded):
    """An unfinished file that takes nothing more once the volume was found full, and hashes what is appended from its beginning on."""

    def __init__(self, path: Path, file: FileIO, full: threading.Event) -> None:
        super().__init__(path, file)
        self._full = full
        self._sha256, self._hashed = hashlib.sha256(), 0
        self._from_its_beginning = self.size == 0

    def write(self, data: bytes) -> int:
        """Appends; raises OSError(ENOSPC) at once where another thread found the volume full."""
        if self._full.is_set():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = super().write(data)
        if self._from_its_beginning:
            self._sha256.update(data)
            self._hashed += written
        return written

    def truncate(self, size: int | None = None) -> int:
        """Cuts the file; only one that is emptied can be hashed from its beginning again."""
        self._sha256, self._hashed = hashlib.sha256(), 0
        self._from_its_beginning = size == 0
        return super().truncate(size)

    @property
    def sha256(self) -> str | None:
        """In hex, of all that is in it; None where others wrote a part of that."""
        return self._sha256.hexdigest() if self._from_its_beginning and self._hashed == self.size else None


def _download(
    file: RemoteFile,
    partial: Path,
    place: HubPlace,
    full: threading.Event,
    *,
    commit: str,
    xet: Xet,
) -> None:
    url = hf_hub_url(place.repo, file.path, revision=commit, endpoint=xet.endpoint)
    found = get_hf_file_metadata(
        url, token=xet.token, timeout=METADATA_TIMEOUT_S, endpoint=xet.endpoint, retry_on_errors=True
    )
    if found.etag != file.blob or found.size != file.size:
        log.info("%s has an unusual ETag; it is left to huggingface_hub", file.path)
        return
    with partial.open("a+b", buffering=0) as opened:
        target = _Target(partial, opened, full)
        _append(file, target, found, xet)
        target.sync()
        sha256 = target.sha256
    _finish(file, partial, place, sha256)


def _append(file: RemoteFile, target: _Target, found: HfFileMetadata, xet: Xet) -> None:
    """Appends what the target lacks: by Xet where the Hub offers that, and what is still lacking then by plain HTTP."""
    have = target.size
    if have > file.size:
        target.truncate(0)
        have = 0
    log.info("downloading %s from byte %d of %d", file.path, have, file.size)
    if found.xet_file_data is not None:
        xet.receive(found.xet_file_data, target, start=have, size=file.size, name=file.path)
    elif beyond_http(file.size):
        raise ReasonError(
            Reason.JOB_FAILED,
            f"{text.clean(file.path, limit=200)!r} has {text.size(file.size)}, which is more than the Hub serves by plain "
            "HTTP, and it does not offer the file by Xet; use smaller shards",
        )
    if target.size < file.size:
        # `transport` keeps the token from any other host that the location may be on.
        http_get(
            found.location,
            target.as_file(),
            resume_size=target.size,
            headers=build_hf_headers(token=xet.token),
            expected_size=file.size,
            displayed_filename=file.path,
        )


def _finish(file: RemoteFile, partial: Path, place: HubPlace, sha256: str | None) -> None:
    """Gives a whole file its final name. Raises Overtaken where another process has taken it away."""
    try:
        if partial.stat().st_size == file.size:
            partial.chmod(SHARED_FILE)
            partial.replace(place.blobs / file.blob)
            if sha256 is not None:
                place.arrived[file.blob] = sha256
    except FileNotFoundError as error:
        raise file_locks.Overtaken(str(partial)) from error


def _partial(place: HubPlace, etag: str) -> Path:
    return place.blobs / f"{etag}.incomplete"


def _left_over(place: HubPlace, etag: str) -> list[Path]:
    """What library downloads of other processes left: `<etag>.<hex>.incomplete`; only to be called under the blob's lock."""
    return list(place.blobs.glob(f"{etag}.*.incomplete"))


def _own(place: HubPlace, file: RemoteFile) -> Path:
    """Where nothing can be locked: a file that only this process knows; what dead ones left goes by its age."""
    mine = file_locks.own(_partial(place, file.blob))
    for path in place.blobs.glob(f"{file.blob}.*incomplete"):
        if path != mine:
            file_locks.discard_left(path)
    return mine


def _adopt(place: HubPlace, file: RemoteFile) -> Path:
    """Keeps the longest unfinished download of a blob as its partial file and removes the others."""
    partial = _partial(place, file.blob)
    candidates = [(path.stat().st_size, path) for path in (partial, *_left_over(place, file.blob)) if path.is_file()]
    if candidates:
        longest = max(candidates)[1]
        for _, path in candidates:
            if path != longest:
                path.unlink(missing_ok=True)
        if longest != partial:
            longest.replace(partial)
    return partial


def _present(place: HubPlace, etag: str, size: int) -> int:
    if (place.blobs / etag).exists():
        return size
    return max(
        (path.stat().st_size for path in (_partial(place, etag), *_left_over(place, etag)) if path.is_file()), default=0
    )
