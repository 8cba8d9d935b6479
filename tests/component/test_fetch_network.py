"""The download program where the network is a company's: through a proxy, and to sources with certificates of its own authority.

Hosts' names are known to the proxy alone, so nothing could arrive by another way.
"""

from __future__ import annotations

import hashlib
import json
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from e2e.fixtures.buckets import GcsServer
from e2e.fixtures.http_files import FileServer
from e2e.fixtures.hub import HubServer
from e2e.fixtures.network import Proxy, tls
from e2e.fixtures.s3 import S3Server
from lora_operator.desired.job import build_job, build_request
from tests.component.fetch_support import Fetcher, Job
from tests.unit.builders import make_artifact, make_cache

KEYS = {"AWS_ACCESS_KEY_ID": "AKTEAMAKEYOFTESTS", "AWS_SECRET_ACCESS_KEY": "right-secret-of-the-tests"}
MODEL = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def s3(content: Path) -> Iterator[S3Server]:
    with S3Server() as server:
        server.add_account(*KEYS.values())
        server.create_bucket("models", KEYS["AWS_ACCESS_KEY_ID"])
        server.upload("models", "base", content / "base")
        yield server


@pytest.fixture(scope="module")
def gcs(content: Path) -> Iterator[GcsServer]:
    with GcsServer() as server:
        server.create("models")
        server.upload("models", "base", content / "base")
        yield server


@pytest.fixture(scope="module")
def files(content: Path) -> Iterator[FileServer]:
    with FileServer() as server:
        server.put("base", content / "base", *MODEL)
        yield server


