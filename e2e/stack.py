"""The product on the test cluster: the operator by its chart, volumes, a serving namespace, manifests, and looking at all of it.

Shared by `make demo` and the end-to-end tests. Nothing here knows the operator's code: it uses kubectl, Helm and HTTP as a user does.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from e2e.cluster import Cluster, paths, tools
from e2e.cluster.steps import step
from e2e.given import Forwards, Given, NodeAccessError, claim, given, make_node_folder

OPERATOR_NAMESPACE = "lora-system"
RELEASE = "lora-operator"
SERVED_NAMES = ("tiny/base", "tiny/alias")
CACHE_GROUP = 5000
OWNED = "lora-operator.test/owned"  # label of what a run makes, so that the next one can clear it
RESTRICTED = {
    "pod-security.kubernetes.io/enforce": "restricted",
    "pod-security.kubernetes.io/enforce-version": "latest",
}
ENGINE_USER = 10001

Json = dict[str, Any]
T = TypeVar("T")


def tiny_fixtures() -> Path:
    """The tiny base model and its adapters, made on the fly by transformers and peft; kept until their recipe changes."""
    recipe = paths.REPO / "e2e" / "fixtures" / "tiny.py"
    out = paths.cache_dir("fixtures") / f"tiny-{paths.content_key(recipe, paths.REPO / 'requirements' / 'engine.txt')}"
    if not (out / ".complete").exists():
        python = tools.engine_venv() / "bin" / "python"
        with step("making the tiny model and its adapters"):
            shutil.rmtree(out, ignore_errors=True)
            subprocess.run(
                [python, "-m", "e2e.fixtures.tiny", "make", "--out", out],
                cwd=paths.REPO,
                check=True,
                capture_output=True,
                timeout=600,
            )
            (out / ".complete").touch()
    return out


@dataclass
class Stack:
    """A cluster with the operator on it."""

    cluster: Cluster
    hub_url: str

    @cached_property
    def _forwards(self) -> Forwards:
        return Forwards(self.cluster)

    # Seeing and changing objects, as a user does

    def apply(self, *manifests: Json) -> str:
        """kubectl apply."""
        return self.cluster.kubectl(
            "apply", "-f", "-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests})
        )

    def replace(self, manifest: Json) -> str:
        """kubectl replace --force: delete, and create once it is gone."""
        return self.cluster.kubectl("replace", "--force", "-f", "-", input=json.dumps(manifest))

    def get(self, kind: str, name: str, namespace: str) -> Json | None:
        """The object, None where it does not exist."""
        text = self.cluster.kubectl("get", kind, name, "-n", namespace, "-o", "json", "--ignore-not-found")
        return json.loads(text) if text.strip() else None

    def items(self, kind: str, namespace: str, selector: str = "") -> list[Json]:
        """The objects of a kind in a namespace."""
        words = ["get", kind, "-n", namespace, "-o", "json", *(["-l", selector] if selector else [])]
        items: list[Json] = json.loads(self.cluster.kubectl(*words))["items"]
        return items

    def delete(self, kind: str, name: str, namespace: str, *, wait: bool = True, timeout: float = 60) -> None:
        """kubectl delete."""
        self.cluster.kubectl("delete", kind, name, "-n", namespace, f"--wait={str(wait).lower()}", timeout=timeout)

    def condition(self, kind: str, name: str, namespace: str, type_: str = "Ready") -> Json:
        """A condition of an object, {} where there is none."""
        obj = self.get(kind, name, namespace) or {}
        conditions = obj.get("status", {}).get("conditions", [])
        return next((c for c in conditions if c["type"] == type_), {})

    def wait_condition(
        self,
        kind: str,
        name: str,
        namespace: str,
        *,
        type_: str = "Ready",
        status: str = "True",
        reason: str | None = None,
        timeout: float = 120,
    ) -> Json:
        """Wait until a condition has a status (and reason), for the object's present generation; returns the object."""

        def look() -> Json | None:
            obj = self.get(kind, name, namespace) or {}
            for found in obj.get("status", {}).get("conditions", []):
                if found["type"] == type_ and found["status"] == status and reason in (None, found["reason"]):
                    return obj if found.get("observedGeneration") == obj["metadata"]["generation"] else None
            return None

        def describe() -> str:
            obj = self.get(kind, name, namespace) or {}
            return json.dumps(obj.get("status", {}), indent=1)

        what = f"{kind} {namespace}/{name} {type_}={status} {reason or ''}"
        return eventually(look, what=what, timeout=timeout, describe=describe)

    # Engines

    def pods(self, namespace: str, deployment: str) -> list[Json]:
        """The engine pods of a VLLMDeployment that are not being deleted."""
        found = self.items(
            "pods", namespace, f"lora-operator.dev/vllmdeployment={deployment},app.kubernetes.io/component=engine"
        )
        return [pod for pod in found if not pod["metadata"].get("deletionTimestamp")]

    def engine_urls(self, namespace: str, deployment: str) -> dict[str, str]:
        """Address of every ready engine pod, by pod name."""
        urls = {}
        for pod in self.pods(namespace, deployment):
            ready = any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", []))
            if ready:
                urls[pod["metadata"]["name"]] = self._pod_url(pod)
        return urls

    def _pod_url(self, pod: Json) -> str:
        spec = given()
        if spec is None or spec.direct:
            return f"http://{pod['status']['podIP']}:8000"
        return self._forwards.url(pod["metadata"]["namespace"], pod["metadata"]["name"], 8000)

    def guard_token(self, namespace: str, deployment: str) -> str:
        """The gate's token, read as the cluster's administrator from the Secret that the pods mount."""
        workload = self.get("deployment", deployment, namespace) or {}
        volumes = workload["spec"]["template"]["spec"]["volumes"]
        name = next(volume["secret"]["secretName"] for volume in volumes if volume["name"] == "gate")
        secret = self.get("secret", name, namespace)
        assert secret is not None, f"no Secret {namespace}/{name}"
        return base64.b64decode(secret["data"]["token"]).decode()

    # The operator

    def install_operator(
        self,
        *words: str,
        values: Json | None = None,
        release: str = RELEASE,
        namespace_: str = OPERATOR_NAMESPACE,
        image: tools.Image | None = None,
    ) -> None:
        """helm upgrade --install from the chart, with the image built from the Dockerfile; waits until it is ready."""
        repository, _, tag = self._operator_image(image).rpartition(":")
        kept = namespace(namespace_, RESTRICTED)
        kept["metadata"]["labels"].pop(OWNED)
        self.apply(kept)
        merged = {"image": {"repository": repository, "tag": tag}, **(values or {})}
        chart = paths.REPO / "charts" / "lora-operator"
        with step("installing the operator by Helm"):
            self.cluster.helm(
                *("upgrade", "--install", release, chart, "-n", namespace_, "--wait", "--timeout", "3m", "-f", "-"),
                *words,
                input=json.dumps(merged),
            )

    def _operator_image(self, image: tools.Image | None) -> str:
        spec = given()
        if spec is not None and image is None:
            return spec.image
        image = image or tools.operator_image()
        self.cluster.import_image(image.archive)
        return image.name

    def uninstall_operator(self, *, release: str = RELEASE, namespace_: str = OPERATOR_NAMESPACE) -> None:
        """helm uninstall; waits until what the chart made is gone, the operator's pod too."""
        self.cluster.helm("uninstall", release, "-n", namespace_, "--wait", "--timeout", "2m")
        eventually(
            lambda: not self.items("pods", namespace_, f"app.kubernetes.io/instance={release}"),
            what="the operator's pod is gone",
            timeout=60,
        )

    def scale_operator(self, replicas: int) -> None:
        """Scale the operator and wait until its pods are there, or gone."""
        self.cluster.kubectl("scale", "deployment", RELEASE, "-n", OPERATOR_NAMESPACE, f"--replicas={replicas}")
        if replicas:
            self.cluster.kubectl(
                "rollout", "status", f"deployment/{RELEASE}", "-n", OPERATOR_NAMESPACE, "--timeout=120s"
            )
        else:
            eventually(lambda: not self.operator_pods(), what="the operator's pod is gone", timeout=60)

    def operator_pods(self) -> list[Json]:
        """The operator's pods."""
        return self.items("pods", OPERATOR_NAMESPACE, f"app.kubernetes.io/instance={RELEASE}")

    def sweep(self) -> None:
        """Clear what an earlier run, killed or not, left on the cluster: namespaces with all in them, and volumes."""
        kubectl = self.cluster.kubectl
        if given() is None:
            kubectl("uncordon", "-l", f"!{OWNED}")  # a test that drains it may have been killed
        if not kubectl("get", "namespace,persistentvolume,storageclass,node", "-l", OWNED, "-o", "name").strip():
            return
        with step("clearing what an earlier run left"):
            fake = kubectl("get", "node", "-l", OWNED, "-o", "jsonpath={.items[*].metadata.name}").split()
            # Engines first: a namespace that is deleted with them in it waits for half their grace period, 75 s.
            for name in kubectl("get", "namespace", "-l", OWNED, "-o", "jsonpath={.items[*].metadata.name}").split():
                if "vllmdeployments" in kubectl("get", "crd", "-o", "name"):
                    kubectl("delete", "vllm,lora,mart", "--all", "-n", name, "--wait=false")
                    kubectl("delete", "deployment,job", "--all", "-n", name, "--wait=false")
                    self.forget_pods(name, fake)
                    kubectl("delete", "deployment,job,pod", "--all", "-n", name, "--wait=true", timeout=200)
            for kind in ("namespace", "persistentvolume", "storageclass", "node"):
                kubectl("delete", kind, "-l", OWNED, "--wait=true", timeout=290)

    def forget_pods(self, namespace: str, nodes: list[str]) -> None:
        """Have pods gone that no kubelet will ever end: those on nodes that don't exist."""
        for pod in self.items("pods", namespace) if nodes else ():
            if pod["spec"].get("nodeName") in nodes:
                name = pod["metadata"]["name"]
                self.cluster.kubectl(
                    *("delete", "pod", name, "-n", namespace, "--force", "--grace-period=0", "--ignore-not-found")
                )

    # Namespaces and volumes

    def make_serving_namespace(self, name: str) -> None:
        """A namespace with restricted pod security, an empty cache volume, the engine's venv, and a default ModelCache."""
        spec = given()
        self.apply(namespace(name, RESTRICTED))
        volumes = self._own_volumes(name) if spec is None else self._given_volumes(spec, name)
        self.apply(
            *volumes,
            {
                "apiVersion": "lora-operator.dev/v1alpha1",
                "kind": "ModelCache",
                "metadata": {
                    "name": "default",
                    "namespace": name,
                    "annotations": {"lora-operator.dev/is-default-cache": "true"},
                },
                "spec": {
                    "storage": {"existingClaim": "cache"},
                    "huggingFace": {"endpoint": self.hub_url},
                    "securityContext": {"supplementalGroups": [CACHE_GROUP]},
                },
            },
        )

    def _own_volumes(self, name: str) -> list[Json]:
        folder = self.cache_folder(name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        os.chown(folder, 0, CACHE_GROUP)
        folder.chmod(0o2775)
        return [
            *volume(name, "cache", folder, read_only=False),
            *volume(name, "engine-venv", tools.engine_venv(), read_only=True),
        ]

    def _given_volumes(self, spec: Given, name: str) -> list[Json]:
        if spec.node_folder is None:
            made = [claim("cache", name, spec)]
        else:
            folder = make_node_folder(self.cluster, spec, name, group=CACHE_GROUP)
            made = volume(name, "cache", folder, read_only=False)
        return made + (volume(name, "engine-venv", spec.engine_venv, read_only=True) if spec.engine_venv else [])

    def cache_folder(self, name: str) -> Path:
        """Where the cache volume of a serving namespace lies on the node; only for tests that are marked `node`."""
        if given() is not None:
            raise NodeAccessError("this test reads the node's files: mark it with @pytest.mark.node")
        return paths.cache_root() / "cluster" / "volumes" / name


def namespace(name: str, labels: dict[str, str] | None = None) -> Json:
    """A Namespace that a later run may clear away."""
    metadata = {"name": name, "labels": {OWNED: "true", **(labels or {})}}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}


