"""Why a fleet is down: for every cause, the reason and words that help, on the deployment and on its tenants' adapters, in seconds."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from e2e.conftest import SERVING, TEAM_A, Fleet, Watch, start_watch
from e2e.stack import Json, Stack, eventually, lora_adapter, vllm_deployment

WITHIN = 15.0  # seconds from what Kubernetes shows to what we say
REFUSED_CLASS = "down-refused"
Seen = Callable[[Json], bool]


def container(test: Callable[[Json], Any]) -> Seen:
    """A state of the engine's container."""

    def look(pod: Json) -> bool:
        statuses = pod.get("status", {}).get("containerStatuses", [])
        return any(test(status.get(kind, {})) for status in statuses for kind in ("state", "lastState"))

    return look


def condition(type_: str, status: str) -> Seen:
    return lambda obj: any(
        c["type"] == type_ and c["status"] == status for c in obj.get("status", {}).get("conditions", [])
    )


ENDED = container(lambda state: state.get("terminated", {}).get("exitCode"))
WAITS = container(lambda state: state.get("waiting", {}).get("reason") not in (None, "ContainerCreating"))
REFUSED = condition("ReplicaFailure", "True")


@dataclass(frozen=True)
class Case:
    """One way to be down."""

    change: Callable[[Json], Any]  # of the spec
    reason: str
    words: tuple[str, ...]
    kind: str  # of the object on which Kubernetes shows the cause
    cause: Seen


def template(spec: Json) -> Json:
    found: Json = spec["podTemplate"]["spec"]
    return found


def add_volume(spec: Json, source: Json) -> None:
    template(spec)["volumes"].append({"name": "down", **source})
    template(spec)["containers"][0]["volumeMounts"].append({"name": "down", "mountPath": "/down"})


CASES: dict[str, Case] = {
    "node": Case(
        lambda spec: template(spec).update(nodeSelector={"down": "nowhere"}),
        "Unschedulable",
        ("pod down-node-", "node", "spec.podTemplate"),
        "pods",
        condition("PodScheduled", "False"),
    ),
    "image": Case(
        lambda spec: spec["engine"].update(image="198.18.254.1:1/none/vllm:0"),
        "ImagePull",
        ("pod down-image-", "198.18.254.1:1/none/vllm:0", "imagePullSecrets"),
        "pods",
        WAITS,
    ),
    "flag": Case(
        lambda spec: spec["engine"]["args"].append("--no-such-flag"),
        "CrashLooping",
        ("pod down-flag-", "exited with code 2", "unrecognized arguments: --no-such-flag"),
        "pods",
        ENDED,
    ),
    "memory": Case(
        lambda spec: spec["engine"].update(resources={"limits": {"memory": "100Mi"}}),
        "OutOfMemory",
        ("pod down-memory-", "killed for its memory use", "spec.engine.resources.limits.memory"),
        "pods",
        ENDED,
    ),
    "quota": Case(
        lambda spec: template(spec).update(priorityClassName=REFUSED_CLASS),
        "PodsRefused",
        ("down-quota-", "exceeded quota: down", "raise the quota"),
        "deployments",
        REFUSED,
    ),
    "policy": Case(
        lambda spec: add_volume(spec, {"hostPath": {"path": "/"}}),
        "PodsRefused",
        ("down-policy-", 'violates PodSecurity "restricted', "hostPath", "spec.podTemplate"),
        "deployments",
        REFUSED,
    ),
    "template": Case(
        lambda spec: template(spec)["containers"][0].update(imagePullPolicy="Sometimes"),
        "PodTemplateInvalid",
        ("Deployment serving/down-template", "imagePullPolicy", "Sometimes", "change spec.podTemplate"),
        "vllmdeployments",
        condition("ModelReady", "True"),
    ),
    "mount": Case(
        lambda spec: add_volume(spec, {"configMap": {"name": "down-no-such"}}),
        "PodNotStarted",
        ("pod down-mount-", "FailedMount", 'configmap "down-no-such" not found'),
        "pods",
        condition("PodReadyToStartContainers", "False"),
    ),
    "secret": Case(
        lambda spec: spec["engine"].update(apiKeySecretRef={"name": "down-no-such", "key": "key"}),
        "PodNotStarted",
        ("pod down-secret-", "CreateContainerConfigError", 'secret "down-no-such" not found'),
        "pods",
        WAITS,
    ),
}


def deployment(name: str, *, replicas: int = 1) -> Json:
    manifest = vllm_deployment(f"down-{name}", SERVING, repo="tiny/base", replicas=replicas)
    if name in CASES:
        CASES[name].change(manifest["spec"])
    return manifest


def adapter(name: str) -> Json:
    return lora_adapter(f"down-{name}", TEAM_A, repo="tiny/one", deployment=(SERVING, f"down-{name}"))


def first(watch: Watch, name: str, test: Seen) -> float | None:
    """When a watch first told of an object of a deployment, or of that name, that passes the test."""
    for when, event in list(watch.seen):
        obj = event["object"]
        of = obj["metadata"].get("labels", {}).get("lora-operator.dev/vllmdeployment", obj["metadata"]["name"])
        if of == name and event["type"] != "DELETED" and test(obj):
            return when
    return None


