"""What the operator costs when nothing happens: its requests to the API server and to engines. Needs a cluster with the operator.

The API server's audit log has every request of the operator's service account. Requests to engines are counted by vLLM's own
metrics of /v1/models; the plugin's state is asked for as often.

    python -m e2e.bench.idle [--seconds 120]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter

from e2e.cluster import find_cluster
from e2e.engine_client import request
from e2e.stack import OPERATOR_NAMESPACE, RELEASE, Stack

USER = f"system:serviceaccount:{OPERATOR_NAMESPACE}:{RELEASE}"
WRITES = {"create", "update", "patch", "delete", "deletecollection"}
_MODELS = re.compile(r'^http_requests_total\{.*handler="/v1/models".*\} ([0-9.e+]+)$', re.MULTILINE)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m e2e.bench.idle", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    seconds = parser.parse_args().seconds
    cluster = find_cluster()
    stack = Stack(cluster, "")
    fleets = [(o["metadata"]["namespace"], o["metadata"]["name"]) for o in everywhere(stack, "vllm")]
    urls = [url for place in fleets for url in stack.engine_urls(*place).values()]
    adapters = len(everywhere(stack, "lora"))
    with cluster.audit_log.open() as log:
        log.seek(0, 2)
        before = sum(asked(url) for url in urls)
        time.sleep(seconds)  # what is measured is that nothing happens
        engines = 2 * (sum(asked(url) for url in urls) - before)
        calls = Counter(calls_of(log.read()))
    print(f"{len(fleets)} fleets, {len(urls)} pods, {adapters} adapters; over {seconds:.0f} s:")
    writes = sum(count for (verb, _), count in calls.items() if verb in WRITES)
    reads = sum(count for (verb, _), count in calls.items() if verb not in WRITES)
    print(f"  API server: {writes} writes ({writes / seconds:.3f}/s), {reads} reads ({reads / seconds:.3f}/s)")
    for (verb, resource), count in sorted(calls.items()):
        print(f"    {count:5} {verb} {resource}")
    print(f"  engines: {engines:.0f} requests ({engines / seconds:.3f}/s)")
    return 0


def everywhere(stack: Stack, kind: str) -> list[dict[str, dict[str, str]]]:
    """All objects of a kind."""
    items: list[dict[str, dict[str, str]]] = json.loads(stack.cluster.kubectl("get", kind, "-A", "-o", "json"))["items"]
    return items


def asked(url: str) -> float:
    """How often the engine was asked for /v1/models."""
    return sum(float(value) for value in _MODELS.findall(str(request("GET", f"{url}/metrics")[1])))


def calls_of(text: str) -> list[tuple[str, str]]:
    """(verb, resource) of every completed request of the operator."""
    found = []
    for line in text.splitlines():
        if not line.endswith("}") or USER not in line:
            continue
        event = json.loads(line)
        if event["stage"] == "ResponseComplete" and event["user"]["username"] == USER:
            resource = event.get("objectRef", {})
            parts = (resource.get("resource", event["requestURI"]), resource.get("subresource"))
            found.append((event["verb"], "/".join(part for part in parts if part)))
    return found


if __name__ == "__main__":
    sys.exit(main())