def service(name: str, namespace_: str) -> Json:
    """A ClusterIP Service of somebody else's, without pods."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace_},
        "spec": {"ports": [{"port": 80}]},
    }


def volume(namespace_: str, name: str, folder: Path, *, read_only: bool) -> list[Json]:
    """A hostPath PersistentVolume and the claim that is bound to it."""
    modes = ["ReadOnlyMany"] if read_only else ["ReadWriteMany"]
    pv = f"{namespace_}-{name}"
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": pv, "labels": {OWNED: "true"}},
            "spec": {
                "capacity": {"storage": "10Gi"},
                "accessModes": modes,
                "storageClassName": "",
                "persistentVolumeReclaimPolicy": "Retain",
                "hostPath": {"path": str(folder), "type": "Directory"},
                "claimRef": {
                    "namespace": namespace_,
                    "name": name,
                    "apiVersion": "v1",
                    "kind": "PersistentVolumeClaim",
                },
            },
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": name, "namespace": namespace_},
            "spec": {
                "accessModes": modes,
                "storageClassName": "",
                "volumeName": pv,
                "resources": {"requests": {"storage": "10Gi"}},
            },
        },
    ]


def vllm_deployment(
    name: str,
    namespace_: str,
    *,
    repo: str,
    replicas: int = 1,
    token_secret: str | None = None,
    policy: Json | None = None,
    lora: Json | None = None,
    served_names: tuple[str, ...] = SERVED_NAMES,
    max_model_len: int = 8192,
) -> Json:
    """A VLLMDeployment of the real engine on CPU: the Debian image with the engine's venv mounted by podTemplate."""
    image, command, venv = engine()
    huggingface: Json = {"repo": repo}
    if token_secret:
        huggingface["tokenSecretRef"] = {"name": token_secret, "key": "token"}
    return {
        "apiVersion": "lora-operator.dev/v1alpha1",
        "kind": "VLLMDeployment",
        "metadata": {"name": name, "namespace": namespace_},
        "spec": {
            "replicas": replicas,
            "model": {
                "source": {"huggingFace": huggingface},
                "servedNames": list(served_names),
                "dtype": "float32",
                "maxModelLen": max_model_len,
            },
            "lora": {"maxLoras": 2, "maxCpuLoras": 16, "maxLoraRank": 16} | (lora or {}),
            "adapterPolicy": {"namespaces": policy or {"from": "All"}},
            "engine": {
                "image": image,
                "command": command,
                "args": ["--enforce-eager", "--max-num-seqs", "8"],
                "env": [
                    {"name": "VLLM_CPU_KVCACHE_SPACE", "value": "1"},
                    {"name": "VLLM_CPU_OMP_THREADS_BIND", "value": "nobind"},
                    {"name": "OMP_NUM_THREADS", "value": "2"},
                ],
            },
            "podTemplate": {
                "spec": {
                    "securityContext": {"runAsNonRoot": True, "runAsUser": ENGINE_USER, "runAsGroup": ENGINE_USER},
                    **(_mounted_venv(venv) if venv else {}),
                }
            },
        },
    }


