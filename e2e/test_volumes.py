"""Claims of ModelCaches: made and kept, bound where engines can run, on one node, not writable, two side by side; a killed download.

No engine runs here: the fleets have no replicas, or nodes that don't exist.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster import paths
from e2e.fixtures.fake_nodes import TOLERATION, ZONE, fake_node, fake_nodes
from e2e.fixtures.hub import HubServer
from e2e.stack import CACHE_GROUP, OWNED, RESTRICTED, Json, Stack, eventually, lora_adapter, namespace, vllm_deployment

pytestmark = pytest.mark.node

NAMESPACE = "volumes"
BASE, ADAPTER = "volumes/base", "volumes/one"
POOL = "lora-operator.test/pool"
MakeVolume = Callable[..., Path]


@pytest.fixture(scope="module", autouse=True)
def space(stack: Stack, hub: HubServer, tiny: Path) -> Iterator[None]:
    """A namespace, and repositories of its own, so that what is asked of them can be counted."""
    for repo, content in ((BASE, tiny / "base"), (ADAPTER, tiny / "adapters" / "one")):
        hub.create_repo(repo)
        hub.commit(repo, content)
    stack.apply(namespace(NAMESPACE, RESTRICTED))
    yield
    stack.cluster.kubectl("delete", "vllm,lora,mart,mcache", "--all", "-n", NAMESPACE)
    stack.cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false")


@pytest.fixture(scope="module")
def make_volume(stack: Stack) -> MakeVolume:
    """Makes a folder, a volume over it, and a class that has only this volume and waits for the first consumer."""

    def make(name: str, *, group: int = CACHE_GROUP, mode: int = 0o2775, modes: tuple[str, ...] = ()) -> Path:
        folder = paths.cache_root() / "cluster" / "volumes" / f"{NAMESPACE}-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        os.chown(folder, 0, group)
        folder.chmod(mode)
        stack.apply(storage_class(name), persistent_volume(name, folder, modes=modes))
        return folder

    return make


def storage_class(name: str) -> Json:
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": f"{NAMESPACE}-{name}", "labels": {OWNED: "true"}},
        "provisioner": "kubernetes.io/no-provisioner",
        "volumeBindingMode": "WaitForFirstConsumer",
    }


def persistent_volume(
    name: str, folder: Path, *, modes: tuple[str, ...] = (), zone: str = "", of_class: str = ""
) -> Json:
    spec: Json = {
        "capacity": {"storage": "1Gi"},
        "accessModes": list(modes or ("ReadWriteMany",)),
        "storageClassName": f"{NAMESPACE}-{of_class or name}",
        "persistentVolumeReclaimPolicy": "Retain",
        "hostPath": {"path": str(folder), "type": "Directory"},
    }
    if zone:
        term = {"matchExpressions": [{"key": ZONE, "operator": "In", "values": [zone]}]}
        spec["nodeAffinity"] = {"required": {"nodeSelectorTerms": [term]}}
    metadata = {"name": f"{NAMESPACE}-{name}", "labels": {OWNED: "true"}}
    return {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": metadata, "spec": spec}


def cache(
    name: str, hub: HubServer, *, of_class: str = "", modes: tuple[str, ...] = ("ReadWriteMany",), **storage: Any
) -> Json:
    template = {
        "accessModes": list(modes),
        "resources": {"requests": {"storage": "1Gi"}},
        "storageClassName": f"{NAMESPACE}-{of_class or name}",
    }
    return {
        "apiVersion": "lora-operator.dev/v1alpha1",
        "kind": "ModelCache",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "storage": {"volumeClaimTemplate": {"spec": template}, **storage},
            "huggingFace": {"endpoint": hub.url},
            "securityContext": {"supplementalGroups": [CACHE_GROUP]},
        },
    }


def fleet_of(
    name: str, cache_name: str | None, *, replicas: int = 0, template: Json | None = None, **more: Any
) -> Json:
    """A VLLMDeployment over a cache; with `template` it is for nodes that don't exist, so nothing is mounted from this one."""
    deployment = vllm_deployment(name, NAMESPACE, repo=BASE, replicas=replicas)
    if cache_name is not None:
        deployment["spec"]["cacheRef"] = {"name": cache_name}
    if template is not None:
        security = deployment["spec"]["podTemplate"]["spec"]["securityContext"]
        deployment["spec"]["podTemplate"] = {"spec": {"securityContext": security, **template}}
    deployment["spec"]["engine"] |= more
    return deployment


