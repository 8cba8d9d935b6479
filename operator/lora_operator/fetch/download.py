"""The main flow of a download Job, in the order that its safety needs.

authorise → collect → list and choose → prove readable → volume and space → download → verify → confirm → stage → check → publish

Nothing is looked at in the cache before the source accepted the Job's own credentials, and nothing is published that was not verified
and checked in this very run. Every way out, also a signal, a stall and an unforeseen exception, leaves one result.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from pydantic import ValidationError

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import environment, text
from lora_operator.fetch.content import check, select, verify
from lora_operator.fetch.content.select import RemoteFile, WantedFile
from lora_operator.fetch.heartbeat import Meter
from lora_operator.fetch.progress import Reporter, measure_blobs, stall_after
from lora_operator.fetch.result import failure, finish
from lora_operator.fetch.sources.base import ContentStore, Source, open_source
from lora_operator.fetch.volume import layout, limits, reservations, snapshots, store_locks
from lora_operator.wire.jobs import FETCH_REQUEST_ENV, FetchRequest, FetchResult, Manifest, ManifestFile

log = logging.getLogger(__name__)

_EXIT_NOW: Final = os._exit  # a blocked download thread must not keep an ended Job alive


def main() -> int:
    """Runs the Job that the environment describes; returns the exit code."""
    _start_logging()
    signal.signal(signal.SIGTERM, _on_sigterm)
    request: FetchRequest | None = None
    try:
        with environment.private_home() as home:
            request = _read_request()
            environment.prepare(request, home=Path(home))
            result = _run(request)
    except ReasonError as error:
        result = failure(error)
    except BaseException as error:  # a library's panic, for instance
        print(text.redact(traceback.format_exc()), file=sys.stderr, flush=True)
        result = failure(error)
    if request is not None:
        result = result.model_copy(update={"volume": limits.volume_state(Path(request.cache_root))})
    return finish(result)


def main_then_exit() -> NoReturn:
    """The same, as a process."""
    status = main()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    _EXIT_NOW(status)


def _run(request: FetchRequest) -> FetchResult:
    source = open_source(request)

    def on_stall(seconds: float) -> None:
        _end_now(source.stalled(seconds))

    with Reporter(on_stall=on_stall, stall_after=stall_after()) as reporter:
        log.info("asking for %s", source.title)
        revision = source.authorise()
        log.info("%s is at revision %s", source.title, revision)
        with source.collected(Path(request.cache_root), reporter):
            wanted = select.choose(
                source.listing(),
                kind=request.type,
                folder=request.path,
                allow=source.allow_patterns,
                ignore=source.ignore_patterns,
                options=select.Options(
                    load_format=request.load_format,
                    code=request.trust_remote_code,
                    own_tokenizer=not request.without_tokenizer,
                    pickled_weights=request.pickled_weights,
                    in_place=request.is_in_place,
                ),
            )
            source.prove_readable([file.remote for file in wanted])
            unique = {file.remote.blob: file.remote for file in wanted}
            limits.require_size(_total(unique.values()), len(wanted), request.limits)
            return _fetch(request, source, revision, wanted, reporter)


def _fetch(
    request: FetchRequest, source: Source, revision: str, wanted: Sequence[WantedFile], reporter: Reporter
) -> FetchResult:
    root = Path(request.cache_root)
    layout.prepare(root, source.folder)
    store = source.open_store(root)
    with store_locks.held(root, store.blobs, owner=request.owner):
        return _download_and_publish(request, source, store, revision, wanted, reporter)


def _download_and_publish(
    request: FetchRequest,
    source: Source,
    store: ContentStore,
    revision: str,
    wanted: Sequence[WantedFile],
    reporter: Reporter,
) -> FetchResult:
    root = Path(request.cache_root)
    files = list({file.remote.blob: file.remote for file in wanted}.values())
    missing = store.missing_bytes(files)
    log.info("%d files, %s; %s to download", len(wanted), text.size(_total(files)), text.size(missing))

    cached = {file.blob for file in files if store.has(file)}
    measure = measure_blobs(store.blobs, files)
    remotes = [file.remote for file in wanted]
    with reservations.reserved(
        root,
        size=_total(files),
        missing=lambda: store.missing_bytes(files),
        done=lambda: measure()[0],
        limits=request.limits,
    ):
        reporter.enter("Downloading", total=_total(files), measure=measure)
        blobs = store.download(remotes, moving=lambda: measure()[1])

    verdicts = _verify(store, remotes, blobs, reporter)
    spoilt = [file for file in remotes if verdicts[file.path].fault and file.blob in cached]
    if spoilt:
        reporter.enter("Downloading", total=_total(files), measure=measure)
        for file in spoilt:  # engines may have it open, so it is replaced, never removed
            log.warning("%s in the cache is wrong: %s; downloading it again", file.path, verdicts[file.path].fault)
            store.download_again(file)
        verdicts |= _verify(store, spoilt, blobs, reporter)
    _require_right(store, remotes, verdicts)
    store.confirm()

    reporter.enter("Publishing", total=_total(files), measure=lambda: (_total(files), 0))
    return _publish(request, source.title, revision, wanted, blobs, verdicts)


def _verify(
    store: ContentStore, files: Sequence[RemoteFile], blobs: Mapping[str, Path], reporter: Reporter
) -> dict[str, verify.FileVerdict]:
    """Verdicts by the file's path in the source; a blob that several files share is read once."""
    meter = Meter()
    unique = {blobs[file.path]: store.expected(file) for file in files}
    log.info("verifying %d files", len(unique))
    reporter.enter("Verifying", total=_total(unique.values()), measure=meter.read)
    arrived = {blobs[file.path]: sha256 for file in files if (sha256 := store.arrived(file)) is not None}
    verdicts = verify.verify(unique, count=meter.add, arrived=arrived)
    return {file.path: verdicts[blobs[file.path]] for file in files}


