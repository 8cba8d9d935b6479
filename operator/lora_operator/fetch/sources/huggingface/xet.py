"""Downloads by Xet, where the Hub offers a file so: its content comes in chunks from a store that many repositories share.

The transfers are hf_xet's and pass no client of ours, so the rules of `transport` are kept around them: the Hub's token is spent by our
own client alone, on the Hub's word for the store, a token of an hour that reads this one repository; that word is not taken where it leads
from https to http. Nothing is reported to anybody. A file comes in ranges, since hf_xet hands out up to 64 MiB at once, and a slow network
would look like a source that sends nothing. What fails here is never the Job's end: plain HTTP goes on with what has arrived.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol
from urllib.parse import urlsplit

from hf_xet import XetConfig, XetDownloadStreamGroup, XetFileInfo, XetSession  # type: ignore[import-untyped]
from huggingface_hub import constants
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]  # exported lazily
from huggingface_hub.utils._xet import XetConnectionInfo, XetFileData, parse_xet_connection_info_from_headers

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text
from lora_operator.fetch.environment import METADATA_TIMEOUT_S
from lora_operator.fetch.progress import stall_after
from lora_operator.fetch.sources import ranges

log = logging.getLogger(__name__)

# Of what a Job may do without a byte. A range that has not come by then is left to plain HTTP, which shows every byte, before the Job is
# ended as one that gets nowhere; hf_xet's own time-outs end nothing sooner, for it tries several times.
_PATIENCE: Final = 3 / 8
_NEARLY_EXPIRED_S: Final = 60
_MIB: Final = 1 << 20
# Of hf_xet 1.8. Its own buffers may take gigabytes, and its patience six minutes.
_SETTINGS: Final = {
    "telemetry.enabled": False,
    "reconstruction.download_buffer_size": 16 * _MIB,
    "reconstruction.download_buffer_perfile_size": 8 * _MIB,
    "reconstruction.download_buffer_limit": 32 * _MIB,
    "reconstruction.min_prefetch_buffer": 8 * _MIB,
    "reconstruction.min_reconstruction_fetch_size": 64 * _MIB,
    "reconstruction.max_reconstruction_fetch_size": 256 * _MIB,
    "client.ac_max_download_concurrency": 8,
    "client.retry_max_attempts": 2,
    "client.retry_base_delay": "1s",
    "client.retry_max_duration": "30s",
    "client.connect_timeout": "10s",
    "client.read_timeout": "30s",
}
_WAYS: Final = (("http", "http"), ("http", "https"), ("https", "https"))  # of the Hub, and of the store


class Target(Protocol):
    """An unfinished file, to which bytes are appended in order."""

    def write(self, data: bytes) -> int: ...


@dataclass
class Xet:
    """One Job's way to the stores that a Hub names; closed for good once it failed. For several threads."""

    endpoint: str
    token: str | Literal[False]
    requests: int = 1  # at a time for one file, each of ranges.PART bytes
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _session: XetSession | None = None
    _store: XetConnectionInfo | None = None
    _open: XetDownloadStreamGroup | None = None  # to that store
    _failed: bool = False

    def receive(self, offer: XetFileData, target: Target, *, start: int, size: int, name: str) -> None:
        """Appends what follows byte `start` of a file of `size` bytes, or less where the transfer fails and plain HTTP can go on.

        Raises what `target` does, and ReasonError where a file is too big for plain HTTP.
        """
        if self._failed and not beyond_http(size):
            return
        try:
            with _failing():
                self._ask(offer)  # once, before several threads would
            read, patience = self._reader(offer, size), stall_after() * _PATIENCE
            with ranges.in_order(read, start, size, requests=self.requests, patience=patience) as data:
                for piece in _told_apart(data):
                    target.write(piece)
        except _Broken as error:
            with self._lock:
                self._failed, store, self._store = True, self._store, None
            why = text.clean(f"{store.endpoint if store else self.endpoint}: {error}", limit=300)
            if beyond_http(size):
                raise ReasonError(
                    Reason.SOURCE_UNREACHABLE,
                    f"{text.clean(name, limit=200)!r} has {text.size(size)}, which the Hub serves by Xet alone, and that failed: {why}",
                ) from error
            log.warning("plain HTTP goes on where Xet failed: %s", why)

    def _reader(self, offer: XetFileData, size: int) -> ranges.Read:
        @contextmanager
        def read(first: int, behind: int) -> Iterator[Iterator[bytes]]:
            with _failing():
                group = self._ask(offer)
                stream = group.download_stream(XetFileInfo(offer.file_hash, size), start=first, end=behind)
            try:
                yield _told_apart(stream)
            finally:
                stream.cancel()

        return read

    def _ask(self, offer: XetFileData) -> XetDownloadStreamGroup:
        """The way to the store that the Hub names, with a token that lasts; the Hub is asked once, and again when that runs out."""
        with self._lock:
            if self._store is None or self._store.expiration_unix_epoch < time.time() + _NEARLY_EXPIRED_S:
                headers = build_hf_headers(token=self.token)
                timeout = min(METADATA_TIMEOUT_S, stall_after() * _PATIENCE)
                answer = get_session().get(offer.refresh_route, headers=headers, timeout=timeout)
                hf_raise_for_status(answer)
                store = parse_xet_connection_info_from_headers(answer.headers)
                if store is None:
                    raise ValueError("the Hub's answer names no store")
                text.protect(store.access_token)
                if (urlsplit(self.endpoint).scheme, urlsplit(store.endpoint).scheme) not in _WAYS:
                    raise ValueError(f"a store that is not asked: {store.endpoint}")
                if self._session is None:
                    self._session = XetSession(XetConfig().with_config(_SETTINGS))
                self._open = self._session.new_download_stream_group(
                    endpoint=store.endpoint,
                    token=store.access_token,
                    token_expiry_unix_secs=store.expiration_unix_epoch,
                )
                self._store = store
            return self._open


def beyond_http(size: int) -> bool:
    """Whether a file is too big for the Hub to serve it by plain HTTP."""
    return size > constants.MAX_HTTP_DOWNLOAD_SIZE


class _Broken(Exception):  # noqa: N818 - what it is about is the transfer
    """Whatever a transfer failed with."""


@contextmanager
def _failing() -> Iterator[None]:
    """Around what fails in ways of its own: hf_xet's panics are no Exception."""
    try:
        yield
    except (_Broken, GeneratorExit, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise _Broken(f"{type(error).__name__}: {error}") from error


def _told_apart(stream: Iterator[bytes]) -> Iterator[bytes]:
    """The stream, whose errors are told from those of who takes it."""
    while True:
        with _failing():
            data = next(stream, None)
        if data is None:
            return
        yield data
