"""A cache without network: content that somebody put on the volume is found, verified as far as it declares sums, and used where it lies.

    hub/models--<org>--<name>/  or  models--<org>--<name>/    by `hf download --cache-dir`: refs, snapshots, blobs named by their sums
    <org>/<name>/                                              a plain folder; by `hf download --local-dir` it declares sums beside it
    <bucket>/<prefix>/                                         a plain folder, for S3 and Google
    <account>/<container>/<prefix>/                            a plain folder, for Azure

Nothing is asked, nothing is moved, and nothing of it is ever removed: it is somebody else's. Names and links on the volume are data.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text
from lora_operator.fetch.content.select import MAX_LISTED, RemoteFile
from lora_operator.fetch.sources.base import FilteredSource
from lora_operator.fetch.volume.layout import ARTIFACTS, HUB, inside
from lora_operator.wire.jobs import AzureRequest, FetchRequest, GcsRequest, HuggingFaceRequest, S3Request, SourceRequest

OfflineRequest = HuggingFaceRequest | S3Request | GcsRequest | AzureRequest

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_SUM: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_METADATA: Final = Path(".cache/huggingface/download")
_LINE_BYTES: Final = 4096
_SHOWN: Final = 5


@dataclass
class OfflineSource(FilteredSource):
    """What a want names, as it lies on the volume. It is its own store."""

    request: OfflineRequest
    root: Path
    files: tuple[RemoteFile, ...] = ()
    paths: dict[str, Path] = field(default_factory=dict)
    home: Path = Path()  # where it was found

    @classmethod
    def open(cls, wanted: SourceRequest, job: FetchRequest) -> OfflineSource:
        """What is wanted, on the Job's volume; reads nothing. Raises ReasonError for a kind of source that has no place there."""
        if not isinstance(wanted, OfflineRequest):
            raise ReasonError(Reason.SOURCE_NOT_ALLOWED, "an offline cache has no place for content of this source")
        return cls(wanted, Path(os.path.realpath(job.cache_root)))

    # As a source

    @property
    def title(self) -> str:
        bucket = {"s3": "s3://", "gcs": "gs://", "azure": "azure://"}
        return bucket.get(self.request.kind, "") + self._name

    @property
    def folder(self) -> str:
        return ARTIFACTS

    def authorise(self) -> str:
        """The revision that is there: whoever may use an offline cache may use what is on its volume."""
        if not self.root.is_dir():
            raise ReasonError(Reason.CACHE_NOT_READY, f"the cache is not mounted: there is no directory {self.root}")
        looked = []
        for place in self._places():
            folder = self.root / place
            looked.append(place)
            if not folder.is_dir():
                continue
            folder = self.home = inside(self.root, place)
            if isinstance(self.request, HuggingFaceRequest) and (folder / "snapshots").is_dir():
                return self._from_hub_layout(folder, place, self.request.revision)
            return self._plain(folder, place)
        raise ReasonError(
            Reason.REPOSITORY_NOT_FOUND,
            text.clean(
                f"the cache is offline, and {self.title} is not on its volume; looked for {' and '.join(looked)}; {self._hint()}"
            ),
        )

    def listing(self) -> Sequence[RemoteFile]:
        return self.files

    def prove_readable(self, files: Sequence[RemoteFile]) -> None:
        """Reading them is what verifies them."""

    def open_store(self, root: Path) -> OfflineSource:
        return self

    def stalled(self, seconds: float) -> ReasonError:
        return ReasonError(Reason.CACHE_NOT_READY, f"nothing could be read from the cache's volume for {seconds:.0f} s")

    # As a store

    @property
    def blobs(self) -> Path:
        return self.home / "blobs" if (self.home / "blobs").is_dir() else self.home

    def has(self, file: RemoteFile) -> bool:
        return True

    def missing_bytes(self, files: Sequence[RemoteFile]) -> int:
        return 0

    def download(self, files: Sequence[RemoteFile], *, moving: Callable[[], int]) -> dict[str, Path]:
        return {file.path: self.paths[file.path] for file in files}

    def arrived(self, file: RemoteFile) -> str | None:
        return None

    def expected(self, file: RemoteFile) -> RemoteFile:
        return file

    def download_again(self, file: RemoteFile) -> None:
        raise ReasonError(
            Reason.CHECKSUM_MISMATCH,
            text.clean(
                f"{self.paths[file.path].relative_to(self.root)} on the volume is not what it declares to be, and the cache is "
                "offline: put it there again"
            ),
        )

    def forget(self, file: RemoteFile) -> None:
        """It is not ours to remove."""

    def confirm(self) -> None:
        """What is there was read in this very run."""

    # What is there

    @property
    def _name(self) -> str:
        """A repository, or the folder of a bucket."""
        match self.request:
            case HuggingFaceRequest(repo=repo):
                return repo
            case AzureRequest(account=account, container=container, prefix=prefix):
                parts = [account, container, prefix.strip("/")]
            case S3Request(bucket=bucket, prefix=prefix) | GcsRequest(bucket=bucket, prefix=prefix):
                parts = [bucket, prefix.strip("/")]
        return "/".join(part for part in parts if part)

    def _places(self) -> list[str]:
        if not isinstance(self.request, HuggingFaceRequest):
            return [self._name]
        layout = "models--" + self._name.replace("/", "--")
        return [f"{HUB}/{layout}", layout, self._name]

    def _hint(self) -> str:
        if not isinstance(self.request, HuggingFaceRequest):
            return "put the folder's files there"
        return f"put it there with: hf download {self.request.repo} --cache-dir <volume>/{HUB}"

    def _from_hub_layout(self, folder: Path, place: str, revision: str) -> str:
        commit = _resolve(folder, revision)
        if commit is None:
            there = sorted(path.name for path in (folder / "snapshots").iterdir())
            raise ReasonError(
                Reason.REVISION_NOT_FOUND,
                text.clean(
                    f"the cache is offline, and {place} on its volume has no revision {revision!r}; it has: "
                    f"{', '.join(there[:_SHOWN]) or 'none'}"
                ),
            )
        self._take(folder / "snapshots" / commit, lambda path, real: real.name if real.parent.name == "blobs" else "")
        return commit

    def _plain(self, folder: Path, place: str) -> str:
        commits: set[str] = set()

        def declared(path: str, _real: Path) -> str:
            commit, etag = _metadata(folder / _METADATA / f"{path}.metadata")
            commits.add(commit)
            return etag

        self._take(folder, declared)
        commit = commits.pop() if len(commits) == 1 else ""
        wanted = self.request.revision if isinstance(self.request, HuggingFaceRequest) else ""
        if _COMMIT.fullmatch(wanted) and commit != wanted:
            raise ReasonError(
                Reason.REVISION_NOT_FOUND,
                f"the cache is offline, and {place} on its volume "
                + (
                    f"is of {commit}, not of {wanted}"
                    if commit
                    else f"does not say that it is of {wanted}: ask for main"
                )
                + f"; {self._hint()}",
            )
        return commit or self._listing_hash()

    def _take(self, folder: Path, declared: Callable[[str, Path], str]) -> None:
        files: list[RemoteFile] = []
        for path, real in _walk(folder, self.root):
            found = declared(path, real)
            known = found if _SUM.fullmatch(found) else ""
            sums = {"sha256": known} if len(known) == 64 else {"git_oid": known}
            files.append(RemoteFile(path, real.stat().st_size, stored_as=f"{len(files)}", **sums))
            self.paths[path] = real
            if len(files) > MAX_LISTED:
                raise ReasonError(Reason.JOB_FAILED, f"{self.title} has more than {MAX_LISTED} files on the volume")
        self.files = tuple(files)

    def _listing_hash(self) -> str:
        """Of names, sizes and times of change: another listing is another revision."""
        total = hashlib.sha256()
        for file in self.files:
            changed = self.paths[file.path].stat().st_mtime_ns
            total.update(f"{file.path}\0{file.size}\0{changed}\0\n".encode("utf-8", "surrogatepass"))
        return total.hexdigest()


