"""A real one-node Kubernetes on a bare Debian machine, and the tools it is made of.

`ensure_cluster()` is the way in; `ControlPlane` is etcd + kube-apiserver alone; `tools` makes binaries, venvs and images.
"""

from __future__ import annotations

from e2e.cluster.cluster import Cluster, ensure_cluster, find_cluster
from e2e.cluster.controlplane import ControlPlane
from e2e.cluster.steps import ToolingError

__all__ = ["Cluster", "ControlPlane", "ToolingError", "ensure_cluster", "find_cluster"]
