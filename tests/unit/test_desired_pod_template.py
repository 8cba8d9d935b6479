"""A user's podTemplate over the operator's own: it adds what a cluster needs, and can't take out what is relied on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_operator.desired.deployment import build_deployment
from lora_operator.desired.pod_template import merge_pod_template
from lora_operator.errors import ReasonError
from lora_operator.names import engine_labels
from tests.unit.builders import make_cache, make_deployment

OURS: dict[str, Any] = {
    "metadata": {"labels": {"ours": "1"}, "annotations": {"note": "ours"}},
    "spec": {
        "enableServiceLinks": False,
        "containers": [
            {
                "name": "vllm",
                "image": "vllm:1",
                "env": [{"name": "HOME", "value": "/var/lib/vllm"}],
                "volumeMounts": [
                    {"name": "home", "mountPath": "/var/lib/vllm"},
                    {"name": "engine-kit", "mountPath": "/opt/lora-operator", "readOnly": True},
                ],
                "livenessProbe": {"periodSeconds": 10},
            }
        ],
        "volumes": [{"name": "home", "emptyDir": {}}, {"name": "engine-kit", "configMap": {"name": "kit"}}],
        "tolerations": [{"key": "a"}],
    },
}


def merged(theirs: dict[str, Any]) -> dict[str, Any]:
    before = copy.deepcopy(OURS)
    result = merge_pod_template(OURS, theirs, where="VLLMDeployment serving/llama")
    assert before == OURS, "what was given is not changed"
    return result


def engine(**fields: Any) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": "vllm", **fields}]}}


def test_nothing_changes_nothing() -> None:
    assert merged({}) == OURS
    assert merged({"metadata": {}, "spec": {}}) == OURS
    assert merged({"spec": {"containers": [{"name": "vllm"}]}}) == OURS


def test_containers_env_volumes_and_mounts_merge_by_name() -> None:
    result = merged(
        {
            "spec": {
                "containers": [
                    {
                        "name": "vllm",
                        "env": [{"name": "X", "value": "1"}],
                        "volumeMounts": [{"name": "venv", "mountPath": "/venv"}],
                    },
                    {"name": "proxy", "image": "proxy:1"},
                ],
                "volumes": [{"name": "venv", "persistentVolumeClaim": {"claimName": "venv"}}],
            }
        }
    )["spec"]
    vllm, proxy = result["containers"]
    assert proxy == {"name": "proxy", "image": "proxy:1"}
    assert vllm["image"] == "vllm:1"
    assert [e["name"] for e in vllm["env"]] == ["HOME", "X"]
    assert [m["mountPath"] for m in vllm["volumeMounts"]] == ["/var/lib/vllm", "/opt/lora-operator", "/venv"]
    assert [v["name"] for v in result["volumes"]] == ["home", "engine-kit", "venv"]


def test_fields_of_one_of_ours_can_be_set() -> None:
    result = merged({"spec": {"volumes": [{"name": "home", "emptyDir": {"sizeLimit": "8Gi"}}]}})
    assert result["spec"]["volumes"][0] == {"name": "home", "emptyDir": {"sizeLimit": "8Gi"}}


def test_tolerations_append_and_do_not_double() -> None:
    result = merged({"spec": {"tolerations": [{"key": "b"}, {"key": "a"}]}})
    assert result["spec"]["tolerations"] == [{"key": "a"}, {"key": "b"}]


def test_all_else_replaces() -> None:
    result = merged({"spec": {"nodeSelector": {"gpu": "1"}, "priorityClassName": "high", "enableServiceLinks": True}})
    assert (result["spec"]["nodeSelector"], result["spec"]["priorityClassName"]) == ({"gpu": "1"}, "high")
    assert result["spec"]["enableServiceLinks"] is True


def test_a_field_of_ours_goes_by_null() -> None:
    (container,) = merged(engine(livenessProbe=None))["spec"]["containers"]
    assert container["livenessProbe"] is None


def test_labels_and_annotations_are_added_and_ours_stay() -> None:
    result = merged({"metadata": {"labels": {"ours": "2", "theirs": "3"}, "annotations": {"x": "y"}}})
    assert result["metadata"] == {"labels": {"ours": "1", "theirs": "3"}, "annotations": {"note": "ours", "x": "y"}}


EMPTY: dict[str, dict[str, Any]] = {
    "metadata": {"metadata": None},
    "spec": {"spec": None},
    "labels": {"metadata": {"labels": None}},
    "containers": {"spec": {"containers": None}},
    "env": engine(env=None),
    "mounts": engine(volumeMounts=None),
    "volumes": {"spec": {"volumes": None}},
    "tolerations": {"spec": {"tolerations": None}},
}


@pytest.mark.parametrize("case", EMPTY)
def test_a_heading_with_nothing_below_it_takes_nothing_away(case: str) -> None:
    """`env:` and no more is null in YAML."""
    assert merged(EMPTY[case]) == OURS


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a whole pod": (
        {"apiVersion": "v1", "kind": "Pod", "spec": {}},
        "podTemplate has apiVersion, kind: it takes metadata and spec, as a Deployment's template",
    ),
    "the engine's command": (
        engine(command=["sh"]),
        "podTemplate sets command of container vllm: use spec.engine.command",
    ),
    "the engine's args": (engine(args=[]), "podTemplate sets args of container vllm: use spec.engine.args"),
    "the engine's image": (engine(image="x"), "podTemplate sets image of container vllm: use spec.engine.image"),
    "the plugin's environment": (
        engine(env=[{"name": "LORA_OPERATOR_MODULES", "value": "/x"}]),
        "podTemplate sets LORA_OPERATOR_MODULES of container vllm: the operator does; use spec.engine.env for yours",
    ),
    "vLLM's dev mode": (
        engine(env=[{"name": "VLLM_SERVER_DEV_MODE", "value": "1"}]),
        "podTemplate sets VLLM_SERVER_DEV_MODE of container vllm: the engine's gate or adapters would be out of the plugin's hands; "
        "leave it out",
    ),
    "another resolver": (
        engine(env=[{"name": "VLLM_LORA_RESOLVER_CACHE_DIR", "value": "/x"}]),
        "podTemplate sets VLLM_LORA_RESOLVER_CACHE_DIR of container vllm: the engine's gate or adapters would be out of the plugin's "
        "hands; leave it out",
    ),
    "a middleware outside of the plugin": (
        engine(env=[{"name": "CUSTOM_FASTAPI_MIDDLEWARE_THROTTLE", "value": "x.py:f"}]),
        "podTemplate sets CUSTOM_FASTAPI_MIDDLEWARE_THROTTLE of container vllm: the engine's gate or adapters would be out of the "
        "plugin's hands; leave it out",
    ),
    "whether the Hub is asked": (
        engine(env=[{"name": "HF_HUB_OFFLINE", "value": "0"}]),
        "podTemplate sets HF_HUB_OFFLINE of container vllm: the operator does; use spec.engine.env for yours",
    ),
    "another plugin by its volume": (
        {"spec": {"volumes": [{"name": "engine-kit", "configMap": {"name": "mine"}}]}},
        "podTemplate sets volume engine-kit, which is the operator's own: use another name",
    ),
    "another plugin by its place": (
        engine(volumeMounts=[{"name": "mine", "mountPath": "/opt/lora-operator/"}]),
        "podTemplate mounts /opt/lora-operator/ of container vllm, which is the operator's own place: use another",
    ),
    "a file over the plugin's": (
        engine(volumeMounts=[{"name": "mine", "mountPath": "/opt/lora-operator/lora_operator_plugin/plugin.py"}]),
        "podTemplate mounts /opt/lora-operator/lora_operator_plugin/plugin.py of container vllm, which is the operator's own place: "
        "use another",
    ),
    "an entry without a name": (
        {"spec": {"containers": [{"image": "x"}]}},
        "podTemplate has an entry without name: {'image': 'x'}",
    ),
    "a name that is none": (
        {"spec": {"containers": [{"name": {"a": 1}}]}},
        "podTemplate has an entry without name: {'name': {'a': 1}}",
    ),
    "a list entry that is none": ({"spec": {"volumes": ["x"]}}, "podTemplate has an entry without name: x"),
    "metadata that is none": ({"metadata": "x"}, "podTemplate.metadata is no object"),
    "a spec that is none": ({"spec": []}, "podTemplate.spec is no object"),
    "labels that are none": ({"metadata": {"labels": ["x"]}}, "podTemplate.metadata.labels is no object"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_merged_is_refused_in_words(case: str) -> None:
    theirs, message = REFUSED[case]
    with pytest.raises(ReasonError) as raised:
        merged(theirs)
    assert (raised.value.reason, raised.value.message) == (
        "PodTemplateInvalid",
        f"VLLMDeployment serving/llama: {message}",
    )


def test_a_sidecar_may_have_what_the_engine_may_not() -> None:
    sidecar = {
        "name": "proxy",
        "image": "p",
        "command": ["p"],
        "env": [{"name": "PYTHONPATH", "value": "/x"}],
        "volumeMounts": [{"name": "home", "mountPath": "/opt/lora-operator"}],
    }
    assert merged({"spec": {"containers": [sidecar]}})["spec"]["containers"][1] == sidecar


names = st.sampled_from(
    [
        "metadata",
        "spec",
        "labels",
        "containers",
        "env",
        "volumes",
        "volumeMounts",
        "name",
        "mountPath",
        "ports",
        "resources",
    ]
)
leaves = st.none() | st.integers(0, 2) | st.sampled_from(["vllm", "home", "x", "/x"])
anything = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4), max_leaves=12
)


@given(st.dictionaries(names, anything, max_size=3))
def test_no_template_whatever_ends_a_reconcile(theirs: dict[str, Any]) -> None:
    """It is merged, for the API server to judge, or refused in words."""
    deployment = make_deployment(podTemplate=theirs, engine={"resources": {"limits": theirs}})
    try:
        result = build_deployment(
            deployment,
            make_cache(),
            model_path="/model-cache/x",
            replicas=1,
            token_secret="g",
            plugin="k",
            plugin_files=("plugin.py",),
        )
    except ReasonError as error:
        refused, labels = error.reason == "PodTemplateInvalid", {}
    else:
        refused, labels = False, result["spec"]["template"]["metadata"]["labels"]
    assert refused or engine_labels("llama").items() <= labels.items()
