"""The Hugging Face source: authorise, list, download. Imports huggingface_hub, so `environment.prepare` comes first.

The library hands out a cached private repository to a caller whose token was just refused, and a cached full commit without any
request. So `authorise` must succeed with the Job's own credentials before anything here looks at the cache, and everything after it
uses the commit which that answer named.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Final, Literal

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text
from lora_operator.fetch.content.select import MAX_LISTED, RemoteFile
from lora_operator.fetch.environment import METADATA_TIMEOUT_S
from lora_operator.fetch.sources import ranges
from lora_operator.fetch.sources.huggingface import resume, transport
from lora_operator.fetch.sources.huggingface.errors import HubSubject, translate
from lora_operator.fetch.sources.huggingface.xet import Xet, beyond_http
from lora_operator.fetch.sources.retries import persist
from lora_operator.wire.jobs import HuggingFaceRequest

log = logging.getLogger(__name__)

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_OID: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
# Progress and the loss at a kill are as fine as this; the library's own 10 MiB is more than many adapters.
_DOWNLOAD_CHUNK: Final = 64 << 10


@dataclass(frozen=True)
class Hub:
    """An endpoint as one set of credentials sees it, and one repository on it."""

    request: HuggingFaceRequest
    token: str | Literal[False]
    complaints: transport.Complaints
    workers: int = 4

    @property
    def endpoint(self) -> str:
        """The Hub's address without a trailing slash."""
        return self.request.endpoint.rstrip("/")

    @property
    def subject(self) -> HubSubject:
        """The repository and as whom it is read, for messages."""
        return HubSubject.of(self.request, authenticated=self.token is not False)

    @property
    def api(self) -> HfApi:
        """The library's client, bound to endpoint and token."""
        return HfApi(endpoint=self.endpoint, token=self.token, library_name="lora-operator")


def connect(request: HuggingFaceRequest, token: str | Literal[False]) -> Hub:
    """Installs the transport rules and returns the Hub; sends nothing."""
    constants.DOWNLOAD_CHUNK_SIZE = _DOWNLOAD_CHUNK
    library = logging.getLogger("huggingface_hub")
    library.handlers.clear()  # its own handler would write past our redaction, signed addresses among it
    library.propagate = True
    return Hub(request, token, transport.install(request.endpoint.rstrip("/")))


def authorise(hub: Hub) -> str:
    """The commit that the revision names, once the source let these credentials see the repository and its content.

    Raises ReasonError. Model info is public for gated repositories, so the right to read is asked for separately.
    """
    with _translated(hub):
        info = hub.api.model_info(hub.request.repo, revision=hub.request.revision, timeout=METADATA_TIMEOUT_S)
        commit = info.sha
        _auth_check(hub)
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise _no_hub(hub, "it named no commit")
    if _COMMIT.fullmatch(hub.request.revision) and commit != hub.request.revision:
        raise ReasonError(
            Reason.REVISION_NOT_FOUND,
            f"{hub.subject.repo} answered for {hub.request.revision} with another commit, {commit}",
        )
    return commit


def listing(hub: Hub, commit: str) -> list[RemoteFile]:
    """Every file of the repository at `commit`, with what the source declares about it."""
    files: list[RemoteFile] = []
    with _translated(hub):
        for entry in hub.api.list_repo_tree(hub.request.repo, recursive=True, revision=commit):
            if isinstance(entry, RepoFile):
                files.append(_remote(hub, entry))
            if len(files) > MAX_LISTED:
                raise ReasonError(
                    Reason.JOB_FAILED,
                    f"{hub.subject.repo} has more than {MAX_LISTED} files, which is more than this program lists",
                )
    return files


def prove_readable(hub: Hub, commit: str, path: str) -> None:
    """One authorised HEAD of a wanted file: the last word on whether these credentials may read content."""
    with _translated(hub):
        found = get_hf_file_metadata(
            hf_hub_url(hub.request.repo, path, revision=commit, endpoint=hub.endpoint),
            token=hub.token,
            timeout=METADATA_TIMEOUT_S,
            endpoint=hub.endpoint,
            retry_on_errors=True,
        )
    if found.commit_hash != commit:
        raise _no_hub(hub, f"it answered for {text.clean(path, limit=200)!r} without the commit that was asked for")


