"""Adapters of the shared fleet from an HTTP archive, another claim and a path of the cache's volume: served, and closed to others."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.conftest import DEPLOYMENT, FLEET, SERVING, TEAM_A, TEAM_B, Fleet
from e2e.engine_client import token_ids
from e2e.fixtures.http_files import FileServer
from e2e.stack import Json, Stack, lora_adapter, token_secret, volume

pytestmark = pytest.mark.node

TOKEN = "token-of-the-file-server-0123456789"
CLAIM, FOLDER = "trained", "by-hand/team-a"


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


@pytest.fixture(scope="module")
def sources(stack: Stack, fleet: Fleet, tiny: Path) -> Iterator[dict[str, Json]]:
    """Three sources that the shared cache allows team A, each with another adapter, by the adapter's name."""
    cache = stack.cache_folder(SERVING)
    trained = cache.with_name(f"{SERVING}-{CLAIM}")
    shutil.rmtree(trained, ignore_errors=True)
    shutil.copytree(tiny / "adapters" / "two", trained / "runs" / "two")
    shutil.copytree(tiny / "adapters" / "three", cache / FOLDER / "three")
    stack.apply(*volume(SERVING, CLAIM, trained, read_only=True), *token_secret("files", TEAM_A, TOKEN))
    data = packed(tiny / "adapters" / "one")
    with FileServer(host=stack.cluster.node_ip) as server:
        server.put_one("one.tar.gz", data, "")
        server.authorization = f"Bearer {TOKEN}"
        allowed = {
            "http": {"allowedEndpoints": [server.url]},
            "persistentVolumeClaim": {"allowedClaims": [{"claimName": CLAIM, "namespaces": [TEAM_A]}]},
            "local": {"allowedPaths": [{"path": FOLDER, "namespaces": [TEAM_A]}]},
        }
        allow(stack, allowed)
        archive = {
            "url": f"{server.url}/one.tar.gz",
            "sha256": hashlib.sha256(data).hexdigest(),
            "credentialsSecretRef": {"name": "files"},
        }
        yield {
            "one": {"http": archive, "path": "adapter"},
            "two": {"persistentVolumeClaim": {"claimName": CLAIM, "path": "runs/two"}},
            "three": {"local": {"path": f"{FOLDER}/three"}},
        }
        allow(stack, dict.fromkeys(allowed))
    stack.delete("pvc", CLAIM, SERVING, wait=False)


def allow(stack: Stack, spec: Json) -> None:
    patch = json.dumps({"spec": spec})
    stack.cluster.kubectl("patch", "mcache", "default", "-n", SERVING, "--type=merge", "-p", patch)


def test_adapters_of_every_source_answer_and_no_other_tenant_gets_them(
    stack: Stack, sources: dict[str, Json], reference: Any
) -> None:
    names = {name: f"from-{name}" for name in sources}
    thieves = {name: f"thief-{name}" for name in sources}
    anonymous: Json = {**sources["one"], "http": {**sources["one"]["http"]}}
    del anonymous["http"]["credentialsSecretRef"]
    stack.apply(*(adapter(names[name], TEAM_A, source) for name, source in sources.items()))
    try:
        found = {name: stack.wait_condition("lora", names[name], TEAM_A, timeout=180) for name in names}
        expected = reference()
        for name in names:
            case = expected[name]["completions"][0]
            for url in stack.engine_urls(SERVING, FLEET).values():
                assert token_ids(url, names[name], case["prompt"]) == case["token_ids"], name
        assert found["one"]["status"]["resolvedRevision"] == sources["one"]["http"]["sha256"]
        stack.apply(
            *(
                adapter(thieves[name], TEAM_B, anonymous if name == "one" else source)
                for name, source in sources.items()
            )
        )
        reasons = {"one": "Unauthorized", "two": "SourceNotAllowed", "three": "SourceNotAllowed"}
        for name, reason in reasons.items():
            stack.wait_condition("lora", thieves[name], TEAM_B, status="False", reason=reason, timeout=90)
    finally:
        for name in sources:
            stack.delete("lora", names[name], TEAM_A)
            if stack.get("lora", thieves[name], TEAM_B):
                stack.delete("lora", thieves[name], TEAM_B)