def artifact(name: str, cache_name: str) -> Json:
    """A ModelArtifact as somebody makes it by hand, to warm a cache."""
    return {
        "apiVersion": "lora-operator.dev/v1alpha1",
        "kind": "ModelArtifact",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"cacheRef": {"name": cache_name}, "type": "BaseModel", "source": {"huggingFace": {"repo": BASE}}},
    }


def files_below(folder: Path) -> dict[str, int]:
    """Path → modification time of every file and link, directories aside."""
    return {
        str(path.relative_to(folder)): path.lstat().st_mtime_ns
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or not path.is_dir()
    }


def views(folder: Path) -> list[str]:
    """What engines could be given."""
    return sorted(p.name for p in folder.glob("artifacts/*") if not p.name.startswith("."))


def identities(stack: Stack, cache_name: str) -> dict[str, tuple[str, int]]:
    """UID and attempt of every artifact of a cache."""
    return {
        item["metadata"]["name"]: (item["metadata"]["uid"], item["status"]["attempt"])
        for item in stack.items("mart", NAMESPACE)
        if item["spec"]["cacheRef"]["name"] == cache_name
    }


def test_a_claim_outlives_its_cache_and_a_new_one_finds_all_in_it(
    stack: Stack, hub: HubServer, make_volume: MakeVolume
) -> None:
    folder = make_volume("kept")
    manifest = cache("kept", hub)
    stack.apply(manifest)
    waiting = stack.wait_condition("mcache", "kept", NAMESPACE, status="False", reason="ClaimPending", timeout=20)
    assert "waits for the first consumer" in waiting["status"]["conditions"][0]["message"]
    assert "nothing is wrong" in waiting["status"]["conditions"][0]["message"]
    adapter = lora_adapter("kept", NAMESPACE, repo=ADAPTER, deployment=(NAMESPACE, "kept"))
    stack.apply(fleet_of("kept", "kept"), adapter)
    stack.wait_condition("vllm", "kept", NAMESPACE, type_="ModelReady", timeout=90)
    stack.wait_condition("lora", "kept", NAMESPACE, type_="Downloaded", timeout=60)
    bound = stack.wait_condition("mcache", "kept", NAMESPACE, timeout=20)
    assert bound["status"]["claimName"] == "kept"
    assert stack.condition("mcache", "kept", NAMESPACE, "SingleNode")["status"] == "False"
    claim = stack.get("pvc", "kept", NAMESPACE) or {}
    assert claim["status"]["phase"] == "Bound"
    assert "ownerReferences" not in claim["metadata"]
    before, made, asked = files_below(folder), identities(stack, "kept"), (hub.requests(BASE), hub.requests(ADAPTER))
    workload = (stack.get("deployment", "kept", NAMESPACE) or {})["metadata"]
    assert len(made) == 2
    assert len(views(folder)) == 2

    stack.delete("mcache", "kept", NAMESPACE)
    gone = stack.wait_condition(
        "vllm", "kept", NAMESPACE, type_="ModelReady", status="False", reason="CacheNotReady", timeout=20
    )
    assert "ModelCache volumes/kept" in json.dumps(gone["status"]["conditions"])
    stack.wait_condition(
        "lora", "kept", NAMESPACE, type_="Downloaded", status="False", reason="CacheNotReady", timeout=20
    )
    assert (stack.get("pvc", "kept", NAMESPACE) or {})["metadata"]["uid"] == claim["metadata"]["uid"]
    assert files_below(folder) == before

    stack.apply(manifest)
    stack.wait_condition("vllm", "kept", NAMESPACE, type_="ModelReady", timeout=20)
    stack.wait_condition("lora", "kept", NAMESPACE, type_="Downloaded", timeout=20)
    stack.wait_condition("mcache", "kept", NAMESPACE, timeout=20)
    assert identities(stack, "kept") == made
    assert (hub.requests(BASE), hub.requests(ADAPTER)) == asked, "something was asked of the Hub again"
    assert files_below(folder) == before
    again = (stack.get("deployment", "kept", NAMESPACE) or {})["metadata"]
    assert (again["uid"], again["generation"]) == (workload["uid"], workload["generation"])


