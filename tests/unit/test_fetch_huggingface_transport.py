"""Rules of every request: the token stays at home, nothing waits for ever, complaints are remembered."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest
from huggingface_hub import get_session, set_client_factory

from lora_operator.fetch.sources.huggingface import transport

TOKEN = {"Authorization": "Bearer hf_x", "Cookie": "a=b"}


@pytest.fixture(autouse=True)
def _library_as_it_was() -> Iterator[None]:
    yield
    set_client_factory(httpx2.Client)


def after_hooks(request: httpx2.Request) -> httpx2.Request:
    for hook in get_session().event_hooks["request"]:
        hook(request)
    return request


@pytest.mark.parametrize(
    ("endpoint", "url", "kept"),
    [
        ("https://hub.test", "https://hub.test/api/models/x", True),
        ("https://hub.test:443", "https://HUB.test/x", True),
        ("http://hub.test", "https://hub.test/x", True),
        ("https://hub.test", "http://hub.test/x", False),
        ("https://hub.test", "https://hub.test:8443/x", False),
        ("http://hub.test:8080", "https://hub.test/x", False),
        ("https://hub.test", "https://huggingface.co/x", False),
        ("https://hub.test", "https://evil.hub.test/x", False),
        ("https://hub.test", "https://hub.test.evil/x", False),
        ("https://hub.test", "https://hub.test@evil.test/x", False),
        ("https://hub.test/mirror", "https://hub.test/mirror/api", True),
    ],
)
def test_the_token_goes_to_the_endpoint_only(endpoint: str, url: str, kept: bool) -> None:
    transport.install(endpoint)
    request = after_hooks(httpx2.Request("GET", url, headers=TOKEN))
    assert ("authorization" in request.headers, "cookie" in request.headers) == (kept, kept)


@pytest.mark.parametrize("given", [None, {}, {"connect": None, "read": None, "write": None, "pool": None}])
def test_no_request_is_without_a_time_out(given: dict[str, None] | None) -> None:
    transport.install("https://hub.test")
    extensions = {} if given is None else {"timeout": given}
    request = after_hooks(httpx2.Request("GET", "https://hub.test/", extensions=extensions))
    assert set(request.extensions["timeout"]) == {"connect", "read", "write", "pool"}
    assert all(request.extensions["timeout"].values())


def test_a_time_out_that_was_given_stays() -> None:
    transport.install("https://hub.test")
    request = httpx2.Request("GET", "https://hub.test/", extensions={"timeout": httpx2.Timeout(3.0).as_dict()})
    assert after_hooks(request).extensions["timeout"]["read"] == 3.0


def test_the_last_complaint_is_remembered_until_a_success() -> None:
    complaints = transport.install("https://hub.test")
    assert complaints.status is None
    (note,) = get_session().event_hooks["response"]
    note(httpx2.Response(429))
    assert complaints.status == 429
    note(httpx2.Response(206))
    assert complaints.status is None
