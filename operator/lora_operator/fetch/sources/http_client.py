"""Requests to the HTTP servers of a source: only to those that the cache allows, and credentials only to those that the source names.

Redirects are followed here and not by the library, each to an allowed server or not at all: a Job is in the cluster's network, and
must not become its users' way into it. Answers are told apart by their status, never by their text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import httpx2

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text
from lora_operator.fetch.sources import errors
from lora_operator.fetch.sources.errors import translate_rest

_TIMEOUT_S: Final = 30.0  # without a byte
_MAX_REDIRECTS: Final = 5
_TOTAL: Final = re.compile(r"bytes (\d+)-\d+/(\d+)")
_REDIRECTS: Final = (301, 302, 303, 307, 308)
PLAIN: Final = {"Accept-Encoding": "identity", "User-Agent": "lora-operator"}  # of every request
_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True)
class ServedFile:
    """What a server says of one file."""

    size: int
    etag: str  # a strong one, else empty


@dataclass
class Client:
    """Sends the requests of one source, with its credentials to its own servers only."""

    allowed: frozenset[str]  # origins
    named: frozenset[str]  # origins of the source's own addresses, which get its credentials
    credentials: Mapping[str, str] | None
    transport: httpx2.Client
    scheme: str = "http"  # of the source, for messages

    @classmethod
    def of(cls, allowed: tuple[str, ...], named: tuple[str, ...], credentials: Mapping[str, str] | None) -> Client:
        """A client that sends nothing yet."""
        return cls(
            allowed=frozenset(map(origin, allowed)),
            named=frozenset(map(origin, named)),
            credentials=credentials,
            transport=new_transport(),
        )

    def probe(self, url: str) -> ServedFile:
        """Whether the file can be read with these credentials, and how big it is. Raises ReasonError."""
        with self.get(url, {"Range": "bytes=0-0"}) as answer:
            match = _TOTAL.fullmatch(answer.headers.get("Content-Range", ""))
            length = answer.headers.get("Content-Length", "")
            if answer.status_code == 206 and match is not None:
                size = int(match[2])
            elif answer.status_code == 416 and answer.headers.get("Content-Range") == "bytes */0":
                size = 0
            elif answer.status_code == 200 and length.isascii() and length.isdecimal():
                size = int(length)
            else:
                raise unreachable(url, f"it does not say how big the file is (status {answer.status_code})")
            etag = answer.headers.get("ETag", "")
            return ServedFile(size, "" if etag.startswith("W/") else etag)

    @contextmanager
    def read(self, url: str, start: int, etag: str) -> Iterator[Iterator[bytes]]:
        """The file's bytes from `start` on; where the server knows no ranges, what comes before is read and dropped."""
        headers = {"Range": f"bytes={start}-", **({"If-Range": etag} if etag else {})} if start else {}
        with self.get(url, headers) as answer:
            match = _TOTAL.fullmatch(answer.headers.get("Content-Range", ""))
            if answer.status_code == 206 and (match is None or int(match[1]) != start):
                raise unreachable(url, "it does not answer to a range with that range")
            if answer.status_code == 416:
                raise unreachable(url, f"it has no byte {start}")
            yield _without(answer.iter_raw(), 0 if answer.status_code == 206 else start)

    @contextmanager
    def get(self, url: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        """The answer to a request, after redirects to allowed servers. Raises ReasonError for all but 200, 206 and 416."""
        target, challenged = httpx2.URL(url), False
        for _ in range(_MAX_REDIRECTS + 2):
            self.require_allowed(url, str(target))
            request = self.transport.build_request("GET", target, headers={**PLAIN, **headers})
            answer = self.transport.send(request, stream=True, auth=self.auth(target))
            try:
                if answer.status_code in _REDIRECTS and "Location" in answer.headers:
                    target = target.join(answer.headers["Location"])
                    continue
                if answer.status_code == 401 and not challenged and origin(str(target)) in self.named:
                    challenged = True
                    if self.challenged(url, answer):
                        continue
                if answer.status_code not in (200, 206, 416):
                    raise self._refusal(url, answer)
                if answer.headers.get("Content-Encoding", "identity") != "identity":
                    raise unreachable(url, "it encodes what was asked for as it is")
                yield answer
                return
            finally:
                answer.close()
        raise unreachable(url, f"more than {_MAX_REDIRECTS} redirects")

    def require_allowed(self, url: str, target: str) -> None:
        """Raises SourceNotAllowed where `target`, which `url` led to, is on a server that the cache does not allow."""
        if origin(target) not in self.allowed:
            raise ReasonError(
                Reason.SOURCE_NOT_ALLOWED,
                f"{shown(url)} leads to {text.clean(origin(target), limit=300)}, which the ModelCache does not allow; name the "
                f"content where it is, or ask the cache's owner to add that server to spec.{self.scheme}.allowedEndpoints",
            )

    def challenged(self, url: str, answer: httpx2.Response) -> bool:
        """Whether the same request may succeed after a 401 of a named server; HTTP servers were told all at once."""
        return False

    def auth(self, target: httpx2.URL) -> httpx2.Auth:
        """What a request to `target` is sent with."""
        if self.credentials is None or origin(str(target)) not in self.named:
            return httpx2.Auth()  # nothing, and no other place is looked at
        token = self.credentials.get("token")
        if token is not None:
            return Bearer(token)
        return httpx2.BasicAuth(self.credentials["username"], self.credentials["password"])

    def _refusal(self, url: str, answer: httpx2.Response) -> ReasonError:
        status = answer.status_code
        if status in (401, 403):
            who = "the Secret's credentials" if self.credentials is not None else "anonymous clients"
            hint = (
                "put valid ones into it"
                if self.credentials is not None
                else f"set source.{self.scheme}.credentialsSecretRef"
            )
            return ReasonError(Reason.UNAUTHORIZED, f"{shown(url)} is refused to {who} ({status}); {hint}")
        if status in (404, 410):
            return ReasonError(
                Reason.ENTRY_NOT_FOUND, f"{shown(url)} does not exist ({status}); correct source.{self.scheme}"
            )
        if status == 429:
            return ReasonError(Reason.RATE_LIMITED, f"{shown(url)}: the server asks for fewer requests (429)")
        what = "server error" if status >= 500 or status == 408 else "unexpected answer"
        return unreachable(url, f"{what} {status}")


def new_transport() -> httpx2.Client:
    """A client that follows nothing by itself."""
    return httpx2.Client(follow_redirects=False, timeout=_TIMEOUT_S)


class Bearer(httpx2.Auth):
    """A token in the Authorization header."""

    def __init__(self, token: str) -> None:
        self._token = token

    def auth_flow(self, request: httpx2.Request) -> Iterator[httpx2.Request]:  # type: ignore[override]  # a plain iterator does
        request.headers["Authorization"] = f"Bearer {self._token}"
        yield request


def translate(error: Exception, title: str) -> ReasonError:
    """The reason behind `error`; JobFailed with the error's own words when none is known."""
    match error:
        case httpx2.TimeoutException():
            return unreachable(title, f"no answer in time ({type(error).__name__})")
        case httpx2.HTTPError() | httpx2.InvalidURL():
            return unreachable(title, f"{type(error).__name__}: {error}")
    return translate_rest(error, shown(title))


def unreachable(url: str, why: str) -> ReasonError:
    """SourceUnreachable with the address, without its query."""
    return errors.unreachable(shown(url), why)


def shown(url: str) -> str:
    """The address without its query, which may be a signature."""
    return text.clean(url.partition("?")[0], limit=400)


def origin_of(url: httpx2.URL) -> tuple[str, str, int]:
    """Scheme, host and port of an address, each in one spelling."""
    return url.scheme, url.host.lower(), url.port or _PORTS.get(url.scheme, 0)


def origin(url: str) -> str:
    """The same as one text."""
    scheme, host, port = origin_of(httpx2.URL(url))
    return f"{scheme}://{host}:{port}"


def _without(chunks: Iterator[bytes], count: int) -> Iterator[bytes]:
    for chunk in chunks:
        if count >= len(chunk):
            count -= len(chunk)
            yield b""  # so that the reader may stop in between
        else:
            yield chunk[count:]
            count = 0