@pytest.fixture(scope="module")
def hub(content: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.create_repo("org/base")
        server.commit("org/base", content / "base")
        yield server


@dataclass(frozen=True)
class Sources:
    """Sources with each HTTP client that there is, and a Job for each, in the network that a ModelCache describes."""

    fetcher: Fetcher
    network: Mapping[str, Any]
    bundle: Path | None = None

    def hub(self, endpoint: str) -> Job:
        """The base model from the Hub there."""
        return self._start({"huggingFace": {"repo": "org/base", "endpoint": endpoint}})

    def s3(self, endpoint: str, **more: str) -> Job:
        """The base model from the bucket there."""
        return self._start({"s3": {"bucket": "models", "prefix": "base", "endpoint": endpoint, **more}}, KEYS)

    def gcs(self, endpoint: str) -> Job:
        """The base model from the bucket there, by obstore, which Azure's sources have too."""
        return self._start({"gcs": {"bucket": "models", "prefix": "base", "endpoint": endpoint}})

    def files(self, endpoint: str, content: Path) -> Job:
        """The base model from the server there, by the client that registries are asked with too."""
        wanted = [
            {
                "path": name,
                "url": f"{endpoint}/base/{name}",
                "sha256": hashlib.sha256((content / name).read_bytes()).hexdigest(),
            }
            for name in MODEL
        ]
        return self._start({"http": {"files": wanted, "allowedEndpoints": [endpoint]}})

    def _start(self, source: dict[str, Any], keys: Mapping[str, str] | None = None) -> Job:
        more = {"caBundle": {"name": "ca"}} if self.bundle else {}
        artifact, cache = make_artifact(type="BaseModel"), make_cache(network={**self.network, **more})
        request = build_request(artifact, cache, base_model_path=None, with_credentials=False)
        assert (request.ca_bundle is not None) == bool(more)
        manifest = build_job(
            artifact,
            cache,
            request,
            attempt=1,
            image="i",
            image_pull_policy="Never",
            deadline_seconds=60,
            resources={},
            nonce="",
        )
        (container,) = manifest["spec"]["template"]["spec"]["containers"]
        env = {one["name"]: one["value"] for one in container["env"] if "PROXY" in one["name"].upper()}
        want = {"caBundle": str(self.bundle)} if self.bundle else {}
        return self.fetcher.launch(source, credentials=keys, type="BaseModel", env=env, want=want)


@pytest.fixture
def fetcher(tmp_path: Path) -> Fetcher:
    (tmp_path / "cache").mkdir()
    return Fetcher("", tmp_path / "cache", tmp_path / "jobs")


def port_of(url: str) -> int:
    found = urllib.parse.urlsplit(url).port
    assert found is not None
    return found


def test_certificates_of_an_own_authority(
    hub: HubServer, s3: S3Server, gcs: GcsServer, files: FileServer, fetcher: Fetcher, content: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")
    with (
        tls(port_of(hub.url), tmp_path / "hub") as (hub_port, hub_ca),
        tls(port_of(s3.url), tmp_path / "s3") as (s3_port, s3_ca),
        tls(port_of(gcs.url), tmp_path / "gcs") as (gcs_port, gcs_ca),
        tls(port_of(files.url), tmp_path / "files") as (files_port, files_ca),
    ):
        hub_at, s3_at = f"https://127.0.0.1:{hub_port}", f"https://127.0.0.1:{s3_port}"
        gcs_at, files_at = f"https://127.0.0.1:{gcs_port}", f"https://127.0.0.1:{files_port}"
        bundle = tmp_path / "all.pem"
        bundle.write_text("".join(ca.read_text() for ca in (hub_ca, s3_ca, gcs_ca, files_ca)))
        jobs = [
            [each.hub(hub_at), each.s3(s3_at), each.gcs(gcs_at), each.files(files_at, content / "base")]
            for each in (Sources(fetcher, {}), Sources(fetcher, {}, bundle))
        ]
        wrong = Sources(fetcher, {}, broken).hub(hub_at)
        for job in jobs[0]:
            reason, message = job.failed
            assert (reason, "certificate" in message.lower()) == ("SourceUnreachable", True), message
        for job in jobs[1]:
            assert [file.path for file in fetcher.manifest(job.ok).files] == MODEL
        reason, message = wrong.failed
        assert (reason, "spec.network.caBundle" in message) == ("JobFailed", True), message


def test_all_requests_go_through_the_proxy(
    hub: HubServer, s3: S3Server, gcs: GcsServer, files: FileServer, fetcher: Fetcher, content: Path, tmp_path: Path
) -> None:
    with tls(port_of(s3.url), tmp_path / "s3", "s3.corp.test") as (s3_port, ca), Proxy() as proxy:
        assert isinstance(proxy, Proxy)
        sources = Sources(fetcher, {"httpProxy": proxy.url, "httpsProxy": proxy.url}, ca)
        jobs = [
            sources.hub(f"http://hub.corp.test:{port_of(hub.url)}"),
            sources.s3(f"https://s3.corp.test:{s3_port}"),
            sources.gcs(f"http://gcs.corp.test:{port_of(gcs.url)}"),
            sources.files(f"http://files.corp.test:{port_of(files.url)}", content / "base"),
        ]
        for job in jobs:
            assert [file.path for file in fetcher.manifest(job.ok).files] == MODEL
        assert any(one.startswith("GET http://hub.corp.test:") and one.endswith("/config.json") for one in proxy.asked)
        assert f"CONNECT s3.corp.test:{s3_port}" in proxy.asked
        for host in ("gcs", "files"):
            assert any(one.startswith(f"GET http://{host}.corp.test:") for one in proxy.asked), host
        assert any(one.startswith("HEAD http://gcs.corp.test:") for one in proxy.asked)


def test_a_bucket_that_is_a_host(fetcher: Fetcher, content: Path) -> None:
    with S3Server(domain="s3.corp.test") as server, Proxy() as proxy:
        assert isinstance(proxy, Proxy)
        server.add_account(*KEYS.values())
        server.create_bucket("models", KEYS["AWS_ACCESS_KEY_ID"])
        server.upload("models", "base", content / "base")
        port = port_of(server.direct_url)
        sources = Sources(fetcher, {"httpProxy": proxy.url})
        job = sources.s3(f"http://s3.corp.test:{port}", addressingStyle="VirtualHost")
        assert [file.path for file in fetcher.manifest(job.ok).files] == MODEL
    assert proxy.asked
    assert all(one.split(" ")[1].startswith(f"http://models.s3.corp.test:{port}/") for one in proxy.asked)


def test_hosts_that_are_asked_without_the_proxy_and_a_proxy_that_is_not_there(
    hub: HubServer, s3: S3Server, fetcher: Fetcher
) -> None:
    dead = {"httpProxy": "http://127.0.0.1:1", "httpsProxy": "http://127.0.0.1:1"}
    past = Sources(fetcher, {**dead, "noProxy": ["example.test", "127.0.0.1"]})
    through = Sources(fetcher, dead)
    for job in (past.hub(hub.url), past.s3(s3.url)):
        assert job.ok
    job = through.s3(s3.url)
    reason, message = job.failed
    assert (reason, s3.url in message) == ("SourceUnreachable", True), message


# The identity of a service account


class _Sts(BaseHTTPRequestHandler):
    """A token service that takes the right token for the keys of the tests' account."""

    def do_POST(self) -> None:
        asked = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.server.asked.append(asked)  # type: ignore[attr-defined]
        right = asked["WebIdentityToken"] == ["token-of-the-service-account"]
        expires = "<Expiration>2099-01-01T00:00:00Z</Expiration><SessionToken></SessionToken>"
        keys = f"<AccessKeyId>{KEYS['AWS_ACCESS_KEY_ID']}</AccessKeyId><SecretAccessKey>{KEYS['AWS_SECRET_ACCESS_KEY']}</SecretAccessKey>"
        body = f"<Credentials>{keys}{expires}</Credentials>"
        text = f"<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult>{body}</AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
        if not right:
            text = "<ErrorResponse><Error><Code>AccessDenied</Code><Message>not yours</Message></Error></ErrorResponse>"
        self.send_response(200 if right else 403)
        self.send_header("Content-Type", "text/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the library's name
        pass


@pytest.fixture
def sts() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Sts)
    server.asked = []  # type: ignore[attr-defined]
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_service_accounts_identity_is_used_where_it_was_allowed_and_nowhere_else(
    s3: S3Server, fetcher: Fetcher, sts: ThreadingHTTPServer, tmp_path: Path
) -> None:
    """The environment is what EKS gives to pods of such a service account, beside that of a node."""
    (tmp_path / "token").write_text("token-of-the-service-account")
    (tmp_path / "other").write_text("token-of-somebody-else")
    env = {
        "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/models",
        "AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "token"),
        "AWS_ENDPOINT_URL_STS": f"http://127.0.0.1:{sts.server_address[1]}",
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:1",
    }
    source = {"s3": {"bucket": "models", "prefix": "base", "endpoint": s3.url}}
    allowed = {"workloadIdentity": "reader"}

    def run(env: Mapping[str, str], want: Mapping[str, Any] | None = None) -> Job:
        return fetcher.launch(source, type="BaseModel", env=env, want=want)

    jobs = {
        "nobody allowed it": run(env),
        "allowed": run(env, allowed),
        "nothing is bound": run({}, allowed),
        "refused": run({**env, "AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "other")}, allowed),
    }
    reason, message = jobs["nobody allowed it"].failed
    assert (reason, "anonymously" in message) == ("Unauthorized", True), message
    assert jobs["allowed"].ok.files == len(MODEL)
    for case in ("nothing is bound", "refused"):
        reason, message = jobs[case].failed
        assert (reason, "ServiceAccount reader" in message) == ("Unauthorized", True), message
    asked = sts.asked  # type: ignore[attr-defined]
    assert {one["WebIdentityToken"][0] for one in asked} == {"token-of-the-service-account", "token-of-somebody-else"}
    for job in jobs.values():
        assert "token-of-" not in job.stdout + job.stderr + json.dumps(job.result.message)
