"""Every value: has an effect, is described, is refused when it can't be meant, and is in the chart's README."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from lora_operator.gen.chart import build_readme, leaves
from tests.chart.conftest import CHART, Helm

DIGEST = "sha256:" + "0a" * 32
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())

# value → something else than its default, and a word that the rendering has then and did not have before
EFFECTS: dict[str, tuple[Any, str]] = {
    "image.repository": ("mirror.example/op", "mirror.example/op:"),
    "image.tag": ("9.9.9", "operator:9.9.9"),
    "image.digest": (DIGEST, f"operator@{DIGEST}"),
    "image.pullPolicy": ("Always", "imagePullPolicy: Always"),
    "imagePullSecrets": ([{"name": "pull-it"}], "name: pull-it"),
    "nameOverride": ("adapters", "app.kubernetes.io/name: adapters"),
    "fullnameOverride": ("adapters", "name: adapters-secret-reader"),
    "serviceAccount.name": ("account", "serviceAccountName: account"),
    "serviceAccount.annotations": ({"example.com/role": "x"}, "example.com/role: x"),
    "rbac.aggregateToUserRoles": (False, ""),
    "secretNamespaces": (["team-a"], "namespace: team-a"),
    "log.level": ("debug", "DEBUG"),
    "log.format": ("plain", '"plain"'),
    "job.deadlineSeconds": (7777, '"7777"'),
    "job.resources": ({"limits": {"memory": "7Gi"}}, "7Gi"),
    "resources": ({"limits": {"memory": "6543Mi"}}, "6543Mi"),
    "extraEnv": ([{"name": "HTTPS_PROXY", "value": "http://proxy.example"}], "http://proxy.example"),
    "podAnnotations": ({"example.com/scrape": "no"}, "example.com/scrape"),
    "nodeSelector": ({"pool": "system"}, "pool: system"),
    "tolerations": ([{"key": "dedicated", "operator": "Exists"}], "dedicated"),
    "affinity": ({"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}}, "podAntiAffinity"),
    "priorityClassName": ("system-cluster-critical", "system-cluster-critical"),
}

REFUSED: list[tuple[str, str, Any]] = [
    ("an unknown value", "secretNamespace", ["team-a"]),
    ("an unknown value inside a group", "image.repo", "x"),
    ("a digest inside the repository", "image.repository", f"images.example/operator@{DIGEST}"),
    ("a tag with a space", "image.tag", "1 2"),
    ("a number for a tag", "image.tag", 1.1),
    ("a digest that is none", "image.digest", "sha256:abc"),
    ("a pull policy of another case", "image.pullPolicy", "always"),
    ("no pull policy", "image.pullPolicy", None),
    ("pull secrets as words", "imagePullSecrets", ["pull-it"]),
    ("a name that can't be one", "nameOverride", "Lora_Operator"),
    ("a full name that can't be one", "fullnameOverride", "-x"),
    ("an account that can't be one", "serviceAccount.name", "Account"),
    ("an annotation that is no text", "serviceAccount.annotations", {"a": 1}),
    ("yes for true", "rbac.aggregateToUserRoles", "yes"),
    ("a namespace that can't be one", "secretNamespaces", ["Team_A"]),
    ("a namespace twice", "secretNamespaces", ["team-a", "team-a"]),
    ("an unknown log level", "log.level", "loud"),
    ("an unknown log format", "log.format", "xml"),
    ("no log level", "log.level", None),
    ("a deadline in words", "job.deadlineSeconds", "6h"),
    ("a deadline of a second", "job.deadlineSeconds", 1),
    ("a quantity that is none", "job.resources", {"limits": {"memory": "two"}}),
    ("resources of a third sort", "resources", {"claims": []}),
    ("a variable without a name", "extraEnv", [{"value": "x"}]),
    ("a misspelt field of a variable", "extraEnv", [{"name": "A", "val": "x"}]),
    ("an annotation of the pod that is no text", "podAnnotations", {"a": True}),
    ("a label that is no text", "nodeSelector", {"a": 1}),
    ("an unknown effect of a taint", "tolerations", [{"key": "a", "effect": "Never"}]),
    ("an unknown affinity", "affinity", {"antiAffinity": {}}),
    ("a priority by number", "priorityClassName", 5),
]


def described(schema: Any, path: str) -> Iterator[str]:
    """Paths of properties that have no description."""
    for name, part in schema.get("properties", {}).items():
        if not part.get("description", "").endswith("."):
            yield f"{path}.{name}"
        yield from described(part, f"{path}.{name}")
        yield from described(part.get("items", {}), f"{path}.{name}[]")


def test_schema_values_and_effects_name_the_same_values() -> None:
    assert {key for key, _, _ in leaves(SCHEMA, VALUES)} == set(EFFECTS)


def test_every_value_is_described() -> None:
    assert list(described(SCHEMA, "")) == []
    assert list(described({"properties": SCHEMA["definitions"]["resources"]["properties"]}, "resources")) == []


def test_every_object_of_the_schema_says_what_may_be_in_it() -> None:
    def open_objects(schema: Any, path: str) -> Iterator[str]:
        if isinstance(schema, dict):
            if isinstance(schema.get("properties"), dict) and schema.get("additionalProperties") is not False:
                yield path
            for key, part in schema.items():
                yield from open_objects(part, f"{path}/{key}")

    assert list(open_objects(SCHEMA, "")) == []


@pytest.mark.parametrize("key", list(EFFECTS))
def test_a_value_has_an_effect(helm: Helm, key: str) -> None:
    value, word = EFFECTS[key]
    base = {"image.repository": "images.example/operator"}
    before, after = helm.template(base), helm.template(base | {key: value})
    assert after.returncode == 0, after.stderr
    assert after.stdout != before.stdout
    assert word in after.stdout
    assert not word or word not in before.stdout


@pytest.mark.parametrize(("sentence", "key", "value"), REFUSED, ids=[sentence for sentence, _, _ in REFUSED])
def test_it_refuses(helm: Helm, sentence: str, key: str, value: object) -> None:
    done = helm.template({"image.repository": "images.example/operator", key: value})
    assert done.returncode != 0, sentence
    assert "values don't meet the specifications of the schema" in done.stderr
    assert key.rsplit(".", 1)[-1] in done.stderr


def test_lint_refuses_what_the_schema_does(helm: Helm) -> None:
    done = helm.run("lint", "--strict", str(CHART), "--set", "log.level=loud")
    assert done.returncode != 0
    assert "log" in done.stdout + done.stderr


def test_the_readme_has_the_table_of_values() -> None:
    readme = (CHART / "README.md").read_text()
    assert build_readme(readme, SCHEMA, VALUES) == readme
    for key in EFFECTS:
        assert f"| `{key}` |" in readme


def test_a_value_without_a_schema_is_an_error() -> None:
    with pytest.raises(KeyError, match=r"does not know log\.colour"):
        list(leaves(SCHEMA, VALUES | {"log": VALUES["log"] | {"colour": "red"}}))
