"""How long from `kubectl apply` until the adapter answers: content in the cache, and content to be downloaded. Needs `make demo`.

Answering is a completion with status 200 under the adapter's name, asked for every 10 ms from the moment kubectl returns.
Prints minimum, median and maximum in milliseconds, and the operator's resident memory.

    python -m e2e.bench.apply_to_answer [--runs 10]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import urllib.request

from e2e.cluster import find_cluster
from e2e.demo import FLEET, HUB_PORT, SERVING, TEAM
from e2e.engine_client import request
from e2e.stack import OPERATOR_NAMESPACE, RELEASE, Stack, eventually, lora_adapter


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m e2e.bench.apply_to_answer", description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    runs = parser.parse_args().runs
    cluster = find_cluster()
    stack = Stack(cluster, f"http://{cluster.node_ip}:{HUB_PORT}")
    (url,) = stack.engine_urls(SERVING, FLEET).values()
    head = f"{stack.hub_url}/api/models/tiny/one"
    with urllib.request.urlopen(head, timeout=10) as answer:
        commit = json.loads(answer.read())["sha"]
    stack.apply(lora_adapter("bench-keep", TEAM, repo="tiny/one", revision=commit, deployment=(SERVING, FLEET)))
    stack.wait_condition("lora", "bench-keep", TEAM)
    cached, applied = [], []
    for run in range(runs):
        name = f"bench-{run}"
        manifest = lora_adapter(name, TEAM, repo="tiny/one", revision=commit, deployment=(SERVING, FLEET))
        took = measure(stack, url, name, manifest)
        cached.append(took[1])
        applied.append(took[0])
        stack.delete("lora", name, TEAM)
    show("kubectl apply itself", applied)
    show("apply to answering, cached", cached)
    first = []
    for run in range(min(runs, 5)):
        # Another allow pattern is another want: its own Job, whose files the cache already has; the Hub's throttle plays no part.
        name = f"bench-job-{run}"
        manifest = lora_adapter(name, TEAM, repo="tiny/two", deployment=(SERVING, FLEET))
        manifest["spec"]["source"]["huggingFace"]["ignorePatterns"] = [f"never-{time.time_ns()}"]
        first.append(measure(stack, url, name, manifest)[1])
        stack.delete("lora", name, TEAM)
    show("apply to answering, by a download Job (bytes cached)", first)
    stack.delete("lora", "bench-keep", TEAM)
    (pod,) = stack.operator_pods()
    status = cluster.kubectl("exec", pod["metadata"]["name"], "-n", OPERATOR_NAMESPACE, "--", "cat", "/proc/1/status")
    print(f"{RELEASE}: " + next(line for line in status.splitlines() if line.startswith("VmRSS")))
    return 0


def measure(stack: Stack, url: str, name: str, manifest: dict[str, object]) -> tuple[float, float]:
    """Milliseconds that kubectl took, and from its start until the adapter answered."""
    began = time.monotonic()
    stack.apply(manifest)
    applied = time.monotonic()
    body = {"model": name, "prompt": "x", "max_tokens": 1}
    eventually(lambda: request("POST", f"{url}/v1/completions", body)[0] == 200, what=name, timeout=120, interval=0.01)
    return (applied - began) * 1000, (time.monotonic() - began) * 1000


def show(what: str, values: list[float]) -> None:
    """One line."""
    low, middle, high = min(values), statistics.median(values), max(values)
    print(f"{what}: {low:.0f} / {middle:.0f} / {high:.0f} ms (min / median / max of {len(values)})", flush=True)


if __name__ == "__main__":
    sys.exit(main())
