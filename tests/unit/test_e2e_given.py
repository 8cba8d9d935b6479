"""What the environment may say of a cluster that is given to the end-to-end tests, and what is said when it does not suffice."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2e.cluster import ToolingError
from e2e.given import VARIABLES, GivenCluster, NodeAccessError, read_given

ROOT = Path(__file__).resolve().parents[2]
ENOUGH = {
    "IMAGE": "registry.example:5000/lora-operator:1",
    "KUBECONFIG": "/kube/config",
    "E2E_HOST": "192.0.2.1",
    "E2E_ENGINE_IMAGE": "registry.example/vllm-cpu:1",
    "E2E_STORAGE_CLASS": "shared",
}


def test_a_kubeconfig_alone_gives_no_cluster() -> None:
    assert read_given({name: value for name, value in ENOUGH.items() if name != "IMAGE"}) is None


def test_what_suffices() -> None:
    found = read_given(ENOUGH)
    assert found is not None
    assert (found.engine_command, found.access_mode, found.direct) == (("vllm", "serve"), "ReadWriteMany", False)
    assert (found.storage_class, found.node_folder, found.engine_venv) == ("shared", None, None)


def test_what_can_be_said_more() -> None:
    more = {
        "E2E_STORAGE_CLASS": "",
        "E2E_NODE_FOLDER": "/srv/e2e",
        "E2E_ENGINE_COMMAND": "python3 -m 'vllm.entrypoints.openai.api_server'",
        "E2E_ENGINE_VENV": "/opt/venv",
        "E2E_PODS": "direct",
    }
    found = read_given(ENOUGH | more)
    assert found is not None
    assert found.engine_command == ("python3", "-m", "vllm.entrypoints.openai.api_server")
    assert (found.node_folder, found.engine_venv, found.direct) == (Path("/srv/e2e"), Path("/opt/venv"), True)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"KUBECONFIG": ""}, "KUBECONFIG"),
        ({"E2E_HOST": ""}, "E2E_HOST"),
        ({"E2E_ENGINE_IMAGE": ""}, "E2E_ENGINE_IMAGE"),
        ({"E2E_STORAGE_CLASS": ""}, "E2E_NODE_FOLDER"),
        ({"E2E_NODE_FOLDER": "/srv"}, "either E2E_STORAGE_CLASS or E2E_NODE_FOLDER"),
        ({"IMAGE": "registry.example:5000/lora-operator"}, "needs a tag"),
        ({"E2E_PODS": "ingress"}, "forward or direct"),
    ],
)
def test_what_does_not_suffice_says_what_is_missing(wrong: dict[str, str], word: str) -> None:
    with pytest.raises(ToolingError, match=word):
        read_given(ENOUGH | wrong)


def test_a_test_that_needs_the_node_is_told_how_to_say_so(tmp_path: Path) -> None:
    cluster = GivenCluster(tmp_path, "192.0.2.1", kubeconfig_file=tmp_path / "config")
    assert cluster.kubeconfig == tmp_path / "config"
    for look in (lambda: cluster.ctr("tasks", "ls"), lambda: cluster.audit_log):
        with pytest.raises(NodeAccessError, match=r"pytest\.mark\.node"):
            look()


def test_every_variable_is_documented() -> None:
    text = (ROOT / "docs" / "development.md").read_text()
    for name, meaning in VARIABLES.items():
        assert f"| `{name}` | {meaning} |" in text
