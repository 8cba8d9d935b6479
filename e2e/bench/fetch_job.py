"""What a download costs on a cluster beside a bare Job with `hf download`: the same bytes, image, volume and security context.

    python -m e2e.bench.fetch_job [--bytes 200000000] [--rounds 5]

Brings up the test cluster and the operator where they are not there. Each round has a model of its own, that nothing has seen: a ModelArtifact
is applied until it is Ready, then a Job until it is Complete, each in a folder that is empty, and each timed by a watch. An artifact that is
Ready is authorised, verified, checked and published too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from e2e.bench.fetch import REPO, make_model
from e2e.cluster import ensure_cluster, paths, tools
from e2e.conftest import start_watch
from e2e.fixtures.hub import HubServer
from e2e.stack import Json, Stack, eventually

NAMESPACE = "bench-fetch"


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m e2e.bench.fetch_job", description=__doc__)
    parser.add_argument("--bytes", type=int, default=200_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    cluster = ensure_cluster()
    with (
        HubServer(host=cluster.node_ip) as hub,
        tempfile.TemporaryDirectory(prefix="bench-fetch-job-", dir=paths.cache_root()) as work,
    ):
        model = make_model(Path(work, *REPO.split("/")), files=1, size=options.bytes) / REPO
        stack = Stack(cluster, hub.url)
        cluster.import_image(tools.base_image())
        stack.sweep()
        stack.install_operator()
        stack.make_serving_namespace(NAMESPACE)
        try:
            took: dict[str, list[float]] = {"artifact": [], "job": []}
            for number in range(options.rounds):
                repo = f"bench/round-{number}"
                hub.create_repo(repo)
                (model / "round.json").write_text(str(number))  # another commit
                hub.commit(repo, model)
                took["artifact"].append(timed(stack, "modelartifacts", artifact(number, repo), "Ready"))
                took["job"].append(timed(stack, "jobs", job(number, repo, hub.url), "Complete"))
        finally:
            stack.sweep()
    medians = {name: statistics.median(seconds) for name, seconds in took.items()}
    print(f"{options.bytes / 1e6:g} MB, {options.rounds} rounds, medians (least to most) in seconds:")
    for name, title in (("artifact", "ModelArtifact until Ready"), ("job", "bare Job with hf download until Complete")):
        print(f"  {title:42} {medians[name]:6.2f} ({min(took[name]):.2f} to {max(took[name]):.2f})")
    print(f"  ratio {medians['artifact'] / medians['job']:.2f}")
    return 0


def timed(stack: Stack, kind: str, manifest: Json, condition: str) -> float:
    """Seconds from kubectl apply's return until a watch tells the condition."""
    name = manifest["metadata"]["name"]
    watch = start_watch(stack, kind, NAMESPACE)

    def told() -> float | None:
        for at, event in list(watch.seen):
            known = event["object"].get("status", {}).get("conditions", [])
            if event["object"]["metadata"]["name"] == name and (condition, "True") in [
                (c["type"], c["status"]) for c in known
            ]:
                return at
        return None

    try:
        stack.apply(manifest)
        applied = time.monotonic()
        return eventually(told, what=f"{kind} {name} is {condition}", timeout=300, interval=0.01) - applied
    finally:
        watch.stop()


def artifact(number: int, repo: str) -> Json:
    """A ModelArtifact by hand, as one warms a cache."""
    return {
        "apiVersion": "lora-operator.dev/v1alpha1",
        "kind": "ModelArtifact",
        "metadata": {"name": f"round-{number}", "namespace": NAMESPACE},
        "spec": {"cacheRef": {"name": "default"}, "type": "BaseModel", "source": {"huggingFace": {"repo": repo}}},
    }


def job(number: int, repo: str, endpoint: str) -> Json:
    """What people write by hand: hf download into the volume."""
    env = {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_CACHE": f"/cache/by-hand/{number}",
        "HF_HOME": "/tmp",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",  # it would wait ten seconds for an answer from outside
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    container: Json = {
        "name": "download",
        "image": tools.operator_image().name,
        "imagePullPolicy": "IfNotPresent",
        "command": ["hf", "download", repo],
        "env": [{"name": name, "value": value} for name, value in env.items()],
        "volumeMounts": [{"name": "cache", "mountPath": "/cache"}, {"name": "tmp", "mountPath": "/tmp"}],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
    }
    pod: Json = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "supplementalGroups": [5000],
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {"name": "cache", "persistentVolumeClaim": {"claimName": "cache"}},
            {"name": "tmp", "emptyDir": {}},
        ],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": f"by-hand-{number}", "namespace": NAMESPACE},
        "spec": {"backoffLimit": 0, "template": {"spec": pod}},
    }


if __name__ == "__main__":
    sys.exit(main())