def test_two_caches_hold_the_same_source_apart(stack: Stack, hub: HubServer, make_volume: MakeVolume) -> None:
    folders = {name: make_volume(name) for name in ("first", "second")}
    for name in folders:
        stack.apply(cache(name, hub), fleet_of(name, name))
    for name in folders:
        stack.wait_condition("vllm", name, NAMESPACE, type_="ModelReady", timeout=90)
    made = {}
    for name, folder in folders.items():
        [own] = identities(stack, name)
        path = (stack.get("mart", own, NAMESPACE) or {})["status"]["path"]
        assert views(folder) == [Path(path).name]
        assert (folder / path / "model.safetensors").resolve().is_relative_to(folder)
        made[name] = own
    assert made["first"] != made["second"]

    stack.apply(fleet_of("nowhere", None))
    stack.cluster.kubectl(
        *("annotate", "mcache", "first", "second", "-n", NAMESPACE, "lora-operator.dev/is-default-cache=true")
    )
    found = eventually(
        lambda: (
            (c := stack.condition("vllm", "nowhere", NAMESPACE))
            and "has 2 annotated" in c["message"]
            and c["reason"] == "CacheNotReady"
            and c
        ),
        what="two defaults are refused",
        timeout=20,
        describe=lambda: json.dumps(stack.get("vllm", "nowhere", NAMESPACE), indent=1),
    )
    assert "annotate exactly one" in found["message"]
    stack.cluster.kubectl(
        *("annotate", "mcache", "second", "-n", NAMESPACE, "lora-operator.dev/is-default-cache-"),
    )
    chosen = stack.wait_condition("vllm", "nowhere", NAMESPACE, type_="ModelReady", timeout=20)
    assert chosen["status"]["modelArtifact"] == made["first"]
    for name in (*folders, "nowhere"):
        stack.delete("vllm", name, NAMESPACE)


def test_whose_a_claim_is_follows_the_policy(stack: Stack, hub: HubServer) -> None:
    def owners() -> list[str]:
        claim = stack.get("pvc", "dropped", NAMESPACE) or {"metadata": {}}
        return [owner["name"] for owner in claim["metadata"].get("ownerReferences", [])]

    def set_policy(policy: str) -> None:
        patch = json.dumps({"spec": {"storage": {"reclaimPolicy": policy}}})
        stack.cluster.kubectl("patch", "mcache", "dropped", "-n", NAMESPACE, "--type=merge", "-p", patch)

    stack.apply(cache("dropped", hub, reclaimPolicy="Delete"))
    why = stack.wait_condition("mcache", "dropped", NAMESPACE, status="False", reason="ClaimPending", timeout=20)
    assert "StorageClass volumes-dropped does not exist" in why["status"]["conditions"][0]["message"]
    assert owners() == ["dropped"]
    set_policy("Retain")
    eventually(lambda: not owners(), what="the claim is kept", timeout=20)
    set_policy("Delete")
    eventually(lambda: owners() == ["dropped"], what="the claim goes with its cache", timeout=20)
    stack.delete("mcache", "dropped", NAMESPACE)
    eventually(lambda: stack.get("pvc", "dropped", NAMESPACE) is None, what="the claim is deleted", timeout=60)


