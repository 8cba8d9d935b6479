"""The claim that a ModelCache makes, by which everybody then finds it, and who owns it."""

from __future__ import annotations

from typing import Any

from lora_operator.desired.claim import build_claim, wanted_owners
from tests.unit.builders import make_cache

TEMPLATE: dict[str, Any] = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "10Gi"}}}
MINE = {
    "apiVersion": "lora-operator.dev/v1alpha1",
    "kind": "ModelCache",
    "name": "default",
    "uid": "uid-cache",
    "controller": True,
    "blockOwnerDeletion": False,
}
OTHER = {"apiVersion": "v1", "kind": "ConfigMap", "name": "x", "uid": "uid-x"}


def test_a_kept_claim_has_no_owner() -> None:
    assert build_claim(make_cache(template=TEMPLATE)) == {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {
            "name": "default",
            "namespace": "serving",
            "labels": {"app.kubernetes.io/managed-by": "lora-operator", "lora-operator.dev/modelcache": "default"},
            "annotations": {},
            "ownerReferences": [],
        },
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "10Gi"}}},
    }


def test_one_that_goes_with_its_cache_is_owned_by_it() -> None:
    claim = build_claim(make_cache(template=TEMPLATE, reclaim="Delete"))
    assert claim["metadata"]["ownerReferences"] == [MINE]


def test_no_class_and_the_empty_class_are_not_the_same() -> None:
    assert "storageClassName" not in build_claim(make_cache(template=TEMPLATE))["spec"]
    for name in ("", "nfs"):
        assert (
            build_claim(make_cache(template=TEMPLATE | {"storageClassName": name}))["spec"]["storageClassName"] == name
        )


def test_the_policy_decides_on_our_reference_and_leaves_others() -> None:
    keep, drop = make_cache(template=TEMPLATE), make_cache(template=TEMPLATE, reclaim="Delete")
    for before in ([], [MINE]):
        assert wanted_owners(keep, [OTHER, *before]) == [OTHER]
        assert wanted_owners(drop, [OTHER, *before]) == [OTHER, MINE]


def test_content_is_the_claims_where_the_claim_was_made() -> None:
    assert make_cache(uid="uid-1").content_identity == "uid-1"
    assert make_cache(template=TEMPLATE, uid="uid-1").content_identity == "uid-claim"
    assert make_cache(template=TEMPLATE, status={}).content_identity is None
    old = {"claimName": "models", "claimUid": "uid-old", "accessModes": ["ReadWriteMany"]}
    assert make_cache(template=TEMPLATE, status=old).content_identity is None


def test_nothing_is_known_of_a_claim_that_was_not_looked_at() -> None:
    seen = {"claimName": "models", "accessModes": ["ReadWriteOnce"]}
    assert make_cache(status=seen).access_modes == ("ReadWriteOnce",)
    assert make_cache(claim="other", status=seen).access_modes is None
    assert not make_cache(claim="other", status=seen).single_node
