"""The rules that every HTTP request of a Job obeys, whichever part of huggingface_hub sends it.

1. The token goes to the endpoint's own origin only (scheme, host and port; from http also to the same host's https). The library
   also trusts huggingface.co when the endpoint is a mirror, and follows pagination links with the token: not here.
2. No request is without time-outs: several of the library's calls pass none.
3. What the source last complained about is remembered, so that a Job that waits too long can say for what.

Proxies and certificates stay as the library's client takes them from the environment.
"""

from __future__ import annotations

import threading
from typing import Final

import httpx2
from huggingface_hub import set_client_factory

from lora_operator.fetch.environment import DOWNLOAD_TIMEOUT_S
from lora_operator.fetch.sources.http_client import origin_of

_TIMEOUTS: Final = ("connect", "read", "write", "pool")
_CREDENTIALS: Final = ("authorization", "cookie")

_Origin = tuple[str, str, int]


class Complaints:
    """The last error status of the source that no success followed; written and read by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._status: int | None = None

    def note(self, response: httpx2.Response) -> None:
        """Takes an answer's status; called by the client for every response."""
        with self._lock:
            self._status = response.status_code if response.status_code >= 400 else None

    @property
    def status(self) -> int | None:
        """HTTP status of the newest answer if it was an error."""
        with self._lock:
            return self._status


def install(endpoint: str) -> Complaints:
    """Makes huggingface_hub use a client with the rules above for `endpoint`, for the rest of the process."""
    complaints = Complaints()
    home = origin_of(httpx2.URL(endpoint))

    def guard(request: httpx2.Request) -> None:
        if not _may_have_token(home, origin_of(request.url)):
            for name in _CREDENTIALS:
                request.headers.pop(name, None)
        given = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {key: given.get(key) or DOWNLOAD_TIMEOUT_S for key in _TIMEOUTS}

    def make() -> httpx2.Client:
        return httpx2.Client(
            event_hooks={"request": [guard], "response": [complaints.note]},
            follow_redirects=True,
            timeout=DOWNLOAD_TIMEOUT_S,
        )

    set_client_factory(make)
    return complaints


def _may_have_token(home: _Origin, target: _Origin) -> bool:
    # The same step up that HTTP clients allow themselves: http on its own port to https on its own port, same host.
    return target == home or (home == ("http", target[1], 80) and target[0] == "https" and target[2] == 443)
