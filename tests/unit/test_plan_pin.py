"""Pins: content that is there and is not what a source's digest pins is refused, whoever else it is right for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lora_operator.api.sources.source import Source
from lora_operator.constants import Condition
from lora_operator.plan.adapter import plan_adapter
from lora_operator.plan.adapter_list import Keep, ModuleList, Serve, plan_list
from lora_operator.plan.artifact import plan_artifact
from lora_operator.plan.job_view import JobView
from lora_operator.plan.source_policy import refused_by_pin
from lora_operator.plan.wants import build_artifact
from lora_operator.wire.jobs import FetchResult
from tests.unit.builders import (
    COMMIT,
    NOW,
    make_adapter,
    make_artifact,
    make_cache,
    make_decision,
    make_deployment,
    make_module,
    not_ready,
    ready_artifact,
    served_by,
    told,
)
from tests.unit.test_plan_adapter import BASE, artifact_key, seen
from tests.unit.test_plan_artifact import seen as seen_artifact

RIGHT, WRONG = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"
SOURCE: dict[str, Any] = {"huggingFace": {"repo": "org/sql", "revision": "main"}}


def pinned(digest: str | None) -> dict[str, Any]:
    return {"source": SOURCE | ({"digest": digest} if digest else {})}


@pytest.mark.parametrize("digest", [RIGHT, None, ""])
def test_the_message_has_both_digests(digest: str | None) -> None:
    source = Source.model_validate(pinned(WRONG)["source"])
    refused = refused_by_pin(source, digest)
    assert refused is not None
    assert refused.reason == "DigestMismatch"
    assert WRONG in refused.message
    assert str(digest) in refused.message
    assert refused_by_pin(source, WRONG) is None
    assert refused_by_pin(Source.model_validate(SOURCE), digest) is None


def test_a_pin_is_no_part_of_what_is_wanted() -> None:
    """Whoever pins the content shares it with who does not, and a changed pin downloads nothing."""
    manifests = [
        build_artifact(
            cache=make_cache(), source=make_adapter(**pinned(digest)).spec.source, base_artifact=BASE, credentials=None
        )
        for digest in (None, RIGHT, WRONG)
    ]
    assert manifests[0] == manifests[1] == manifests[2]
    assert "digest" not in manifests[0]["spec"]["source"]


NAME = artifact_key(make_adapter())[1]
GOOD = ready_artifact(NAME, base=BASE, status={"digest": RIGHT})


def test_an_adapter_is_served_what_it_pins_and_nothing_else() -> None:
    right = plan_adapter(seen(make_adapter(**pinned(RIGHT)), GOOD), now=NOW)
    assert isinstance(right.decision.entry, Serve)
    wrong = plan_adapter(seen(make_adapter(**pinned(WRONG)), GOOD), now=NOW)
    assert not isinstance(wrong.decision.entry, Serve)
    assert wrong.status is not None
    conditions = told(wrong.status.conditions)
    for type_ in (Condition.DOWNLOADED, Condition.READY):
        assert conditions[type_][:2] == ("False", "DigestMismatch")
        assert RIGHT in conditions[type_][2]
        assert WRONG in conditions[type_][2]
    assert conditions[Condition.STALLED][1] == "DigestMismatch"
    assert wrong.status.digest is None


def test_refused_content_leaves_the_list_and_what_was_served_before_stays() -> None:
    refused = make_module(path=f"/model-cache/artifacts/{NAME}-{COMMIT}", uid="uid-team-a-sql")
    before = replace(refused, path="/model-cache/artifacts/sql-before")
    decision = plan_adapter(seen(make_adapter(**pinned(WRONG)), GOOD), now=NOW).decision
    for entry, left in ((refused, ()), (before, (before,))):
        previous = ModuleList("serving/llama", 3, (entry,))
        assert plan_list(previous, [decision], deployment="serving/llama").modules == left
    kept = make_decision(Keep(), uid=refused.uid)
    assert plan_list(ModuleList("serving/llama", 3, (refused,)), [kept], deployment="x").modules == (refused,)


def test_a_hand_made_artifact_is_not_ready_with_other_content_than_it_pins() -> None:
    source = Source.model_validate(pinned(WRONG)["source"])
    made = make_artifact(by_hand=True, status={"attempt": 1})
    artifact = made.model_copy(update={"spec": made.spec.model_copy(update={"source": source})})
    result = FetchResult(ok=True, resolved_revision=COMMIT, digest=RIGHT, size_bytes=1, files=1, path="artifacts/x")
    job = JobView("sql-1", "uid-job", 1, "uid-artifact", False, True, result, None, None)
    plan = plan_artifact(seen_artifact(artifact, jobs=(job,)), now=NOW)
    assert plan.status is not None
    status, reason, message = told(plan.status.conditions)[Condition.READY]
    assert (status, reason) == ("False", "DigestMismatch")
    assert "not tried again until the spec changes" in message
    assert (plan.status.next_attempt_time, plan.status.path) == (None, None)


def test_a_pickle_that_is_no_longer_allowed_leaves_the_list() -> None:
    allowing, refusing = (
        make_deployment(adapterPolicy={"namespaces": {"from": "All"}, "pickledWeights": value})
        for value in ("AllowScanned", "Refuse")
    )
    wanted = plan_adapter(seen(deployment=allowing), now=NOW).artifact
    assert wanted is not None
    assert wanted["spec"]["pickledWeights"] == "AllowScanned"
    made = ready_artifact(wanted["metadata"]["name"], base=BASE)
    pickled = made.model_copy(update={"spec": made.spec.model_copy(update={"pickled_weights": "AllowScanned"})})
    served = served_by(plan_adapter(seen(None, pickled, deployment=allowing), now=NOW).decision)
    assert served is not None

    plain = make_artifact(NAME, base=BASE, conditions=not_ready("UnsafeFormat", "only as pickle"))
    plan = plan_adapter(seen(None, pickled, plain, deployment=refusing), now=NOW)
    assert plan.artifact is not None
    assert "pickledWeights" not in plan.artifact["spec"]
    assert plan_list(ModuleList("serving/llama", 3, (served,)), [plan.decision], deployment="x").modules == ()
    other = replace(served, path="/model-cache/artifacts/sql-before")
    assert plan_list(ModuleList("serving/llama", 3, (other,)), [plan.decision], deployment="x").modules == (other,)
