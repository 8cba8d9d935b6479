"""Adapters of the shared fleet from every kind of source that has no file of its own: served, and closed to others."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from e2e.conftest import DEPLOYMENT, FLEET, SERVING, TEAM_A, TEAM_B, Fleet
from e2e.engine_client import token_ids
from e2e.fixtures.buckets import AZURE_ACCOUNT, AZURE_KEY, AzureServer, GcsServer
from e2e.fixtures.http_files import FileServer
from e2e.fixtures.registry import PASSWORD, RegistryServer, docker_config
from e2e.stack import OPERATOR_NAMESPACE, RELEASE, Json, Stack, lora_adapter, token_secret, volume

pytestmark = pytest.mark.node

TOKEN = "token-of-the-file-server-0123456789"
CLAIM, FOLDER = "trained", "by-hand/team-a"
SECRET = "source-keys"  # of team A, with the keys of all of them


@dataclass(frozen=True)
class Origin:
    """One source: which of the tiny adapters it has, what a ModelCache has to allow, and what another tenant is told."""

    content: str
    source: Json
    allowed: Json
    keys: Json
    refusal: str

    @property
    def member(self) -> str:
        """The kind of source."""
        return next(iter(self.source))

    @property
    def for_others(self) -> Json:
        """The source as somebody names it who has no Secret."""
        body = {name: value for name, value in self.source[self.member].items() if name != "credentialsSecretRef"}
        return {**self.source, self.member: body}


def adapter(name: str, namespace: str, source: Json) -> Json:
    """A LoRAAdapter of the shared fleet from some source."""
    manifest = lora_adapter(name, namespace, repo="replaced/below", deployment=DEPLOYMENT)
    manifest["spec"]["source"] = source
    return manifest


def packed(folder: Path) -> bytes:
    """The files of a folder as a tar archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, f"adapter/{path.name}")
    return out.getvalue()


def with_keys(**body: Any) -> Json:
    """A source's member that is read by team A's Secret."""
    return {**body, "credentialsSecretRef": {"name": SECRET}}


@contextmanager
def from_http(stack: Stack, adapters: Path) -> Iterator[Origin]:
    data = packed(adapters / "one")
    with FileServer(host=stack.cluster.node_ip) as server:
        server.put_one("one.tar.gz", data, "")
        server.authorization = f"Bearer {TOKEN}"
        body = with_keys(url=f"{server.url}/one.tar.gz", sha256=hashlib.sha256(data).hexdigest())
        allowed = {"allowedEndpoints": [server.url]}
        yield Origin("one", {"http": body, "path": "adapter"}, allowed, {"token": TOKEN}, "Unauthorized")


@contextmanager
def from_a_claim(stack: Stack, adapters: Path) -> Iterator[Origin]:
    trained = stack.cache_folder(SERVING).with_name(f"{SERVING}-{CLAIM}")
    shutil.rmtree(trained, ignore_errors=True)
    shutil.copytree(adapters / "two", trained / "runs" / "two")
    stack.apply(*volume(SERVING, CLAIM, trained, read_only=True))
    allowed = {"allowedClaims": [{"claimName": CLAIM, "namespaces": [TEAM_A]}]}
    body = {"claimName": CLAIM, "path": "runs/two"}
    yield Origin("two", {"persistentVolumeClaim": body}, allowed, {}, "SourceNotAllowed")
    stack.delete("pvc", CLAIM, SERVING, wait=False)


@contextmanager
def from_the_volume(stack: Stack, adapters: Path) -> Iterator[Origin]:
    shutil.copytree(adapters / "three", stack.cache_folder(SERVING) / FOLDER / "three")
    allowed = {"allowedPaths": [{"path": FOLDER, "namespaces": [TEAM_A]}]}
    yield Origin("three", {"local": {"path": f"{FOLDER}/three"}}, allowed, {}, "SourceNotAllowed")


@contextmanager
def from_gcs(stack: Stack, adapters: Path) -> Iterator[Origin]:
    command = ["openssl", "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"]
    pem = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    key = {"type": "service_account", "client_email": "a@tests.example", "private_key": pem, "private_key_id": "1"}
    with GcsServer(host=stack.cluster.node_ip) as server:
        server.create("models")
        server.upload("models", "sql", adapters / "one")
        server.refuse = lambda seen: None if seen.authorization else 401
        body = with_keys(bucket="models", prefix="sql", endpoint=server.url)
        allowed = {"allowedEndpoints": [server.url]}
        yield Origin("one", {"gcs": body}, allowed, {"key.json": json.dumps(key)}, "Unauthorized")