def download(
    hub: Hub, place: resume.HubPlace, files: Sequence[RemoteFile], *, commit: str, moving: Callable[[], int]
) -> dict[str, Path]:
    """Brings `files` into the cache; returns the real path of each file's blob by the file's path.

    Connections that break are taken up again, at once as long as `moving` (any number that grows with what is written) grows,
    else a few times. Raises ReasonError; what was downloaded stays for the next attempt, but on a full volume.
    """
    xet = _xet(hub)

    def once() -> dict[str, Path]:
        with _translated(hub):
            _download_once(hub, xet, place, files, commit=commit)
        return {file.path: _blob(place, commit, file) for file in files}

    try:
        return persist(once, moving=moving)
    except ReasonError as error:
        if error.reason is Reason.INSUFFICIENT_SPACE:
            resume.discard_partial(place, files)
        raise


def download_again(hub: Hub, place: resume.HubPlace, file: RemoteFile, *, commit: str) -> None:
    """Replaces a wrong blob by a fresh download, in one step: who has the old one open keeps it, and no moment is without one.

    But of a file that plain HTTP can't bring: that one goes first.
    """
    with _translated(hub):
        if beyond_http(file.size):
            forget(place, commit, file)
            _download_once(hub, _xet(hub), place, [file], commit=commit)
            return
        hf_hub_download(
            hub.request.repo,
            file.path,
            revision=commit,
            endpoint=hub.endpoint,
            cache_dir=place.hub,
            token=hub.token,
            force_download=True,
        )


def forget(place: resume.HubPlace, commit: str, file: RemoteFile) -> None:
    """Removes a blob that is wrong, and its pointer, so that the next attempt downloads it."""
    pointer = place.storage / "snapshots" / commit / file.path
    if pointer.exists():
        _blob(place, commit, file).unlink()
    pointer.unlink(missing_ok=True)


def _xet(hub: Hub) -> Xet:
    return Xet(hub.endpoint, hub.token, requests=max(1, ranges.at_once(hub.workers) // 2))


def _download_once(hub: Hub, xet: Xet, place: resume.HubPlace, files: Sequence[RemoteFile], *, commit: str) -> None:
    resume.download_big(place, files, commit=commit, xet=xet, workers=hub.workers)
    snapshot_download(
        hub.request.repo,
        revision=commit,
        cache_dir=place.hub,
        endpoint=hub.endpoint,
        token=hub.token,
        allow_patterns=[escape(file.path) for file in files],
        max_workers=hub.workers,
        etag_timeout=METADATA_TIMEOUT_S,
        library_name="lora-operator",
    )


def _blob(place: resume.HubPlace, commit: str, file: RemoteFile) -> Path:
    """The blob behind a snapshot's pointer. Raises ReasonError when it is not one of this repository's own."""
    real = (place.storage / "snapshots" / commit / file.path).resolve()
    if not real.exists():
        # The library takes an unfinished snapshot for a whole one when the Hub stops answering in between.
        raise ReasonError(Reason.SOURCE_UNREACHABLE, f"{text.clean(file.path, limit=200)!r} did not arrive")
    if real.parent != place.blobs.resolve():
        raise ReasonError(
            Reason.JOB_FAILED,
            f"{text.clean(file.path, limit=200)!r} did not get into the cache's blobs but to {real.parent}",
        )
    return real


def _remote(hub: Hub, entry: RepoFile) -> RemoteFile:
    sha256 = entry.lfs.sha256 if entry.lfs is not None else None
    size = entry.lfs.size if entry.lfs is not None else entry.size
    typed = isinstance(entry.path, str) and isinstance(size, int) and isinstance(entry.blob_id, str) and size >= 0
    if not typed or not _OID.fullmatch(entry.blob_id) or (sha256 is not None and not _SHA256.fullmatch(sha256)):
        raise _no_hub(hub, "its listing has no usable names, sizes or checksums")
    return RemoteFile(path=entry.path, size=size, git_oid=entry.blob_id, sha256=sha256)


def _auth_check(hub: Hub) -> None:
    try:
        hub.api.auth_check(hub.request.repo)
    except HfHubHTTPError as error:
        # Mirrors may lack this route, which says so without the Hub's error code; `prove_readable` still decides.
        if error.response.status_code not in (404, 405, 501) or "X-Error-Code" in error.response.headers:
            raise
        log.info("%s has no auth-check", hub.endpoint)


def _no_hub(hub: Hub, why: str) -> ReasonError:
    return ReasonError(Reason.SOURCE_UNREACHABLE, f"{hub.endpoint} does not answer like a Hugging Face Hub: {why}")


@contextmanager
def _translated(hub: Hub) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        known = translate(error, hub.subject)
        if known.reason is not Reason.JOB_FAILED:
            raise known from error
        # What the library trips over when something that is no Hub answers (a proxy's login page, for instance).
        raise _no_hub(hub, text.clean(f"{type(error).__name__}: {error}", limit=300)) from error
    except Exception as error:
        raise translate(error, hub.subject) from error
