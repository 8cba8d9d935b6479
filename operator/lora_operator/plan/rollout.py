"""With updateStrategy Rollout: which adapters fit into the pods' arguments, and when the pods are replaced for them.

Starting an engine takes minutes, so changes that come together make one roll-out: it waits until the list was quiet, and for
adapters that are just being fetched, but never for long. While pods are being replaced, all that comes is kept for the next
roll-out: else no engine would ever be up where changes come faster than engines. What can't be served is not on the list, so it
rolls nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from lora_operator.api.artifact import ModelArtifact
from lora_operator.conditions import Verdict, find
from lora_operator.constants import Condition, Reason
from lora_operator.desired.command_line import StaticModules
from lora_operator.desired.common import literal
from lora_operator.kube.workloads import Workload
from lora_operator.plan.adapter_list import Decision, Drop, Keep, Module, ModuleList, Serve
from lora_operator.wire.plugin import MAX_GENERATION

QUIET: Final = timedelta(seconds=5)  # after the last change of the list
LONGEST: Final = timedelta(seconds=60)  # after the first change that the pods don't have
LONGEST_ROLLOUT: Final = timedelta(hours=2)  # after the first such change, though pods are still being replaced
ROLLING_LOOK_SECONDS: Final = 10.0  # while they are: the Deployment and its pods tell of themselves when that is over
_ROLLED_OUT: Final = "NewReplicaSetAvailable"  # the Deployment controller's word, until the template changes
LOOK_SECONDS: Final = 1.0  # while adapters are being fetched
# etcd takes objects of 1.5 MiB, and the kernel 2 MiB of arguments and environment; the rest of the pod needs room too, and the
# client would rather not send more than 1 MiB at once.
MAX_ARGUMENT_BYTES: Final = 768 * 2**10
MAX_NAMED: Final = 3
_ON_THE_WAY: Final = (Reason.QUEUED, Reason.DOWNLOADING, Reason.VERIFYING)
_ROLLED: Final = re.compile(r"(\d{1,16})-([0-9a-z]{1,64})")


@dataclass(frozen=True)
class Rolled:
    """The list that the pods' arguments hold."""

    generation: int
    digest: str


@dataclass(frozen=True)
class Unrolled:
    """A list that the pods' arguments don't hold yet: since when they lag, and since when it is as it is."""

    digest: str
    first: datetime
    last: datetime


@dataclass(frozen=True)
class RolloutPlan:
    """Whether pods are made from the list now; else what it waits for, and after how many seconds to look again."""

    roll: bool
    unrolled: Unrolled | None = None
    waits_for: str | None = None
    look_again: float | None = None


@dataclass(frozen=True)
class Rollout:
    """The adapters as arguments, and whether the pods are to have them now."""

    static: StaticModules
    plan: RolloutPlan


def as_rolled(
    modules: ModuleList | None, rollout: Rollout | None, rolled: Rolled | None
) -> tuple[ModuleList | None, str | None]:
    """The list under the generation that pods hold it by, where it is in their arguments by now; else what that waits for."""
    if rollout is None or modules is None:
        return modules, None
    if rolled is None or rolled.digest != rollout.static.digest:
        return modules, rollout.plan.waits_for
    return replace(modules, generation=rolled.generation), None


def parse_rolled(text: str | None) -> Rolled | None:
    """The Deployment's annotation; None where it has none, or one that somebody wrote by hand."""
    match = _ROLLED.fullmatch(text or "")
    if match is None or int(match[1]) >= MAX_GENERATION:
        return None
    return Rolled(int(match[1]), match[2])