def says(type_: str, reason: str, *words: str) -> Seen:
    def look(obj: Json) -> bool:
        return any(
            c["type"] == type_ and c["reason"] == reason and all(word in c["message"] for word in words)
            for c in obj.get("status", {}).get("conditions", [])
        )

    return look


@dataclass(frozen=True)
class Down:
    """What watches saw while the fleets came to be down, and what kubectl printed in the end."""

    watches: dict[str, Watch]
    get: str

    def wait(self, kind: str, name: str, test: Seen, *, timeout: float) -> float:
        """When the watch of a kind first told of it."""
        watch = self.watches[kind]

        def last() -> str:
            told = [e["object"] for _, e in list(watch.seen) if e["object"]["metadata"]["name"].startswith(name)]
            return json.dumps(told[-1].get("status", {}), indent=1) if told else "never seen"

        return eventually(
            lambda: first(watch, name, test), what=f"{kind} {name} as expected", timeout=timeout, describe=last
        )


def refusing_quota() -> list[Json]:
    """A quota of no pods at all for one priority class, so that it hits nothing else in the namespace."""
    scope = {"operator": "In", "scopeName": "PriorityClass", "values": [REFUSED_CLASS]}
    return [
        {
            "apiVersion": "scheduling.k8s.io/v1",
            "kind": "PriorityClass",
            "metadata": {"name": REFUSED_CLASS},
            "value": 1,
        },
        {
            "apiVersion": "v1",
            "kind": "ResourceQuota",
            "metadata": {"name": "down", "namespace": SERVING},
            "spec": {"hard": {"pods": "0"}, "scopeSelector": {"matchExpressions": [scope]}},
        },
    ]


def clear(stack: Stack, *names: str) -> None:
    """Delete deployments and their adapters, and wait until their pods are gone."""
    for kind, where in (("lora", TEAM_A), ("vllm", SERVING)):
        objects = [f"down-{name}" for name in names]
        stack.cluster.kubectl("delete", kind, *objects, "-n", where, "--ignore-not-found", "--wait=true")
    for name in names:
        selector = f"lora-operator.dev/vllmdeployment=down-{name}"
        stack.cluster.kubectl("delete", "pod", "-n", SERVING, "-l", selector, "--grace-period=1", "--ignore-not-found")


@pytest.fixture(scope="module")
def down(stack: Stack, fleet: Fleet) -> Iterator[Down]:
    """All of them side by side, each with a tenant's adapter, on the base model that the shared fleet has in the cache."""
    kinds = {"pods": SERVING, "deployments": SERVING, "vllmdeployments": SERVING, "loraadapters": TEAM_A}
    stack.apply(*refusing_quota(), deployment("node"), adapter("node"))
    stack.wait_condition("vllm", "down-node", SERVING, type_="ModelReady", timeout=60)
    watches = {kind: start_watch(stack, kind, where) for kind, where in kinds.items()}
    try:
        rest = [name for name in CASES if name != "node"]
        stack.apply(*map(deployment, rest), *map(adapter, rest))
        seen = Down(watches, "")
        for name, case in CASES.items():
            seen.wait("vllmdeployments", f"down-{name}", says("Ready", case.reason), timeout=120)
        for name in CASES:
            seen.wait("loraadapters", f"down-{name}", says("Ready", "NoReadyPods"), timeout=60)
        yield Down(watches, stack.cluster.kubectl("get", "vllm,lora", "-A"))
    finally:
        for watch in watches.values():
            watch.stop()
        clear(stack, *CASES)
        stack.cluster.kubectl("delete", "resourcequota", "down", "-n", SERVING)
        stack.cluster.kubectl("delete", "priorityclass", REFUSED_CLASS)


@pytest.mark.parametrize("name", CASES)
def test_the_deployment_says_why_it_is_down(down: Down, name: str) -> None:
    case, of = CASES[name], f"down-{name}"
    cause = down.wait(case.kind, of, case.cause, timeout=5)
    for type_ in ("Available", "Ready"):
        said = down.wait("vllmdeployments", of, says(type_, case.reason, *case.words), timeout=WITHIN)
        assert said - cause < WITHIN, f"{type_} said it {said - cause:.1f} s after the cause"


@pytest.mark.parametrize("name", CASES)
def test_its_adapters_say_it_too_and_nothing_that_is_not_theirs(stack: Stack, down: Down, name: str) -> None:
    case, of = CASES[name], f"down-{name}"
    short = says("Ready", "NoReadyPods", f"VLLMDeployment {SERVING}/{of}", f": {case.reason}: ")
    cause = max(
        down.wait(case.kind, of, case.cause, timeout=5),
        down.wait("loraadapters", of, condition("Downloaded", "True"), timeout=5),
    )
    said = down.wait("loraadapters", of, short, timeout=WITHIN)
    assert said - cause < WITHIN, f"said {said - cause:.1f} s after the cause"
    told = json.dumps((stack.get("lora", of, TEAM_A) or {})["status"])
    for internal in (f"pod {of}-", "no-such", "exceeded quota", "hostPath", "Sometimes", "198.18.254.1:1"):
        assert internal not in told, "pods, images and log lines of another namespace are not a tenant's"