def test_a_claim_that_can_not_be_made_says_why(stack: Stack, hub: HubServer) -> None:
    foreign = cache("foreign", hub)
    template = foreign["spec"]["storage"]["volumeClaimTemplate"]["spec"]
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "spec": template}
    stack.apply(claim | {"metadata": {"name": "foreign", "namespace": NAMESPACE}}, foreign)
    taken = stack.wait_condition("mcache", "foreign", NAMESPACE, status="False", reason="NameTaken", timeout=20)
    assert "existingClaim" in taken["status"]["conditions"][0]["message"]
    assert "claimUid" not in taken["status"]
    assert "labels" not in (stack.get("pvc", "foreign", NAMESPACE) or {})["metadata"]
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "none", "namespace": NAMESPACE},
        "spec": {"hard": {"volumes-foreign.storageclass.storage.k8s.io/persistentvolumeclaims": "0"}},
    }
    stack.apply(quota)
    stack.delete("pvc", "foreign", NAMESPACE)
    eventually(
        lambda: (stack.get("resourcequota", "none", NAMESPACE) or {}).get("status"), what="the quota counts", timeout=20
    )
    stack.cluster.kubectl("annotate", "mcache", "foreign", "-n", NAMESPACE, "look=again")
    refused = stack.wait_condition("mcache", "foreign", NAMESPACE, status="False", reason="ClaimRefused", timeout=30)
    assert "exceeded quota" in refused["status"]["conditions"][0]["message"]
    stack.delete("resourcequota", "none", NAMESPACE)
    stack.wait_condition("mcache", "foreign", NAMESPACE, status="False", reason="ClaimPending", timeout=30)
    stack.delete("mcache", "foreign", NAMESPACE)


def test_a_volume_of_root_is_not_writable_until_somebody_repairs_it(
    stack: Stack, hub: HubServer, make_volume: MakeVolume
) -> None:
    folder = make_volume("rooted", group=0, mode=0o755)
    stack.apply(cache("rooted", hub), artifact("rooted", "rooted"))
    stack.wait_condition("mart", "rooted", NAMESPACE, status="False", reason="CacheNotWritable", timeout=60)
    told = stack.wait_condition("mcache", "rooted", NAMESPACE, status="False", reason="CacheNotWritable", timeout=20)
    conditions = {c["type"]: c for c in told["status"]["conditions"]}
    assert conditions["Stalled"]["status"] == "True"
    assert "securityContext" in conditions["Ready"]["message"]

    os.chown(folder, 0, CACHE_GROUP)
    folder.chmod(0o2775)
    stack.wait_condition("mart", "rooted", NAMESPACE, timeout=60)
    stack.wait_condition("mcache", "rooted", NAMESPACE, timeout=20)


def test_a_download_that_is_killed_shows_nothing_and_goes_on_where_it_was(
    stack: Stack, hub: HubServer, make_volume: MakeVolume, tiny: Path
) -> None:
    folder = make_volume("killed")
    repo, weights = "volumes/killed", "model.safetensors"
    hub.create_repo(repo)
    source = {path.name: path.read_bytes() for path in (tiny / "base").iterdir()}
    hub.commit(repo, source)
    size = len(source[weights])
    hub.throttle(size / 12, repo)
    wanted = artifact("killed", "killed")
    wanted["spec"]["source"]["huggingFace"]["repo"] = repo
    stack.apply(cache("killed", hub), wanted)

    def on_disk() -> int:
        return sum(path.stat().st_size for path in folder.rglob("*.incomplete"))

    eventually(lambda: on_disk() > size / 3, what="a third is on the volume", timeout=60)
    [pod] = stack.items("pods", NAMESPACE, "lora-operator.dev/modelartifact=killed")
    container = pod["status"]["containerStatuses"][0]["containerID"].removeprefix("containerd://")
    stack.cluster.ctr("tasks", "kill", "--signal", "SIGKILL", container)
    failed = stack.wait_condition("mart", "killed", NAMESPACE, status="False", reason="JobFailed", timeout=30)
    assert "code 137" in failed["status"]["conditions"][0]["message"]
    assert views(folder) == []
    had = on_disk()
    assert had > size / 3
    hub.throttle(None, repo)
    sent = hub.sent_bytes(repo)[weights]

    ready = stack.wait_condition("mart", "killed", NAMESPACE, timeout=60)
    assert ready["status"]["attempt"] == 2
    [view] = views(folder)
    assert (folder / "artifacts" / view / weights).read_bytes() == source[weights]
    assert hub.sent_bytes(repo)[weights] - sent == size - had, "the second attempt asked for what it had"
    assert 206 in {status for method, path, status in hub.requests(repo) if method == "GET" and path.endswith(weights)}


# Nodes that don't exist