def engine() -> tuple[str, list[str], Path | None]:
    """Image, command, and the folder of the node to be mounted, of the real engine on CPU."""
    spec = given()
    if spec is not None and spec.engine_venv is None:
        return spec.engine_image, list(spec.engine_command), None
    venv = tools.engine_venv() if spec is None else spec.engine_venv
    image = tools.BASE_IMAGE if spec is None else spec.engine_image
    return image, [f"{venv}/bin/python", "-m", "vllm.entrypoints.openai.api_server"], venv


def _mounted_venv(venv: Path) -> Json:
    mount = {"name": "engine-venv", "mountPath": str(venv), "readOnly": True}
    claimed = {"name": "engine-venv", "persistentVolumeClaim": {"claimName": "engine-venv", "readOnly": True}}
    return {"containers": [{"name": "vllm", "volumeMounts": [mount]}], "volumes": [claimed]}


def lora_adapter(
    name: str,
    namespace_: str,
    *,
    repo: str,
    deployment: tuple[str, str],
    revision: str | None = None,
    token_secret: str | None = None,
    **spec: Any,
) -> Json:
    """A LoRAAdapter; `deployment` is (namespace, name)."""
    huggingface: Json = {"repo": repo}
    if revision:
        huggingface["revision"] = revision
    if token_secret:
        huggingface["tokenSecretRef"] = {"name": token_secret, "key": "token"}
    return {
        "apiVersion": "lora-operator.dev/v1alpha1",
        "kind": "LoRAAdapter",
        "metadata": {"name": name, "namespace": namespace_},
        "spec": {
            "source": {"huggingFace": huggingface},
            "vllmDeploymentRef": {"namespace": deployment[0], "name": deployment[1]},
            **spec,
        },
    }


def token_secret(name: str, namespace_: str, token: str) -> list[Json]:
    """A Secret with a Hub token, and the tenant's own permission for the operator to read just this Secret."""
    return [
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "namespace": namespace_},
            "stringData": {"token": token},
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "Role",
            "metadata": {"name": f"lora-operator-{name}", "namespace": namespace_},
            "rules": [{"apiGroups": [""], "resources": ["secrets"], "resourceNames": [name], "verbs": ["get"]}],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": {"name": f"lora-operator-{name}", "namespace": namespace_},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": f"lora-operator-{name}"},
            "subjects": [{"kind": "ServiceAccount", "name": RELEASE, "namespace": OPERATOR_NAMESPACE}],
        },
    ]


def eventually(
    look: Callable[[], T | None],
    *,
    what: str,
    timeout: float,
    describe: Callable[[], str] | None = None,
    interval: float = 0.2,
) -> T:
    """Wait until `look` returns something true; AssertionError with what was waited for, and what there is instead."""
    deadline = time.monotonic() + timeout
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:.0f} s: {what}\n{describe() if describe else ''}")
        time.sleep(interval)
