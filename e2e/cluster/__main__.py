"""`python -m e2e.cluster start|stop|status|env`: the test cluster by hand."""

from __future__ import annotations

import argparse
import shlex
import sys

from e2e.cluster.cluster import ensure_cluster, find_cluster
from e2e.cluster.steps import ToolingError
from e2e.cluster.teardown import COMPONENTS


def main() -> int:
    """Run one command; exit status 1 with a message when it fails, and for `status` when the cluster is not usable."""
    parser = argparse.ArgumentParser(prog="python -m e2e.cluster", description=__doc__)
    parser.add_argument("command", choices=["start", "stop", "status", "env"])
    command = parser.parse_args().command
    cluster = find_cluster()
    try:
        if command == "start":
            ensure_cluster()
        elif command == "stop":
            cluster.stop()
        elif command == "env":
            for name, value in cluster.env.items():
                print(f"export {name}={shlex.quote(value)}")
        else:
            return _status()
    except ToolingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _status() -> int:
    cluster = find_cluster()
    if not cluster.dir.exists():
        print("no cluster")
        return 1
    for name in COMPONENTS:
        pid = cluster.daemon(name).pid
        print(f"{name:24} {f'pid {pid}' if pid else 'not running':12} {cluster.daemon(name).log}")
    fault = cluster.fault()
    print(f"unusable: {fault}" if fault else f"node Ready, KUBECONFIG={cluster.kubeconfig}")
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main())