@contextmanager
def from_azure(stack: Stack, adapters: Path) -> Iterator[Origin]:
    with AzureServer(host=stack.cluster.node_ip) as server:
        server.create("models")
        server.upload("models", "sql", adapters / "two")
        body = with_keys(account=AZURE_ACCOUNT, container="models", prefix="sql", endpoint=server.endpoint)
        keys = {"AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY}
        yield Origin("two", {"azure": body}, {"allowedEndpoints": [server.endpoint]}, keys, "Unauthorized")


@contextmanager
def from_a_registry(stack: Stack, adapters: Path) -> Iterator[Origin]:
    with RegistryServer(host=stack.cluster.node_ip, closed=True) as server:
        files = sorted((adapters / "three").iterdir())
        server.push("team-a/sql", "1.0", [server.file("team-a/sql", path.name, path.read_bytes()) for path in files])
        body = with_keys(reference=f"{server.address}/team-a/sql:1.0")
        keys = {".dockerconfigjson": docker_config(server.address)}
        yield Origin("three", {"oci": body}, {"allowedEndpoints": [server.url]}, keys, "Unauthorized")


ORIGINS = (from_http, from_a_claim, from_the_volume, from_gcs, from_azure, from_a_registry)


@pytest.fixture(scope="module")
def origins(stack: Stack, fleet: Fleet, tiny: Path) -> Iterator[dict[str, Origin]]:
    """All of them, allowed by the shared cache, by their kind."""
    with ExitStack() as running:
        found = [running.enter_context(origin(stack, tiny / "adapters")) for origin in ORIGINS]
        secret, *rights = token_secret(SECRET, TEAM_A, "")
        secret["stringData"] = {name: value for one in found for name, value in one.keys.items()}
        stack.apply(secret, *rights)
        allow(stack, {one.member: one.allowed for one in found})
        yield {one.member: one for one in found}
        allow(stack, {one.member: None for one in found})


def allow(stack: Stack, spec: Json) -> None:
    patch = json.dumps({"spec": spec})
    stack.cluster.kubectl("patch", "mcache", "default", "-n", SERVING, "--type=merge", "-p", patch)


def test_adapters_of_every_source_answer_and_no_other_tenant_gets_them(
    stack: Stack, origins: dict[str, Origin], reference: Any
) -> None:
    names = {member: f"from-{member.lower()}" for member in origins}
    thieves = {member: f"thief-{member.lower()}" for member in origins}
    stack.apply(*(adapter(names[member], TEAM_A, one.source) for member, one in origins.items()))
    try:
        found = {member: stack.wait_condition("lora", names[member], TEAM_A, timeout=180) for member in origins}
        expected = reference()
        for member, one in origins.items():
            case = expected[one.content]["completions"][0]
            for url in stack.engine_urls(SERVING, FLEET).values():
                assert token_ids(url, names[member], case["prompt"]) == case["token_ids"], member
        assert found["http"]["status"]["resolvedRevision"] == origins["http"].source["http"]["sha256"]
        assert found["oci"]["status"]["resolvedRevision"].startswith("sha256:")
        stack.apply(*(adapter(thieves[member], TEAM_B, one.for_others) for member, one in origins.items()))
        for member, one in origins.items():
            stack.wait_condition("lora", thieves[member], TEAM_B, status="False", reason=one.refusal, timeout=90)
        shown = stack.cluster.kubectl("get", "lora,mart,mcache,jobs,pods,events,cm", "-A", "-o", "yaml")
        shown += stack.cluster.kubectl("logs", f"deployment/{RELEASE}", "-n", OPERATOR_NAMESPACE)
        for secret in (TOKEN, AZURE_KEY, PASSWORD, "PRIVATE KEY"):
            assert secret not in shown
    finally:
        for name, namespace in [*((n, TEAM_A) for n in names.values()), *((n, TEAM_B) for n in thieves.values())]:
            if stack.get("lora", name, namespace):
                stack.delete("lora", name, namespace)
