"""When pods roll for their adapters (updateStrategy Rollout): a table of what happened when, and what fits into arguments."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from lora_operator.conditions import Verdict, failing
from lora_operator.constants import Reason
from lora_operator.desired.command_line import StaticModules
from lora_operator.desired.common import literal
from lora_operator.kube.workloads import Workload
from lora_operator.plan import rollout
from lora_operator.plan.adapter_list import Decision, Drop, Keep, Module, ModuleList, Serve, Unknown
from lora_operator.plan.rollout import (
    LONGEST,
    LONGEST_ROLLOUT,
    QUIET,
    Rolled,
    RolloutPlan,
    Unrolled,
    build_static,
    is_coming,
    is_rolling,
    leave_out,
    parse_rolled,
    plan_rollout,
)
from tests.unit.builders import NOW, make_artifact, make_decision, make_module, not_ready, ready_artifact

A, B = StaticModules(2, ("a",)), StaticModules(3, ("a", "b"))
NONE = StaticModules(1, ())
OLD = Rolled(1, NONE.digest)
QUIET_SECONDS, LONGEST_SECONDS = QUIET.total_seconds(), LONGEST.total_seconds()

# (what pods have, what happens: (seconds, the list then, adapters that are being fetched then)…, when the pods roll)
Look = tuple[float, StaticModules, tuple[str, ...]]
STORIES: dict[str, tuple[Rolled | None, list[Look], list[float]]] = {
    "nothing changed": (OLD, [(0, NONE, ()), (9, NONE, ()), (99, NONE, ("x",))], []),
    "one adapter": (OLD, [(0, A, ()), (4.9, A, ()), (5, A, ())], [5]),
    "two within the quiet time": (OLD, [(0, A, ()), (4, B, ()), (5, B, ()), (8.9, B, ()), (9, B, ())], [9]),
    "one is taken back before the pods rolled": (OLD, [(0, A, ()), (4, NONE, ()), (5, NONE, ()), (99, NONE, ())], []),
    "one is taken back and comes again: the time begins anew": (
        OLD,
        [(0, A, ()), (4, NONE, ()), (6, A, ()), (10.9, A, ()), (11, A, ())],
        [11],
    ),
    "another one is downloading": (
        OLD,
        [(0, A, ("x",)), (9, A, ("x",)), (30, B, ()), (34.9, B, ()), (35, B, ())],
        [35],
    ),
    "another one is downloading, and fails": (OLD, [(0, A, ("x",)), (9, A, ("x",)), (9.5, A, ())], [9.5]),
    "another one hangs": (OLD, [(0, A, ("x",)), (59.9, A, ("x",)), (60, A, ("x",))], [60]),
    "there is no end of changes": (
        OLD,
        [(float(second), A if second % 4 else B, ()) for second in range(0, 61, 2)],
        [60],
    ),
    "only downloads that nothing is ready of": (OLD, [(0, NONE, ("x",)), (70, NONE, ("x",))], []),
    "one is deleted": (Rolled(2, A.digest), [(0, NONE, ()), (5, NONE, ())], [5]),
    "the first pods, and nothing comes": (None, [(0, NONE, ())], [0]),
    "the first pods, with what is there": (None, [(0, A, ())], [0]),
    "the first pods wait for what is downloading": (None, [(0, A, ("x",)), (3, A, ("x",)), (4, B, ())], [4]),
    "the first pods don't wait for ever": (None, [(0, NONE, ("x",)), (59, NONE, ("x",)), (60, NONE, ("x",))], [60]),
}


@pytest.mark.parametrize("story", STORIES)
def test_when_pods_roll(story: str) -> None:
    rolled, looks, expected = STORIES[story]
    unrolled: Unrolled | None = None
    rolls = []
    for second, wanted, coming in sorted(looks, key=lambda look: look[0]):
        plan = plan_rollout(wanted, rolled, unrolled, coming=coming, rolling=False, now=NOW + timedelta(seconds=second))
        unrolled = plan.unrolled
        if plan.roll:
            rolls.append(second)
            rolled, unrolled = Rolled(wanted.generation, wanted.digest), None
        waits = not plan.roll and plan.unrolled is not None
        assert (plan.waits_for is not None) is waits
        assert (plan.look_again is not None) is waits
        assert plan.look_again is None or 0 < plan.look_again <= LONGEST_SECONDS
    assert rolls == expected


def test_while_pods_are_replaced_all_that_comes_is_kept_for_the_next_roll_out() -> None:
    """There is another list every 7 s, and a roll-out takes 100 s: each must end, and the next brings all that came meanwhile."""
    rolled, unrolled, rolls, until = OLD, None, [], 0
    lists = [StaticModules(2 + number, tuple(map(str, range(number + 1)))) for number in range(60)]
    for second in range(400):
        wanted = lists[second // 7]
        plan = plan_rollout(
            wanted, rolled, unrolled, coming=(), rolling=second < until, now=NOW + timedelta(seconds=second)
        )
        unrolled = plan.unrolled
        if second < until and plan.waits_for is not None:
            assert plan.waits_for == f"until the roll-out of list {rolled.generation} is done"
        if plan.roll:
            rolls.append(second)
            rolled, unrolled, until = Rolled(wanted.generation, wanted.digest), None, second + 100
    assert rolls == [5, 105, 205, 305]


def test_a_roll_out_that_does_not_end_is_not_waited_for_for_ever() -> None:
    plan = plan_rollout(A, OLD, None, coming=(), rolling=True, now=NOW)
    for wait, rolls in ((LONGEST_ROLLOUT - timedelta(seconds=1), False), (LONGEST_ROLLOUT, True)):
        assert plan_rollout(A, OLD, plan.unrolled, coming=(), rolling=True, now=NOW + wait).roll is rolls


def test_pods_that_have_the_list_wait_for_nothing() -> None:
    assert plan_rollout(NONE, OLD, None, coming=(), rolling=True, now=NOW) == RolloutPlan(roll=False)


def deployed(*, replicas: int = 2, paused: bool = False, **status: Any) -> dict[str, Any]:
    """A Deployment in its third form, all whose pods are there unless the status says otherwise."""
    done = dict.fromkeys(("replicas", "updatedReplicas", "readyReplicas"), replicas) | {"observedGeneration": 3}
    return {
        "metadata": {"generation": 3},
        "spec": {"replicas": replicas, "paused": paused},
        "status": done | status,
    }


STUCK = {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}
ROLLED_OUT = {"type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable"}
UPDATED = {"type": "Progressing", "status": "True", "reason": "ReplicaSetUpdated"}
ROLLING: dict[str, tuple[dict[str, Any] | None, Verdict | None, bool]] = {
    "there is no Deployment": (None, None, False),
    "no controller has seen it": ({"metadata": {"generation": 1}, "spec": {"replicas": 1}}, None, False),
    "all pods are new and ready": (deployed(), None, False),
    "the controller has not seen the new form": (deployed(observedGeneration=2), None, True),
    "an old pod is there": (deployed(updatedReplicas=1), None, True),
    "a new pod is starting": (deployed(readyReplicas=1), None, True),
    "a new pod crashes": (deployed(readyReplicas=1), failing(Reason.CRASH_LOOPING, "x"), False),
    "a new pod's volumes are slow": (deployed(readyReplicas=1), failing(Reason.PROGRESSING, "x"), True),
    "Kubernetes has given up": (deployed(readyReplicas=1, conditions=[STUCK]), None, False),
    "it is scaled up": (deployed(replicas=3, readyReplicas=2, conditions=[ROLLED_OUT]), None, False),
    "one of its pods is ill": (deployed(readyReplicas=1, conditions=[ROLLED_OUT]), None, False),
    "it was rolled out, and has a new form": (deployed(observedGeneration=2, conditions=[ROLLED_OUT]), None, True),
    "the only new pod is starting": (deployed(replicas=1, readyReplicas=0, conditions=[UPDATED]), None, True),
    "somebody has paused it": (deployed(updatedReplicas=0, paused=True), None, False),
    "it is scaled to zero": (deployed(replicas=0), None, False),
}


@pytest.mark.parametrize("case", ROLLING)
def test_whether_pods_are_being_replaced(case: str) -> None:
    workload, trouble, expected = ROLLING[case]
    assert is_rolling(Workload.parse(workload) if workload is not None else None, trouble) is expected


def test_what_it_waits_for_is_said() -> None:
    names = tuple(f"LoRAAdapter team-a/{letter}" for letter in "vwxyz")
    plans = [plan_rollout(A, OLD, None, coming=names[:count], rolling=False, now=NOW) for count in (0, 1, 2, 5)]
    assert [plan.waits_for for plan in plans] == [
        "until no adapter has changed for 5 s",
        "until LoRAAdapter team-a/v is downloaded, at most 60 s",
        "until LoRAAdapter team-a/v, LoRAAdapter team-a/w are downloaded, at most 60 s",
        "until LoRAAdapter team-a/v, LoRAAdapter team-a/w, LoRAAdapter team-a/x and 2 more are downloaded, at most 60 s",
    ]
    assert plans[0].look_again == QUIET_SECONDS


def test_the_generation_alone_rolls_nothing() -> None:
    assert not plan_rollout(replace(A, generation=9), Rolled(2, A.digest), None, coming=(), rolling=False, now=NOW).roll


@pytest.mark.parametrize("text", [None, "", "7", "x-aa", "-1-aa", f"{2**53}-aa", "7-aa\n", "7-"])
def test_an_annotation_that_is_none_of_ours_is_none(text: str | None) -> None:
    assert parse_rolled(text) is None


def test_the_annotation_is_read_as_it_was_written() -> None:
    assert parse_rolled(f"{A.generation}-{A.digest}") == Rolled(2, A.digest)


MODULE = make_module()
KEPT = make_decision(Keep(), artifact=("serving", "x"))
QUEUED = make_artifact(conditions=not_ready("Queued"))
COMING = {
    "it was only just applied": (None, None, True),
    "its artifact was only just made": (KEPT, make_artifact(), True),
    "it is queued": (KEPT, QUEUED, True),
    "it is downloading": (KEPT, make_artifact(conditions=not_ready("Downloading")), True),
    "it is being verified": (KEPT, make_artifact(conditions=not_ready("Verifying")), True),
    "it is there, and not on the list yet": (KEPT, ready_artifact(), True),
    "it was refused by the checks": (KEPT, make_artifact(conditions=not_ready("InvalidAdapter")), False),
    "it is in back-off": (KEPT, make_artifact(conditions=not_ready("SourceUnreachable")), False),
    "it is tried again after a failure": (
        KEPT,
        make_artifact(conditions=not_ready("Downloading"), status={"failedAttempts": 1}),
        False,
    ),
    "its artifact can't be made": (KEPT, None, False),
    "it is on the list": (replace(KEPT, entry=Serve(MODULE)), ready_artifact(), False),
    "it is not accepted": (make_decision(Drop()), None, False),
    "too little is known of it": (replace(KEPT, entry=Unknown()), QUEUED, False),
}


@pytest.mark.parametrize("case", COMING)
def test_which_adapters_are_waited_for(case: str) -> None:
    decision, artifact, expected = COMING[case]
    assert is_coming(decision, artifact) is expected


def served(module: Module) -> Decision:
    return make_decision(Serve(module), uid=module.uid)


def test_who_has_a_place_keeps_it_when_there_is_no_room_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [make_module(name, uid=f"uid-{name}") for name in ("new-a", "old-b", "old-c", "new-d")]
    entries = build_static(ModuleList("a/b", 1, tuple(modules))).entries
    monkeypatch.setattr(rollout, "MAX_ARGUMENT_BYTES", sum(len(literal(entry)) + 1 for entry in entries[:3]))
    present = {module.uid: module for module in modules[1:3]}
    nothing = make_decision(Drop(), uid="uid-e")
    decisions = [served(modules[0]), served(modules[1]), replace(KEPT, uid="uid-old-c"), served(modules[3]), nothing]
    kept, left_out = leave_out(decisions, present)
    assert left_out == {"uid-new-d"}
    assert {one.uid for one in kept if one.entry != Drop()} == {"uid-new-a", "uid-old-b", "uid-old-c"}
    assert {one.uid for one in kept} == {one.uid for one in decisions}


def test_thousands_of_adapters_fit() -> None:
    modules = [make_module(f"adapter-{number}", uid=str(number)) for number in range(3000)]
    assert leave_out([served(module) for module in modules], {})[1] == frozenset()


def test_the_digest_is_of_what_engines_are_told() -> None:
    one = ModuleList("a/b", 1, (MODULE,))
    same = replace(one, generation=2, modules=(replace(MODULE, uid="other", revision="r", adapter="x/y"),))
    assert build_static(one).digest == build_static(same).digest
    for other in (replace(MODULE, name="x"), replace(MODULE, path="/x"), replace(MODULE, base_model_name="x")):
        assert build_static(replace(one, modules=(other,))).digest != build_static(one).digest
