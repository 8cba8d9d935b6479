"""kube.py against a real API server: what it sends is understood, and what comes back is told in our own errors."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes.aio.config import incluster_config

from e2e.cluster import ControlPlane
from lora_operator.errors import (
    ConflictError,
    ForbiddenError,
    InvalidObjectError,
    KubeError,
    NotFoundError,
    UnavailableError,
)
from lora_operator.kube import client as kube_module
from lora_operator.kube.client import Kube, load_configuration
from lora_operator.kube.kinds import CONFIG_MAPS, EVENTS, LORA_ADAPTERS, NAMESPACES, PODS, SECRETS, Kind
from lora_operator.reconcile.store import Store
from tests.unit.builders import take_list


@pytest.fixture
async def kube(control_plane: ControlPlane) -> AsyncIterator[Kube]:
    """The client under test, as administrator."""
    async with Kube(await load_configuration(str(control_plane.kubeconfig))) as client:
        yield client


def config_map(namespace: str, name: str, data: dict[str, str], **labels: str) -> dict[str, Any]:
    """A ConfigMap."""
    metadata = {"name": name, "namespace": namespace, "labels": labels}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def adapter(namespace: str, name: str) -> dict[str, Any]:
    """A LoRAAdapter."""
    return {
        "apiVersion": "lora-operator.dev/v1alpha1",
        "kind": "LoRAAdapter",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "source": {"huggingFace": {"repo": "org/sql"}},
            "vllmDeploymentRef": {"name": "llama", "namespace": "serving"},
        },
    }


def status(reason: str) -> dict[str, Any]:
    """A status with one condition."""
    condition = {
        "type": "Ready",
        "status": "False",
        "reason": reason,
        "message": "m",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    return {"observedGeneration": 1, "conditions": [condition]}


def version(obj: dict[str, Any]) -> str:
    """The object's resourceVersion."""
    return str(obj["metadata"]["resourceVersion"])


async def test_an_apply_makes_repairs_and_takes_back_fields(kube: Kube, namespace: str) -> None:
    first = await kube.apply(config_map(namespace, "applied", {"a": "1", "b": "2"}))
    await kube.patch(CONFIG_MAPS, namespace, "applied", {"data": {"a": "drifted", "foreign": "kept"}})
    second = await kube.apply(config_map(namespace, "applied", {"a": "1"}))
    assert first["data"] == {"a": "1", "b": "2"}
    assert second["data"] == {"a": "1", "foreign": "kept"}


async def test_an_apply_that_changes_nothing_leaves_the_resource_version(kube: Kube, namespace: str) -> None:
    first = await kube.apply(config_map(namespace, "same", {"a": "1"}))
    assert version(await kube.apply(config_map(namespace, "same", {"a": "1"}))) == version(first)


async def test_a_dry_run_stores_nothing_and_tells_what_is_wrong(kube: Kube, namespace: str) -> None:
    await kube.apply(config_map(namespace, "dry", {"a": "1"}), dry_run=True)
    with pytest.raises(NotFoundError):
        await kube.get(CONFIG_MAPS, namespace, "dry")
    wrong = {**adapter(namespace, "dry"), "spec": {"source": {}, "vllmDeploymentRef": {"name": "llama"}}}
    with pytest.raises(InvalidObjectError, match=r"apply \(dry run\) LoRAAdapter test-[0-9]+/dry: .*huggingFace"):
        await kube.apply(wrong, dry_run=True)