def test_kubectl_get_tells_it_at_a_glance(down: Down) -> None:
    rows = {line.split()[1]: line.split() for line in down.get.splitlines() if " down-" in f" {line}".replace("/", " ")}
    assert rows
    for name, case in CASES.items():
        assert case.reason in down.get
        assert f"vllmdeployment.lora-operator.dev/down-{name}" in rows
        assert case.reason in rows[f"vllmdeployment.lora-operator.dev/down-{name}"]
        assert "NoReadyPods" in rows[f"loraadapter.lora-operator.dev/down-{name}"]


def test_it_is_over_once_the_cause_is(stack: Stack, down: Down) -> None:
    """The quota's words go when the quota does: the next thing that keeps this pod away is told instead."""
    manifest = deployment("quota")
    template(manifest["spec"]).pop("priorityClassName")
    template(manifest["spec"])["nodeSelector"] = {"down": "nowhere"}
    stack.apply(manifest)
    stack.wait_condition("vllm", "down-quota", SERVING, reason="Unschedulable", status="False", timeout=WITHIN)
    found = stack.get("lora", "down-quota", TEAM_A) or {}
    eventually(
        lambda: says("Ready", "NoReadyPods", ": Unschedulable: ")(stack.get("lora", "down-quota", TEAM_A) or {}),
        what="the adapter follows",
        timeout=WITHIN,
        describe=lambda: json.dumps(found.get("status"), indent=1),
    )


def test_a_download_whose_pods_are_refused_says_so(stack: Stack) -> None:
    stack.make_serving_namespace("down")
    stack.apply(
        {
            "apiVersion": "v1",
            "kind": "ResourceQuota",
            "metadata": {"name": "none", "namespace": "down"},
            "spec": {"hard": {"pods": "0"}},
        },
        {
            "apiVersion": "lora-operator.dev/v1alpha1",
            "kind": "ModelArtifact",
            "metadata": {"name": "refused", "namespace": "down"},
            "spec": {
                "cacheRef": {"name": "default"},
                "type": "BaseModel",
                "source": {"huggingFace": {"repo": "tiny/base"}},
            },
        },
    )
    artifact = stack.wait_condition(
        "mart", "refused", "down", status="False", reason="JobUnschedulable", timeout=WITHIN + 5
    )
    message = next(c["message"] for c in artifact["status"]["conditions"] if c["type"] == "Ready")
    assert "no pod of Job refused-1 can be made" in message
    assert "exceeded quota: none" in message
    stack.delete("namespace", "down", "down", wait=False)


def replicas(stack: Stack, name: str) -> int | None:
    found: int | None = (stack.get("vllm", name, SERVING) or {"spec": {}})["spec"].get("replicas")
    return found


def test_a_number_that_a_scaler_set_stays(stack: Stack, fleet: Fleet) -> None:
    """On pods that no node has, so no engine runs."""
    name = "down-scaled"
    manifest = deployment("scaled")
    del manifest["spec"]["replicas"]
    template(manifest["spec"])["nodeSelector"] = {"down": "nowhere"}
    try:
        stack.apply(manifest)
        eventually(lambda: replicas(stack, name) == 1, what="the operator writes 1", timeout=60)
        stack.cluster.kubectl("scale", f"vllm/{name}", "-n", SERVING, "--replicas=2")
        eventually(lambda: len(stack.pods(SERVING, name)) == 2, what="two pods", timeout=60)

        changed = copy.deepcopy(manifest)
        changed["spec"]["engine"]["args"] += ["--seed", "7"]
        stack.apply(changed)
        eventually(
            lambda: [p for p in stack.pods(SERVING, name) if "--seed" in p["spec"]["containers"][0]["args"]],
            what="pods of the changed spec",
            timeout=60,
        )
        assert replicas(stack, name) == 2
        workload = stack.get("deployment", name, SERVING) or {}
        assert workload["spec"]["replicas"] == 2

        stack.cluster.kubectl("autoscale", f"vllm/{name}", "-n", SERVING, "--min=3", "--max=4", "--cpu-percent=50")
        eventually(
            lambda: replicas(stack, name) == 3 and len(stack.pods(SERVING, name)) >= 3,
            what="an autoscaler raises the number to its minimum",
            timeout=60,
            describe=lambda: stack.cluster.kubectl("describe", "hpa", name, "-n", SERVING),
        )
        stack.apply(manifest)
        stack.wait_condition("vllm", name, SERVING, status="False", reason="Unschedulable", timeout=20)
        assert replicas(stack, name) == 3
    finally:
        stack.cluster.kubectl("delete", "hpa", name, "-n", SERVING, "--ignore-not-found")
        clear(stack, "scaled")