def plan_rollout(
    wanted: StaticModules,
    rolled: Rolled | None,
    unrolled: Unrolled | None,
    *,
    coming: tuple[str, ...],
    rolling: bool,
    now: datetime,
) -> RolloutPlan:
    """Decide about `wanted`, where the pods have `rolled` (None: there are none) and `unrolled` was remembered.

    `coming` are the adapters that are just being fetched; `rolling`: the pods are being replaced, by those that have `rolled`.
    Pods that don't exist yet need not wait for quiet.
    """
    if rolled is not None and rolled.digest == wanted.digest:
        return RolloutPlan(roll=False)
    if unrolled is None:
        unrolled = Unrolled(wanted.digest, now, now)
    elif unrolled.digest != wanted.digest:
        unrolled = replace(unrolled, digest=wanted.digest, last=now)
    if rolling and rolled is not None and now < unrolled.first + LONGEST_ROLLOUT:
        return RolloutPlan(
            False, unrolled, f"until the roll-out of list {rolled.generation} is done", ROLLING_LOOK_SECONDS
        )
    latest = unrolled.first + LONGEST
    quiet = unrolled.first if rolled is None else min(unrolled.last + QUIET, latest)
    if now >= (latest if coming else quiet):
        return RolloutPlan(roll=True, unrolled=unrolled)
    if coming:
        return RolloutPlan(False, unrolled, _until_downloaded(coming), LOOK_SECONDS)
    words = f"until no adapter has changed for {QUIET.seconds} s"
    return RolloutPlan(False, unrolled, words, (quiet - now).total_seconds())


def is_rolling(workload: Workload | None, trouble: Verdict | None) -> bool:
    """Whether the Deployment's pods are being replaced, and nothing keeps the new ones away.

    `trouble` is what does: a roll-out that can't go on is not waited for. One that nobody has begun (no controller has seen the
    Deployment yet, or somebody has paused it) is none.
    """
    if workload is None or not workload.observed_generation or workload.is_paused or not workload.replicas:
        return False
    if trouble is not None and trouble.reason is not Reason.PROGRESSING:
        return False
    progressing, is_seen = workload.condition("Progressing"), workload.observed_generation >= workload.generation
    if progressing.is_false:
        return False
    if progressing.reason == _ROLLED_OUT and is_seen:
        return False  # what is missing now is missing by scaling, or because a pod is ill
    done = workload.updated_pods == workload.pods == workload.replicas <= workload.ready_pods
    return not is_seen or not done


def _until_downloaded(coming: tuple[str, ...]) -> str:
    names = ", ".join(coming[:MAX_NAMED]) + (f" and {len(coming) - MAX_NAMED} more" if len(coming) > MAX_NAMED else "")
    return f"until {names} {'is' if len(coming) == 1 else 'are'} downloaded, at most {LONGEST.seconds} s"


def is_coming(decision: Decision | None, artifact: ModelArtifact | None) -> bool:
    """Whether an adapter may soon be on the list: its content is fetched for the first time, or was a moment ago.

    `decision` is None for an adapter that was not looked at yet. What failed once is not waited for.
    """
    if decision is None:
        return True
    if not isinstance(decision.entry, Keep) or artifact is None or artifact.status.failed_attempts:
        return False
    ready = find(artifact.status.conditions, Condition.READY)
    return ready is None or ready.status == "True" or ready.reason in _ON_THE_WAY


def build_static(modules: ModuleList) -> StaticModules:
    """The list as pods have it in their arguments, under the list's generation."""
    return StaticModules(modules.generation, tuple(map(_entry, modules.modules)))


def _entry(module: Module) -> str:
    return json.dumps({"name": module.name, "path": module.path, "base_model_name": module.base_model_name})


def leave_out(decisions: Iterable[Decision], present: Mapping[str, Module]) -> tuple[list[Decision], frozenset[str]]:
    """The decisions, without modules that don't fit into the pods' arguments, and the UIDs of the adapters that don't.

    An adapter that is on the list already (`present`, by UID) goes before others: nobody is displaced by who comes later.
    """

    def rank(one: Decision) -> tuple[bool, str]:
        return one.uid not in present, one.entry.module.name if isinstance(one.entry, Serve) else ""

    room = MAX_ARGUMENT_BYTES
    kept, left_out = [], set()
    for decision in sorted(decisions, key=rank):
        module = decision.module_in(present)
        size = len(literal(_entry(module))) + 1 if module is not None else 0
        if size > room:
            left_out.add(decision.uid)
            decision = replace(decision, entry=Drop())
        else:
            room -= size
        kept.append(decision)
    return kept, frozenset(left_out)