def _require_right(
    store: ContentStore, files: Sequence[RemoteFile], verdicts: Mapping[str, verify.FileVerdict]
) -> None:
    wrong = [file for file in files if verdicts[file.path].fault]
    for file in wrong:
        store.forget(file)
    if wrong:
        more = f" (and {len(wrong) - 1} more files)" if len(wrong) > 1 else ""
        raise ReasonError(
            Reason.CHECKSUM_MISMATCH,
            f"{text.clean(wrong[0].path, limit=200)!r} is not what the source declares: "
            f"{verdicts[wrong[0].path].fault}{more}; it will be downloaded again",
        )


def _publish(
    request: FetchRequest,
    title: str,
    revision: str,
    wanted: Sequence[WantedFile],
    blobs: Mapping[str, Path],
    verdicts: Mapping[str, verify.FileVerdict],
) -> FetchResult:
    root = Path(os.path.realpath(request.cache_root))
    files = tuple(
        ManifestFile(path=file.name, size=verdicts[file.remote.path].size, sha256=verdicts[file.remote.path].sha256)
        for file in wanted
    )
    log.info("checking and publishing")
    with snapshots.staged(root, {file.name: blobs[file.remote.path] for file in wanted}) as staging:
        found = check.inspect(request, root=root, snapshot=staging)
        manifest = Manifest(
            type=request.type,
            repo=title,
            digest=verify.digest(files),
            files=files,
            pickles=found.pickles,
            rank=found.rank,
            target_modules=found.target_modules,
        )
        readable = request.artifact.rpartition("-")[0] or request.artifact  # without the hash of the want
        path = snapshots.publish(root, staging, manifest, title=readable)
    return FetchResult(
        ok=True,
        resolved_revision=revision,
        digest=manifest.digest,
        size_bytes=sum(file.size for file in files),
        files=len(files),
        path=path,
        rank=found.rank,
        target_modules=found.target_modules,
    )


def _total(files: Iterable[RemoteFile]) -> int:
    return sum(file.size for file in files)


def _read_request() -> FetchRequest:
    try:
        request = FetchRequest.model_validate_json(os.environ.get(FETCH_REQUEST_ENV, ""))
    except ValidationError as error:
        raise ReasonError(Reason.JOB_FAILED, f"{FETCH_REQUEST_ENV} is no fetch request: {error}") from error
    if request.artifact.startswith(".") or request.artifact != Path(request.artifact).name:
        raise ReasonError(
            Reason.JOB_FAILED, f"{FETCH_REQUEST_ENV} is no fetch request: {request.artifact!r} is not a name"
        )
    return request


def _on_sigterm(_number: int, _frame: FrameType | None) -> NoReturn:
    error = ReasonError(
        Reason.JOB_FAILED,
        "the Job was ended from outside (deadline, eviction or deletion); what was downloaded is kept",
    )
    _end_now(error)


def _end_now(error: ReasonError) -> NoReturn:
    reservations.drop()
    _EXIT_NOW(finish(failure(error)))


class _Redacting(logging.Formatter):
    """One line per record, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return text.clean(super().format(record), limit=4096)


def _start_logging() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Redacting("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for library in ("httpx2", "boto3", "botocore"):
        logging.getLogger(library).setLevel(logging.WARNING)
