"""`make demo`: a real Kubernetes, the operator by Helm, a tiny Llama on real vLLM, and two adapters from `kubectl apply` to answering.

`python -m e2e.demo` brings it up and leaves it running; `python -m e2e.demo down` ends all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from e2e.cluster import Cluster, ToolingError, ensure_cluster, find_cluster, paths, tools
from e2e.cluster.steps import say, step
from e2e.engine_client import request, token_ids
from e2e.stack import SERVED_NAMES, Stack, eventually, lora_adapter, namespace, tiny_fixtures, vllm_deployment

SERVING, TEAM = "demo-serving", "demo-team"
FLEET = "llama"
HUB_PORT, CDN_PORT = 18080, 18081
ADAPTERS = {"sql": "one", "chat": "two"}


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m e2e.demo", description=__doc__)
    parser.add_argument("action", nargs="?", choices=["up", "down"], default="up")
    action = parser.parse_args(argv).action
    try:
        if action == "down":
            down()
        else:
            up()
    except (ToolingError, AssertionError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


def up() -> None:
    """Bring everything up, show it, and say what to try."""
    began = time.monotonic()
    cluster = ensure_cluster()
    ready = time.monotonic() - began
    tools.engine_venv()
    tiny = tiny_fixtures()
    stack = Stack(cluster, f"http://{cluster.node_ip}:{HUB_PORT}")
    start_hub(cluster, tiny)
    cluster.import_image(tools.base_image())
    stack.install_operator()
    if stack.get("namespace", SERVING, "default") is None:
        stack.make_serving_namespace(SERVING)
    stack.apply(namespace(TEAM))
    show(cluster, "kubectl get nodes")
    applied = time.monotonic()
    stack.apply(vllm_deployment(FLEET, SERVING, repo="tiny/base"))
    manifests = [
        lora_adapter(name, TEAM, repo=f"tiny/{repo}", deployment=(SERVING, FLEET)) for name, repo in ADAPTERS.items()
    ]
    say("applying this LoRAAdapter, and another like it:")
    print(json.dumps(manifests[0]["spec"], indent=2), flush=True)
    stack.apply(*manifests)
    with step("from kubectl apply to answering: download the model, start vLLM, load the adapters"):
        follow(stack)
    say(f"all Ready {time.monotonic() - applied:.0f} s after kubectl apply")
    show(cluster, f"kubectl get vllm,mcache,mart -n {SERVING}")
    show(cluster, f"kubectl get lora -n {TEAM}")
    show(cluster, f"kubectl describe lora sql -n {TEAM}")
    (url,) = stack.engine_urls(SERVING, FLEET).values()
    ask(url)
    say(f"cluster ready after {ready:.0f} s, demo complete after {time.monotonic() - began:.0f} s")
    print(next_steps(cluster, url), flush=True)


def follow(stack: Stack) -> None:
    """Wait for the adapters, and print what kubectl shows whenever it changes."""
    last = ""

    def look() -> bool:
        nonlocal last
        shown = stack.cluster.kubectl(
            "get", "vllm", FLEET, "-n", SERVING, "--no-headers",
            "-o", "custom-columns=R:.status.readyPods,C:.status.conditions[?(@.type=='Ready')].message",
        )  # fmt: skip
        if shown != last and "<none>" not in shown:
            last = shown
            say(f"vllm/{FLEET}: {shown.strip()}")
        states = [stack.condition("lora", name, TEAM).get("status") for name in ADAPTERS]
        return all(state == "True" for state in states)

    eventually(
        look, what="both adapters are Ready", timeout=420, interval=1,
        describe=lambda: stack.cluster.kubectl("get", "vllm,lora,mart,pods", "-A"),
    )  # fmt: skip


def ask(url: str) -> None:
    """Ask the base model and each adapter the same, and print their listing."""
    say(f"GET {url}/v1/models")
    for model in request("GET", f"{url}/v1/models")[1]["data"]:
        print(f"  {model['id']:<12} parent={model['parent']!s:<10} root={model['root']}")
    for name in (SERVED_NAMES[0], *ADAPTERS):
        say(f"{name}: token ids {token_ids(url, name, 'Once upon a time', tokens=8)}")


def show(cluster: Cluster, command: str) -> None:
    """Print a kubectl command and its output."""
    print(f"\n$ {command}\n{cluster.kubectl(*shlex.split(command)[1:])}", flush=True)


def next_steps(cluster: Cluster, url: str) -> str:
    """What a reader may try now."""
    kubectl = tools.kubectl()
    return f"""
The cluster stays up. Try:
  export KUBECONFIG={cluster.kubeconfig} PATH={kubectl.parent}:$PATH
  kubectl get vllm,lora,mart,mcache -A
  curl {url}/v1/completions -H 'Content-Type: application/json' -d '{{"model": "sql", "prompt": "Once", "max_tokens": 8}}'
  kubectl delete lora sql -n {TEAM}; curl {url}/v1/models
  make demo-down
"""


def start_hub(cluster: Cluster, tiny: Path) -> None:
    """A Hub for the demo in a process of its own, which goes on after this one."""
    stop_hub()
    content = paths.cache_dir("demo-hub")
    shutil.rmtree(content)
    for name, folder in {
        "base": tiny / "base",
        **{repo: tiny / "adapters" / repo for repo in ADAPTERS.values()},
    }.items():
        shutil.copytree(folder, content / "tiny" / name)
    log = (cluster.logs / "demo-hub.log").open("w")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "e2e.fixtures.hub", "--host", cluster.node_ip, "--port", str(HUB_PORT)),
            *("--cdn-port", str(CDN_PORT), "--load", content, "--throttle", "400000"),
        ],
        cwd=paths.REPO,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    _pid_file().write_text(str(process.pid))
    hub = f"http://{cluster.node_ip}:{HUB_PORT}/api/models/tiny/base"
    eventually(
        lambda: request("GET", hub, timeout=2)[0] == 200,
        what="the demo's Hub answers",
        timeout=30,
        describe=lambda: Path(log.name).read_text(),
    )


def stop_hub() -> None:
    """End the Hub of an earlier demo, if it is still that process."""
    try:
        pid = int(_pid_file().read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return
    if b"e2e.fixtures.hub" in command:
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: not _alive(pid), what="the demo's Hub ends", timeout=15)
    _pid_file().unlink()


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def _pid_file() -> Path:
    return paths.cache_root() / "demo-hub.pid"


def down() -> None:
    """End the demo's Hub and the cluster."""
    stop_hub()
    find_cluster().stop()


if __name__ == "__main__":
    sys.exit(main())