async def test_a_status_is_applied_to_the_same_object_only(kube: Kube, namespace: str) -> None:
    await kube.apply(adapter(namespace, "sql"))
    made = await kube.get(LORA_ADAPTERS, namespace, "sql")
    uid = made["metadata"]["uid"]
    first = await kube.apply_status(LORA_ADAPTERS, namespace, "sql", status("Downloading"), uid=uid)
    assert first["status"]["conditions"][0]["reason"] == "Downloading"
    assert first["spec"] == made["spec"]
    again = await kube.apply_status(LORA_ADAPTERS, namespace, "sql", status("Downloading"), uid=uid)
    assert version(again) == version(first)
    shorter = await kube.apply_status(LORA_ADAPTERS, namespace, "sql", {"observedGeneration": 1})
    assert shorter["status"] == {"observedGeneration": 1}
    assert (await kube.apply(adapter(namespace, "sql")))["status"] == {"observedGeneration": 1}
    with pytest.raises(ConflictError, match="another object has this name now"):
        await kube.apply_status(LORA_ADAPTERS, namespace, "sql", status("Downloading"), uid="another")
    with pytest.raises(NotFoundError):
        await kube.apply_status(LORA_ADAPTERS, namespace, "absent", status("Downloading"))


async def test_a_status_is_never_applied_to_a_namesake_that_came_meanwhile(
    kube: Kube, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await kube.apply(adapter(namespace, "raced"))
    uid = (await kube.get(LORA_ADAPTERS, namespace, "raced"))["metadata"]["uid"]
    look = kube.get_metadata

    async def look_then_replace(*names: Any) -> dict[str, Any]:
        seen = await look(*names)
        if seen["metadata"]["uid"] == uid:
            await kube.delete(LORA_ADAPTERS, namespace, "raced")
            await kube.apply(adapter(namespace, "raced"))
        return seen

    monkeypatch.setattr(kube, "get_metadata", look_then_replace)
    with pytest.raises(ConflictError):
        await kube.apply_status(LORA_ADAPTERS, namespace, "raced", status("Downloading"), uid=uid)
    assert "status" not in await kube.get(LORA_ADAPTERS, namespace, "raced")


async def test_a_status_is_applied_though_somebody_edits_the_object_meanwhile(
    kube: Kube, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await kube.apply(adapter(namespace, "edited"))
    uid = (await kube.get(LORA_ADAPTERS, namespace, "edited"))["metadata"]["uid"]
    look, edits = kube.get_metadata, iter(["one", "two"])

    async def look_then_edit(*names: Any) -> dict[str, Any]:
        seen = await look(*names)
        for edit in edits:
            await kube.patch(LORA_ADAPTERS, namespace, "edited", {"metadata": {"annotations": {"edit": edit}}})
            break
        return seen

    monkeypatch.setattr(kube, "get_metadata", look_then_edit)
    written = await kube.apply_status(LORA_ADAPTERS, namespace, "edited", status("Downloading"), uid=uid)
    assert written["status"]["conditions"][0]["reason"] == "Downloading"


async def test_a_known_resource_version_saves_a_request_while_it_is_current(
    kube: Kube, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await kube.apply(adapter(namespace, "known"))
    looks: list[str] = []
    look = kube.get_metadata

    async def count(*names: Any) -> dict[str, Any]:
        looks.append(names[-1])
        return await look(*names)

    monkeypatch.setattr(kube, "get_metadata", count)
    known = {"uid": made["metadata"]["uid"], "resource_version": version(made)}
    for reason, expected in (("Queued", 0), ("Downloading", 1)):
        written = await kube.apply_status(LORA_ADAPTERS, namespace, "known", status(reason), **known)
        assert written["status"]["conditions"][0]["reason"] == reason
        assert len(looks) == expected
    with pytest.raises(ConflictError):
        await kube.apply_status(LORA_ADAPTERS, namespace, "known", status("Ready"), **{**known, "uid": "another"})


async def test_a_second_create_is_a_conflict(kube: Kube, namespace: str) -> None:
    await kube.create(config_map(namespace, "created", {}))
    with pytest.raises(
        ConflictError, match=r'create ConfigMap test-[0-9]+/created: configmaps "created" already exists'
    ):
        await kube.create(config_map(namespace, "created", {}))


async def test_a_delete_takes_the_object_that_was_meant_or_none(kube: Kube, namespace: str) -> None:
    made = await kube.create(config_map(namespace, "deleted", {}))
    await kube.delete(CONFIG_MAPS, namespace, "deleted", uid="another")
    assert version(await kube.get(CONFIG_MAPS, namespace, "deleted")) == version(made)
    await kube.delete(CONFIG_MAPS, namespace, "deleted", uid=made["metadata"]["uid"])
    with pytest.raises(NotFoundError):
        await kube.get(CONFIG_MAPS, namespace, "deleted")
    await kube.delete(CONFIG_MAPS, namespace, "deleted")


async def test_a_secrets_metadata_comes_without_its_data(kube: Kube, namespace: str) -> None:
    value = base64.b64encode(b"s3cret").decode()
    metadata = {"name": "token", "namespace": namespace}
    made = await kube.create({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": {"token": value}})
    seen = await kube.get_metadata(SECRETS, namespace, "token")
    assert seen["kind"] == "PartialObjectMetadata"
    assert seen["metadata"]["uid"] == made["metadata"]["uid"]
    assert value not in json.dumps(seen)
    with pytest.raises(NotFoundError, match=r"get metadata of Secret test-[0-9]+/absent"):
        await kube.get_metadata(SECRETS, namespace, "absent")


async def test_a_long_list_is_complete_filtered_and_typed(kube: Kube, namespace: str) -> None:
    limit = asyncio.Semaphore(20)

    async def make(number: int) -> None:
        async with limit:
            await kube.create(config_map(namespace, f"many-{number}", {}, batch="many"))

    await asyncio.gather(*(make(number) for number in range(1203)))
    items, list_version = await kube.list(CONFIG_MAPS, label_selector="batch=many")
    assert len({item["metadata"]["name"] for item in items}) == 1203
    assert all((item["apiVersion"], item["kind"]) == ("v1", "ConfigMap") for item in items)
    assert int(list_version) >= max(int(version(item)) for item in items)
    elsewhere, later_version = await kube.list(CONFIG_MAPS, namespace="default", label_selector="batch=many")
    assert elsewhere == []
    assert int(later_version) >= int(list_version), "the API server itself may write meanwhile"


async def test_a_thousand_adapters_are_listed_into_the_store_in_seconds(kube: Kube, namespace: str) -> None:
    limit = asyncio.Semaphore(20)

    async def make(number: int) -> None:
        async with limit:
            await kube.create(adapter(namespace, f"bulk-{number}"))

    await asyncio.gather(*(make(number) for number in range(1000)))
    store = Store()
    started = time.perf_counter()
    items, list_version = await kube.list(LORA_ADAPTERS)
    take_list(store, Kind.LORA_ADAPTER, items, list_version)
    elapsed = time.perf_counter() - started
    assert elapsed < 60, "seconds, on a busy machine; 5,000 were measured to take 1.5"
    assert len(store.adapters_of(("serving", "llama"))) >= 1000


async def test_rights_that_are_missing_are_told(control_plane: ControlPlane) -> None:
    configuration = await load_configuration(str(control_plane.user_kubeconfig("system:kube-proxy")))
    async with Kube(configuration) as kube:
        with pytest.raises(ForbiddenError, match=r"get Secret default/token: .* cannot get resource"):
            await kube.get(SECRETS, "default", "token")


async def test_a_token_that_is_not_known_is_tried_again_later(control_plane: ControlPlane) -> None:
    configuration = await load_configuration(str(control_plane.kubeconfig))
    configuration.api_key = {"BearerToken": "Bearer nonsense"}
    async with Kube(configuration) as kube:
        with pytest.raises(UnavailableError, match="Unauthorized") as caught:
            await kube.list(PODS)
    assert "nonsense" not in str(caught.value)


async def test_an_api_server_that_is_away_or_silent_is_unavailable(control_plane: ControlPlane) -> None:
    configuration = await load_configuration(str(control_plane.kubeconfig))
    configuration.host = "https://127.0.0.1:9"
    async with Kube(configuration) as kube:
        with pytest.raises(UnavailableError, match="list pods"):
            await kube.list(PODS)
    connections: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_server(lambda _, writer: connections.append(writer), "127.0.0.1", 0)
    async with silent:
        configuration.host = f"https://127.0.0.1:{silent.sockets[0].getsockname()[1]}"
        async with Kube(configuration, request_timeout=0.2) as kube:
            with pytest.raises(UnavailableError, match=r"no answer from the API server within 0\.2 s"):
                await kube.get(NAMESPACES, "", "default")
        for connection in connections:
            connection.close()


async def test_equal_events_are_counted_in_one(kube: Kube, namespace: str) -> None:
    made = await kube.apply(adapter(namespace, "events"))
    regarding = {"apiVersion": made["apiVersion"], "kind": "LoRAAdapter", **made["metadata"]}
    await kube.event(made, type="Warning", reason="Unauthorized", message="no")
    await kube.event(regarding, type="Warning", reason="Unauthorized", message="no")
    await kube.event(made, type="Normal", reason="Ready", message="m" * 5000)
    items, _ = await kube.list(EVENTS, namespace=namespace)
    ours = {item["reason"]: item for item in items if item["involvedObject"]["uid"] == made["metadata"]["uid"]}
    assert len(ours) == 2
    assert (ours["Unauthorized"]["count"], ours["Unauthorized"]["type"]) == (2, "Warning")
    assert (ours["Ready"]["count"], len(ours["Ready"]["message"])) == (1, 1024)


async def test_an_event_that_can_not_be_written_is_only_logged(
    kube: Kube, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    lost = {**adapter(namespace, "lost"), "metadata": {"name": "lost", "namespace": "no-such-namespace", "uid": "u"}}
    with caplog.at_level(logging.INFO):
        await kube.event(lost, type="Normal", reason="Ready", message="m")
    assert "could not be written" in caplog.text


async def test_the_log_of_an_absent_pod_is_not_found(kube: Kube, namespace: str) -> None:
    with pytest.raises(NotFoundError, match=r"read log of Pod test-[0-9]+/absent"):
        await kube.pod_log(namespace, "absent", container="fetch", tail_lines=5)


async def test_in_a_pod_the_address_is_the_environments_and_the_token_the_service_accounts(
    control_plane: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.write_text(control_plane.tokens["admin"])
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(control_plane.port))
    monkeypatch.setattr(kube_module, "SERVICE_ACCOUNT_TOKEN", token)
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(control_plane.pki.ca))
    configuration = await load_configuration()
    assert configuration.host == f"https://127.0.0.1:{control_plane.port}"
    async with Kube(configuration) as kube:
        assert (await kube.get(NAMESPACES, "", "default"))["metadata"]["name"] == "default"


async def test_no_way_to_the_api_server_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(KubeError, match="no way to the Kubernetes API"):
        await load_configuration(str(tmp_path / "absent"))


async def test_a_watch_session_is_authenticated_and_tells_of_lists(kube: Kube, namespace: str) -> None:
    listed: list[str] = []
    path = CONFIG_MAPS.path()
    server, session = await kube.watch_session(listed.append, collections=[path], metadata_only=[path])
    for name in ("one", "two"):
        await kube.apply(config_map(namespace, name, {"a": "b"}))
    async with session:
        async with session.get(f"{server}{path}?limit=1") as response:
            answer = await response.json()
            assert int(answer["metadata"]["resourceVersion"]) > 0
            assert (answer["items"], answer["metadata"].get("continue")) == ([], None), "kopf is to watch, not to list"
        async with session.get(f"{server}{path}?watch=true&timeoutSeconds=1") as response:
            [line, *_] = [json.loads(line) async for line in response.content.iter_chunked(10)]
            assert line["object"]["kind"] == "PartialObjectMetadata"
        listed.clear()
        for query in ("limit=1", "watch=true&timeoutSeconds=1", "limit=1&continue=nonsense"):
            async with session.get(f"{server}{CONFIG_MAPS.path()}?{query}") as response:
                await response.read()
                assert response.status == (400 if "nonsense" in query else 200)
    assert listed == [CONFIG_MAPS.path()]