def job_pod(stack: Stack, artifact_name: str) -> Json:
    """The pod of an artifact's Job, once it has a node."""

    def look() -> Json | None:
        found = stack.items("pods", NAMESPACE, f"lora-operator.dev/modelartifact={artifact_name}")
        return next((pod for pod in found if pod["spec"].get("nodeName")), None)

    return eventually(
        look,
        what=f"the Job's pod of {artifact_name} has a node",
        timeout=30,
        describe=lambda: stack.cluster.kubectl("describe", "pods", "-n", NAMESPACE),
    )


def succeed(stack: Stack, pod: Json, artifact_name: str) -> None:
    """Play the kubelet: the Job's pod has ended, with the result of a download that went well."""
    result = {
        "ok": True,
        "resolvedRevision": "0" * 40,
        "digest": f"sha256:{'0' * 64}",
        "sizeBytes": 1,
        "files": 1,
        "path": f"artifacts/{artifact_name}-00000000",
    }
    ended = {"exitCode": 0, "reason": "Completed", "message": json.dumps(result)}
    container = {"name": "fetch", "image": "x", "imageID": "", "ready": False, "restartCount": 0}
    status = {"phase": "Succeeded", "containerStatuses": [container | {"state": {"terminated": ended}}]}
    stack.cluster.kubectl(
        *("patch", "pod", pod["metadata"]["name"], "-n", NAMESPACE, "--subresource=status", "--type=merge"),
        *("-p", json.dumps({"status": status})),
    )


