"""How a registry's token service is asked, and what a Docker configuration has for a registry; no request leaves this process."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator

import httpx2
import pytest

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text
from lora_operator.fetch.sources.oci_registry import OciRegistry, login_of

HOME, TOKENS = "https://registry.test", "https://tokens.test/token"
CHALLENGE = f'Bearer realm="{TOKENS}",service="registry.test",scope="repository:other:push"'
BASIC = "Basic " + base64.b64encode(b"puller:the-password").decode()


@pytest.fixture(autouse=True)
def no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_secrets", set())


def registry(
    answer: Callable[[httpx2.Request], httpx2.Response],
    *,
    allowed: tuple[str, ...] = (HOME, "https://tokens.test"),
    login: bool = True,
) -> OciRegistry:
    made = OciRegistry.to(HOME, "team/sql", allowed=allowed, login=("puller", "the-password") if login else None)
    made.transport = httpx2.Client(transport=httpx2.MockTransport(answer), follow_redirects=False)
    return made


@pytest.mark.parametrize("login", [True, False])
def test_the_token_service_gets_the_login_and_the_registry_the_token(login: bool) -> None:
    seen: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(request)
        if request.url.host == "tokens.test":
            return httpx2.Response(200, stream=httpx2.ByteStream(b'{"token": "token-of-the-service"}'))
        if request.headers.get("Authorization") != "Bearer token-of-the-service":
            return httpx2.Response(401, headers={"WWW-Authenticate": CHALLENGE})
        return httpx2.Response(200, stream=httpx2.ByteStream(b'{"layers": []}'))

    _, manifest = registry(answer, login=login).manifest("v1")
    assert manifest == {"layers": []}
    first, token, last = seen
    assert "Authorization" not in first.headers
    assert dict(token.url.params) == {"scope": "repository:team/sql:pull", "service": "registry.test"}
    assert token.headers.get("Authorization") == (BASIC if login else None)
    assert last.url == f"{HOME}/v2/team/sql/manifests/v1"
    assert text.clean("token-of-the-service") == "***"


def test_a_token_service_that_is_not_allowed_is_not_asked() -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        assert request.url.host == "registry.test"
        return httpx2.Response(401, headers={"WWW-Authenticate": CHALLENGE})

    with pytest.raises(
        ReasonError, match=r"leads to https://tokens\.test:443, which the ModelCache does not allow"
    ) as caught:
        registry(answer, allowed=(HOME,)).manifest("v1")
    assert caught.value.reason is Reason.SOURCE_NOT_ALLOWED


def test_a_token_goes_nowhere_else() -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.url.host == "registry.test":
            return httpx2.Response(307, headers={"Location": "https://storage.test/blob?sig=1"})
        assert "Authorization" not in request.headers
        return httpx2.Response(206, headers={"Content-Range": "bytes 0-0/7"}, content=b"x")

    client = registry(answer, allowed=(HOME, "https://storage.test"))
    client.token = "token-of-the-service"
    assert client.probe(client.blob("sha256:1")).size == 7


@pytest.mark.parametrize("challenge", [CHALLENGE, 'Basic realm="storage"'])
def test_whom_the_registry_sends_us_to_gets_no_login_by_asking_for_it(challenge: str) -> None:
    seen: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(request)
        if request.url.host == "registry.test":
            return httpx2.Response(307, headers={"Location": "https://storage.test/blob?sig=1"})
        return httpx2.Response(401, headers={"WWW-Authenticate": challenge})

    client = registry(answer, allowed=(HOME, "https://storage.test", "https://tokens.test"))
    with pytest.raises(ReasonError) as caught:
        client.probe(client.blob("sha256:1"))
    assert caught.value.reason is Reason.UNAUTHORIZED
    assert [request.url.host for request in seen] == ["registry.test", "storage.test"]
    assert not any("Authorization" in request.headers for request in seen)


def test_an_answer_of_the_token_service_is_bounded_and_not_unpacked() -> None:
    sent = 0

    class Endless(httpx2.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            nonlocal sent
            while sent < 64 << 20:
                sent += 1 << 20
                yield b" " * (1 << 20)

    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.url.host == "tokens.test":
            assert request.headers["Accept-Encoding"] == "identity"
            return httpx2.Response(200, headers={"Content-Encoding": "gzip"}, stream=Endless())
        return httpx2.Response(401, headers={"WWW-Authenticate": CHALLENGE})

    with pytest.raises(ReasonError, match="its answer is too long") as caught:
        registry(answer).manifest("v1")
    assert caught.value.reason is Reason.SOURCE_UNREACHABLE
    assert sent < 8 << 20


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_login_is_told(status: int) -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.url.host == "tokens.test":
            return httpx2.Response(status)
        return httpx2.Response(401, headers={"WWW-Authenticate": CHALLENGE})

    with pytest.raises(ReasonError, match="put valid ones into it") as caught:
        registry(answer).manifest("v1")
    assert caught.value.reason is Reason.UNAUTHORIZED


def test_a_manifest_of_another_digest_is_refused() -> None:
    client = registry(lambda request: httpx2.Response(200, stream=httpx2.ByteStream(b"{}")))
    with pytest.raises(ReasonError) as caught:
        client.manifest("sha256:" + "0" * 64)
    assert caught.value.reason is Reason.CHECKSUM_MISMATCH


AUTH = base64.b64encode(b"puller:the:password").decode()
LOGINS = {
    "an auth": {"registry.test": {"auth": AUTH}},
    "with a scheme and path": {"https://registry.test/v1/": {"auth": AUTH}},
    "user and password": {"registry.test": {"username": "puller", "password": "the:password"}},
    "among others": {"other.test": {"auth": "eDp5"}, "registry.test": {"auth": AUTH}},
}


@pytest.mark.parametrize("case", LOGINS)
def test_a_login_is_that_of_the_registry(case: str) -> None:
    assert login_of(json.dumps({"auths": LOGINS[case]}), "registry.test") == ("puller", "the:password")
    assert text.clean("the:password") == "***"


@pytest.mark.parametrize(
    "document", ["", "[]", '{"auths": {"registry.test": {"auth": "?"}}}', '{"auths": {"registry.test.evil": {}}}']
)
def test_what_has_no_login_is_told(document: str) -> None:
    with pytest.raises(ReasonError) as caught:
        login_of(document, "registry.test")
    assert caught.value.reason is Reason.UNAUTHORIZED
