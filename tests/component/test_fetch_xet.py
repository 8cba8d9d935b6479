"""The download program against a Hub that offers Xet, with Hugging Face's own test server as the store."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.fixtures.hub import HubServer
from e2e.fixtures.network import Proxy, tls
from e2e.fixtures.xet import XetServer
from tests.component.fetch_support import Fetcher, until

TOKEN = "hf_right-token-of-the-tests"
BIG = "model.safetensors"
MIB = 1 << 20


@pytest.fixture
def xet() -> Iterator[XetServer]:
    with XetServer() as server:
        yield server


@pytest.fixture
def hub(xet: XetServer, content: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_token(TOKEN, repos=["org/private"])
        for repo in ("org/big", "org/private"):
            server.create_repo(repo, private=repo == "org/private", xet=xet)
            server.commit(repo, content / "big")
        yield server


@pytest.fixture
def fetcher(hub: HubServer, tmp_path: Path) -> Fetcher:
    (tmp_path / "cache").mkdir()
    return Fetcher(hub.url, tmp_path / "cache", tmp_path / "jobs")


@pytest.fixture
def size(content: Path) -> int:
    return (content / "big" / BIG).stat().st_size


def test_what_the_hub_offers_by_xet_comes_by_it(
    hub: HubServer, xet: XetServer, fetcher: Fetcher, content: Path, size: int
) -> None:
    job = fetcher.run("org/private", type="BaseModel", token=TOKEN)
    assert fetcher.manifest(job.ok)
    assert (fetcher.cache / job.ok.path / BIG).read_bytes() == (content / "big" / BIG).read_bytes()
    assert BIG not in hub.downloads("org/private")
    assert size * 0.8 < xet.sent < size * 1.1
    assert {status for _, _, status in xet.requests} <= {200, 206}
    assert not [path for method, path, _ in xet.requests if method != "GET"], "something was reported"
    asked = [path for _, path, _ in hub.requests("org/private") if "xet-read-token" in path]
    assert asked == [f"/api/models/org/private/xet-read-token/{hub.head('org/private')}"]
    assert xet.given
    assert TOKEN not in " ".join(xet.given)
    told = job.stdout + job.stderr
    assert not [token for token in (TOKEN, *xet.given) if token in told]
    assert fetcher.leaked() == []
    for key in ("org/private", "org/big"):
        hub.reset_counters()
        assert fetcher.run(key, type="BaseModel", token=TOKEN).ok
    assert xet.sent < size * 2.1, "the second run of one repository downloaded something"


def test_an_unfinished_file_is_gone_on_with(
    hub: HubServer, xet: XetServer, fetcher: Fetcher, content: Path, size: int
) -> None:
    blobs = fetcher.cache / "hub/models--org--big/blobs"
    blobs.mkdir(parents=True)
    commit = hub._hub.repos["org/big"].resolve("main")
    assert commit is not None
    (blobs / f"{commit.files[BIG].etag}.incomplete").write_bytes((content / "big" / BIG).read_bytes()[: 5 * MIB])
    result = fetcher.run("org/big", type="BaseModel").ok
    assert (fetcher.cache / result.path / BIG).read_bytes() == (content / "big" / BIG).read_bytes()
    assert xet.sent < size - 4 * MIB
    assert BIG not in hub.downloads("org/big")


def test_a_killed_download_goes_on_in_the_next_attempt(hub: HubServer, xet: XetServer, fetcher: Fetcher) -> None:
    data = random.Random(7).randbytes(160 * MIB)  # the store packs 64 MiB at most together
    hub.create_repo("org/huge", xet=xet)
    hub.commit("org/huge", {BIG: data, "config.json": b"{}", "tokenizer.json": b"{}"})
    xet.throttle(100 * MIB)
    job = fetcher.start("org/huge", type="BaseModel", artifact="x")
    unfinished = fetcher.cache / "hub/models--org--huge/blobs"
    until(lambda: sum(path.stat().st_size for path in unfinished.glob("*.incomplete")) > 32 * MIB)
    job.kill()
    kept = sum(path.stat().st_size for path in unfinished.glob("*.incomplete"))
    assert kept < len(data)
    xet.throttle(None)
    xet.sent = 0
    reason, _ = fetcher.run("org/huge", type="BaseModel", artifact="x").failed
    assert reason == "IncompleteModel"  # random bytes are no weights; they came whole, or it would be their checksum
    assert xet.sent < len(data) - kept + 4 * MIB
    assert not fetcher.leaked()


FAULTS = ["cut", "no content", "no listing", "gone", "expired", "no token", "slow"]
SILENCE = ["silent content", "silent listing", "silent Hub"]


@pytest.mark.parametrize("fault", [*FAULTS, *SILENCE])
def test_plain_http_goes_on_where_xet_fails(
    fault: str, hub: HubServer, xet: XetServer, fetcher: Fetcher, content: Path, size: int
) -> None:
    nobody = socket.create_server(("127.0.0.1", 0))
    match fault:
        case "cut":
            xet.cut_after(MIB)
        case "no content":
            xet.fail("/v1/fetch_term", 403)
        case "no listing":
            xet.fail("/v", 500)
        case "gone":
            xet.advertised = "http://127.0.0.1:9"
        case "expired":
            xet.lifetime = -10
        case "no token":
            hub.fail("org/big", "api/xet-read-token", status=403)
        case "slow":
            xet.throttle(MIB)
        case "silent content":
            xet.silence("/v1/fetch_term")
        case "silent listing":
            xet.silence("/v")
        case "silent Hub":
            hub._routes.origin = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    # Where nothing comes, and nothing is told, it is left before the Job is ended for it; and the Job's end waits for nobody.
    with nobody:
        job = fetcher.start("org/big", type="BaseModel", env={"LORA_OPERATOR_STALL_SECONDS": "8"}).wait(25)
    assert (fetcher.cache / job.ok.path / BIG).read_bytes() == (content / "big" / BIG).read_bytes()
    assert hub.downloads("org/big")[BIG] == 1
    assert job.stderr.count("plain HTTP goes on where Xet failed") == 1
    assert fetcher.leaked() == []


def test_a_store_is_not_asked_with_less_than_the_hub(
    hub: HubServer, xet: XetServer, fetcher: Fetcher, tmp_path: Path
) -> None:
    with tls(_port(hub.url), tmp_path / "hub") as (port, authority):
        fetcher.endpoint = hub._routes.origin = f"https://127.0.0.1:{port}"
        job = fetcher.run("org/big", type="BaseModel", want={"caBundle": str(authority)})
    assert job.ok
    assert xet.requests == []
    assert "a store that is not asked" in job.stderr


def test_a_store_is_asked_in_the_network_of_the_cache(
    hub: HubServer, xet: XetServer, fetcher: Fetcher, tmp_path: Path, size: int
) -> None:
    proxy = Proxy()
    with tls(xet.port, tmp_path / "store", "store.test") as (port, authority), proxy:
        xet.advertised = f"https://store.test:{port}"
        env = {"HTTPS_PROXY": proxy.url}
        assert fetcher.run("org/big", type="BaseModel", want={"caBundle": str(authority)}, env=env).ok
    assert set(proxy.asked) == {f"CONNECT store.test:{port}"}
    assert xet.sent > size * 0.8
    assert BIG not in hub.downloads("org/big")


def _port(url: str) -> int:
    return int(url.rpartition(":")[2])