def _resolve(folder: Path, revision: str) -> str | None:
    """The commit that a revision names in a Hub's cache folder; the only one that is there, where no ref of that name is."""
    snapshots = sorted(path.name for path in (folder / "snapshots").iterdir() if _COMMIT.fullmatch(path.name))
    if _COMMIT.fullmatch(revision):
        return revision if revision in snapshots else None
    ref = folder / "refs" / revision
    if ref.is_file() and os.path.realpath(ref).startswith(f"{folder}/"):
        commit = _lines(ref)[0]
        return commit if commit in snapshots else None
    return snapshots[0] if len(snapshots) == 1 else None


def _metadata(path: Path) -> tuple[str, str]:
    """Commit and ETag of one file, as `hf download --local-dir` keeps them beside it; empty where it does not."""
    lines = [*_lines(path), "", ""]
    return (lines[0], lines[1]) if _COMMIT.fullmatch(lines[0]) else ("", "")


def _lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            return file.read(_LINE_BYTES).decode("ascii", "replace").split("\n")
    except OSError:
        return [""]


def _walk(folder: Path, root: Path) -> Iterator[tuple[str, Path]]:
    """Every file below a folder by its relative path, with where it really lies; what leads out of the volume is not there."""
    for directory, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(directory, name)
            real = Path(os.path.realpath(path))
            if real.is_file() and real.is_relative_to(root):
                yield str(path.relative_to(folder)), real