def plain_pod(name: str, spec: Json) -> Json:
    """A pod that nothing but the scheduler looks at."""
    container = {
        "name": "x",
        "image": "x",
        "resources": {"requests": {"cpu": "2"}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    security = {"runAsNonRoot": True, "runAsUser": 1, "seccompProfile": {"type": "RuntimeDefault"}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"containers": [container], "securityContext": security, **spec},
    }


def node_of(stack: Stack, pod: str) -> str:
    """The node of a pod, once it has one."""
    found: str = eventually(
        lambda: (stack.get("pod", pod, NAMESPACE) or {})["spec"].get("nodeName"),
        what=f"pod {pod} has a node",
        timeout=30,
        describe=lambda: stack.cluster.kubectl("describe", "pod", pod, "-n", NAMESPACE),
    )
    return found


@pytest.fixture(scope="module")
def nodes(stack: Stack, space: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two zones, a being the roomier one, and two nodes of a pool beside them."""
    made = [
        fake_node("fake-a", zone="a", cpu=64, pool="zonal"),
        fake_node("fake-b", zone="b", cpu=16, pool="zonal"),
        fake_node("fake-1", zone="c", cpu=32, pool="single"),
        fake_node("fake-2", zone="c", cpu=32, pool="single"),
    ]
    with fake_nodes(stack, tmp_path_factory.mktemp("kwok"), made):
        yield
        stack.cluster.kubectl("delete", "vllm,lora,pod", "--all", "-n", NAMESPACE, "--wait=false")
        stack.cluster.kubectl("delete", "deployment,job", "--all", "-n", NAMESPACE)
        stack.forget_pods(NAMESPACE, [node["metadata"]["name"] for node in made])


def test_a_volume_is_bound_where_engines_can_run(stack: Stack, hub: HubServer, nodes: None) -> None:
    stack.apply(storage_class("zonal"))
    for name, zone in (("zonal-a1", "a"), ("zonal-a2", "a"), ("zonal-b", "b")):
        stack.apply(persistent_volume(name, Path("/nowhere"), zone=zone, of_class="zonal"))
    # Without constraints of its own, what may go to either zone goes to the roomier one, and a volume with it.
    claim = cache("free", hub, of_class="zonal")["spec"]["storage"]["volumeClaimTemplate"]["spec"]
    volume = {"name": "x", "persistentVolumeClaim": {"claimName": "free"}}
    stack.apply(
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "free", "namespace": NAMESPACE},
            "spec": claim,
        },
        plain_pod("free", {"tolerations": [TOLERATION], "volumes": [volume]}),
    )
    assert node_of(stack, "free") == "fake-a"

    template = {"nodeSelector": {ZONE: "b"}, "tolerations": [TOLERATION]}
    stack.apply(cache("zonal", hub), fleet_of("zonal", "zonal", template=template))
    stack.apply(lora_adapter("zonal", NAMESPACE, repo=ADAPTER, deployment=(NAMESPACE, "zonal")))
    base = eventually(lambda: _wanted(stack, "vllm", "zonal"), what="the base model is wanted", timeout=20)
    pod = job_pod(stack, base)
    assert pod["spec"]["nodeName"] == "fake-b"
    assert pod["spec"]["nodeSelector"] == {ZONE: "b"}
    stack.wait_condition("mcache", "zonal", NAMESPACE, timeout=20)
    assert (stack.get("pvc", "zonal", NAMESPACE) or {})["spec"]["volumeName"] == f"{NAMESPACE}-zonal-b"

    # Now the volume says where it can be used: a further download has to get there, and asks for nothing more.
    succeed(stack, pod, base)
    stack.wait_condition("vllm", "zonal", NAMESPACE, type_="ModelReady", timeout=20)
    one = eventually(lambda: _wanted(stack, "lora", "zonal"), what="the adapter is wanted", timeout=20)
    pod = job_pod(stack, one)
    assert pod["spec"]["nodeName"] == "fake-b"
    assert "nodeSelector" not in pod["spec"]


def _wanted(stack: Stack, kind: str, name: str) -> str | None:
    status = (stack.get(kind, name, NAMESPACE) or {}).get("status", {})
    found: str | None = status.get("modelArtifact") if kind == "vllm" else (status.get("artifactRef") or {}).get("name")
    return found


def test_pods_of_a_claim_for_one_node_are_kept_on_one(stack: Stack, hub: HubServer, nodes: None) -> None:
    once = ("ReadWriteOnce",)
    stack.apply(storage_class("single"), persistent_volume("single", Path("/nowhere"), modes=once))
    template = {"nodeSelector": {POOL: "single"}, "tolerations": [TOLERATION]}
    engine = {"resources": {"requests": {"cpu": "12"}}}
    stack.apply(
        cache("single", hub, modes=once),
        fleet_of("single", "single", replicas=1, template=template, **engine),
    )
    base = eventually(lambda: _wanted(stack, "vllm", "single"), what="the base model is wanted", timeout=20)
    pod = job_pod(stack, base)
    told = _single_node(stack, f"node {pod['spec']['nodeName']} (1 pod); 0 pods waiting")
    assert told["reason"] == "ReadWriteOnce"
    succeed(stack, pod, base)
    stack.wait_condition("vllm", "single", NAMESPACE, type_="ModelReady", timeout=20)
    [engine_pod] = eventually(lambda: stack.pods(NAMESPACE, "single"), what="the engine's pod", timeout=20)
    node = node_of(stack, engine_pod["metadata"]["name"])
    # The engine has taken 12 of its node's 32 cores: what is free to choose goes to the other node. A Job is not.
    stack.apply(plain_pod("elsewhere", template))
    assert node_of(stack, "elsewhere") != node
    stack.apply(lora_adapter("single", NAMESPACE, repo=ADAPTER, deployment=(NAMESPACE, "single")))
    one = eventually(lambda: _wanted(stack, "lora", "single"), what="the adapter is wanted", timeout=20)
    assert job_pod(stack, one)["spec"]["nodeName"] == node
    _single_node(stack, f"node {node} (2 pods); 0 pods waiting")

    stack.cluster.kubectl("cordon", node)
    stack.cluster.kubectl("scale", "vllm/single", "-n", NAMESPACE, "--replicas=2")
    _single_node(stack, f"node {node} (2 pods); 1 pod waiting")
    stack.cluster.kubectl("uncordon", node)
    _single_node(stack, f"node {node} (3 pods); 0 pods waiting")


def _single_node(stack: Stack, words: str) -> Json:
    def look() -> Json | None:
        found = stack.condition("mcache", "single", NAMESPACE, "SingleNode")
        return found if found.get("status") == "True" and words in found["message"] else None

    return eventually(
        look,
        what=f"SingleNode says: {words}",
        timeout=30,
        describe=lambda: json.dumps(stack.condition("mcache", "single", NAMESPACE, "SingleNode")),
    )
