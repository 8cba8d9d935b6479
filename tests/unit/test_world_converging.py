"""Whatever happens in whatever order: it converges, a second look changes nothing, and nothing wanted is ever unloaded.

Each example is a list of things that users, nodes and sources do, between which the operator gets some time or none, and a seed
for the order in which its work queue runs. What must hold at every write of the operator is asserted in model_world.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lora_operator.kube.kinds import Kind
from lora_operator.reconcile.store import Key
from tests.unit.fake_kube import Json
from tests.unit.model_world import LLAMA, MODULES, SERVING, World, packed

ADAPTERS = [("team-a", "x"), ("team-a", "y"), ("team-b", "x"), ("team-b", "z")]
NAMES = ("a", "b", "base")
REPOS = ("org/one", "org/two", "org/bad")
POLICIES = ({"from": "All"}, {"from": "Same"}, {"from": "Selector", "selector": {"matchLabels": {"served": "yes"}}})


def adapter(place: tuple[str, str], name: str, repo: str, secret: bool) -> Json:
    """A LoRAAdapter."""
    source: Json = {"repo": repo} | ({"tokenSecretRef": {"name": "hf"}} if secret else {})
    return _object(
        "LoRAAdapter",
        *place,
        {
            "source": {"huggingFace": source},
            "vllmDeploymentRef": {"namespace": SERVING, "name": "llama"},
            "servedName": name,
        },
    )


def deployment(**changes: Any) -> Json:
    """The VLLMDeployment."""
    policy = {"namespaces": changes.get("namespaces", POLICIES[0]), "servedNames": changes.get("names", "Plain")}
    return _object(
        "VLLMDeployment",
        SERVING,
        "llama",
        {
            "model": {
                "source": {"huggingFace": {"repo": "org/llama"}},
                "servedNames": ["base", *changes.get("more_names", ())],
            },
            "cacheRef": {"name": "default"},
            "adapterPolicy": policy,
            "engine": {"image": "vllm"},
            "replicas": changes.get("replicas", 2),
        },
    )


def _object(kind: str, namespace: str, name: str, spec: Json) -> Json:
    return {
        "apiVersion": "lora-operator.dev/v1alpha1",
        "kind": kind,
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    }


def namespace(name: str, served: bool) -> Json:
    """A Namespace."""
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": name, "labels": {"served": "yes"} if served else {"served": "no"}},
    }


def secret(name: str) -> Json:
    """A tenant's Secret."""
    metadata = {"name": "hf", "namespace": name}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": {"token": packed(b"hf_x")}}


def cache() -> Json:
    """The ModelCache."""
    return _object("ModelCache", SERVING, "default", {"storage": {"existingClaim": "models"}})


def claim() -> Json:
    """Its claim, bound."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "models", "namespace": SERVING},
        "spec": {"accessModes": ["ReadWriteMany"]},
        "status": {"phase": "Bound"},
    }


# What must be, by the rules that users read


def admitted(world: World, body: Json) -> bool | None:
    """Whether the deployment admits an adapter; None where its namespace's labels are not known."""
    policy = world.objects[LLAMA]["spec"]["adapterPolicy"]
    name = body["metadata"]["namespace"]
    if public(world, body) in world.objects[LLAMA]["spec"]["model"]["servedNames"]:
        return False
    match policy["namespaces"]["from"]:
        case "All":
            return True
        case "Same":
            return False
    found = world.objects.get(("Namespace", "", name))
    return None if found is None else found["metadata"]["labels"]["served"] == "yes"


def told(body: Json) -> dict[str, Json]:
    """Conditions by type."""
    return {c["type"]: c for c in body["status"]["conditions"]}


def public(world: World, body: Json) -> str:
    """What clients write."""
    plain = world.objects[LLAMA]["spec"]["adapterPolicy"]["servedNames"] == "Plain"
    name: str = body["spec"]["servedName"]
    return name if plain else f"{body['metadata']['namespace']}/{name}"


def adapters(world: World) -> list[Json]:
    """The oldest first; of those made in the same second the one whose name is listed for it."""
    names = listed(world) if LLAMA in world.objects else {}

    def rank(body: Json) -> tuple[str, bool, str]:
        uid = body["metadata"]["uid"]
        has_its_name = uid in names and names[uid] == public(world, body)
        return body["metadata"]["creationTimestamp"], not has_its_name, uid

    return sorted((body for body in world.objects.values() if body["kind"] == "LoRAAdapter"), key=rank)


def holders(world: World) -> dict[str, Json]:
    """Public name to the adapter that must have it."""
    if LLAMA not in world.objects:
        return {}
    found: dict[str, Json] = {}
    for body in adapters(world):
        if admitted(world, body):
            found.setdefault(public(world, body), body)
    return found


def listed(world: World) -> dict[str, str]:
    """Uid to public name, by what pods are told."""
    modules = world.context.records.deployments.peek((SERVING, "llama")).modules or world.modules()
    return {module.uid: module.name for module in modules.modules} if modules else {}


def may_stay(world: World, body: Json, name: str) -> bool:
    """Whether nothing that is certain takes the name from an adapter."""
    if LLAMA not in world.objects or body["metadata"]["uid"] not in {b["metadata"]["uid"] for b in adapters(world)}:
        return False
    body = world.objects["LoRAAdapter", body["metadata"]["namespace"], body["metadata"]["name"]]
    if public(world, body) != name or admitted(world, body) is False:
        return False
    rivals = [one for one in adapters(world) if one is body or (admitted(world, one) and public(world, one) == name)]
    return rivals[0] is body


# What happens

Step = Callable[[World], None]


def apply(body: Json) -> Step:
    return lambda world: void(world.write(body | {"metadata": dict(body["metadata"])}))


def delete(kind: str, place: tuple[str, str]) -> Step:
    return lambda world: world.remove((kind, *place))


def delete_artifact(number: int) -> Step:
    def step(world: World) -> None:
        found = sorted(place for place in world.objects if place[0] == "ModelArtifact")
        if found:
            world.remove(found[number % len(found)])

    return step


def edit_list(world: World) -> None:
    if (body := world.objects.get(MODULES)) is not None:
        world.write(body | {"binaryData": {"modules.json.gz": packed(b"edited")}})


def kill_pod(number: int) -> Step:
    def step(world: World) -> None:
        if found := list(world.pods()):
            world.remove(("Pod", SERVING, found[number % len(found)]))
            world.play()

    return step


def reach(number: int, reachable: bool) -> Step:
    def step(world: World) -> None:
        if found := list(world.pods()):
            world.engines[found[number % len(found)]].reachable = reachable

    return step


def restart(unlisted: bool) -> Step:
    def step(world: World) -> None:
        world.unlisted = unlisted
        world.restart()

    return step


def turn(switch: str, value: bool) -> Step:
    return lambda world: setattr(world.kube, switch, value)


def void(_: object) -> None:
    """Nothing of it."""


places = st.sampled_from(ADAPTERS)
STEPS: dict[str, st.SearchStrategy[Step]] = {
    "an adapter is applied": st.builds(
        lambda *made: apply(adapter(*made)), places, st.sampled_from(NAMES), st.sampled_from(REPOS), st.booleans()
    ),
    "an adapter is deleted": st.builds(lambda place: delete("LoRAAdapter", place), places),
    "the deployment is applied": st.builds(
        lambda namespaces, names, more_names, replicas: apply(
            deployment(namespaces=namespaces, names=names, more_names=more_names, replicas=replicas)
        ),
        st.sampled_from(POLICIES),
        st.sampled_from(["Plain", "NamespaceQualified"]),
        st.sampled_from([(), ("a",)]),
        st.integers(0, 3),
    ),
    "the deployment is deleted": st.just(delete("VLLMDeployment", (SERVING, "llama"))),
    "a namespace is labelled": st.builds(
        lambda name, served: apply(namespace(name, served)), st.sampled_from(["team-a", "team-b"]), st.booleans()
    ),
    "a namespace is not known": st.builds(
        lambda name: delete("Namespace", ("", name)), st.sampled_from(["team-a", "team-b"])
    ),
    "a Secret is made": st.builds(lambda name: apply(secret(name)), st.sampled_from(["team-a", "team-b"])),
    "a Secret is deleted": st.builds(
        lambda name: delete("Secret", (name, "hf")), st.sampled_from(["team-a", "team-b"])
    ),
    "the right to Secrets comes or goes": st.builds(lambda on: turn("secrets_forbidden", on), st.booleans()),
    "the cache is deleted": st.just(delete("ModelCache", (SERVING, "default"))),
    "the cache is applied": st.just(apply(cache())),
    "an artifact is deleted by hand": st.builds(delete_artifact, st.integers(0, 9)),
    "the list is deleted by hand": st.just(delete("ConfigMap", MODULES[1:])),
    "the list is edited by hand": st.just(edit_list),
    "a pod is killed": st.builds(kill_pod, st.integers(0, 2)),
    "a pod does not answer, or does again": st.builds(reach, st.integers(0, 2), st.booleans()),
    "the operator restarts": st.builds(restart, st.booleans()),
    "every kind can be listed": st.just(lambda world: restart(False)(world) if world.unlisted else None),
    "the API server goes or comes": st.builds(lambda down: turn("down", down), st.booleans()),
    "time passes": st.builds(lambda seconds: lambda world: world.skip(seconds), st.sampled_from([1.0, 15.0, 70.0])),
}
OFTEN = ["an adapter is applied"] * 7 + ["time passes"] * 4
SELDOM = {"the deployment is deleted", "the cache is deleted"}  # each ends much of what could be seen
CHOICES = sorted(OFTEN + [what for what in STEPS for _ in range(1 if what in SELDOM else 2)])
steps = st.sampled_from(CHOICES).flatmap(
    lambda what: st.tuples(st.just(what), STEPS[what], st.sampled_from([0, 2, 10, 100]))
)


def happen(world: World, step: Step, work: int = 0) -> None:
    """One step, and so many reconciles; from the step on its effect is what the operator is held to."""
    for name, body in holders(world).items():
        if listed(world).get(body["metadata"]["uid"]) == name:
            world.held[name] = body
    step(world)
    world.held = {name: body for name, body in world.held.items() if may_stay(world, body, name)}
    world.passes(work)


def heal(world: World) -> None:
    """Everything outside of the specs is well again."""
    world.kube.down = world.kube.secrets_forbidden = False
    for body in (cache(), secret("team-a"), secret("team-b"), secret(SERVING)):
        apply(body)(world)
    for name in ("team-a", "team-b"):
        if ("Namespace", "", name) not in world.objects:
            apply(namespace(name, True))(world)
    for engine in world.engines.values():
        engine.reachable = True
    if world.unlisted:
        restart(False)(world)


def start(seed: int, **changes: Any) -> World:
    """A fleet that serves two tenants' adapters."""
    world = World(seed)
    world.bad_repos.add("org/bad")
    for body in (
        claim(),
        cache(),
        deployment(**changes),
        *(namespace(name, True) for name in ("team-a", "team-b", SERVING)),
    ):
        apply(body)(world)
    for place, name, repo, private in (
        (ADAPTERS[0], "a", "org/one", False),
        (ADAPTERS[3], "b", "org/two", True),
        (ADAPTERS[2], "a", "org/two", False),
    ):
        apply(secret(place[0]))(world)
        apply(adapter(place, name, repo, private))(world)
    world.skip(1.0)
    assert len(listed(world)) >= 2
    return world


@settings(
    max_examples=250,
    derandomize=True,
    deadline=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
@given(st.lists(steps, min_size=4, max_size=25), st.integers(0, 2**16), st.sampled_from([POLICIES[0], POLICIES[2]]))
def test_it_converges_and_unloads_nothing_that_is_wanted(
    happenings: list[tuple[str, Step, int]], seed: int, namespaces: Json
) -> None:
    world = start(seed, namespaces=namespaces)
    for _, step, work in happenings:
        happen(world, step, work)
    happen(world, heal)
    world.skip(700)
    look_at_secrets(world)
    world.skip(700)
    check_converged(world)
    check_idempotent(world)


def look_at_secrets(world: World) -> None:
    """Secrets are not watched: that a served adapter's was made anew is seen at the next look, which comes every ten minutes."""
    for body in adapters(world):
        if "tokenSecretRef" in body["spec"]["source"]["huggingFace"]:
            world.enqueue(Key(Kind.LORA_ADAPTER, body["metadata"]["namespace"], body["metadata"]["name"]))


def check_converged(world: World) -> None:
    """The list, the pods and every adapter's status are what the specs say."""
    wanted, entries = holders(world), listed(world)
    uids = {body["metadata"]["uid"] for body in wanted.values()}
    if LLAMA in world.objects:
        assert set(entries) <= uids
    for name, body in wanted.items():
        good = body["spec"]["source"]["huggingFace"]["repo"] != "org/bad"
        conditions = told(body)
        assert conditions["Accepted"]["status"] == "True", conditions
        if good:
            assert conditions["Downloaded"]["status"] == "True", conditions
            assert entries.get(body["metadata"]["uid"]) == name, conditions
            assert body["status"]["servedName"] == name
            if world.engines:
                assert conditions["Ready"]["status"] == "True", conditions
    for body in adapters(world):
        accepted = told(body)["Accepted"]
        assert (accepted["status"] == "True") == (body["metadata"]["uid"] in uids)
        assert body["status"]["observedGeneration"] == body["metadata"]["generation"]
    if LLAMA in world.objects:
        assert told(world.objects[LLAMA])["AdaptersInSync"]["status"] == "True", told(world.objects[LLAMA])
        assert told(world.objects[LLAMA])["Ready"]["status"] == str(bool(world.engines))
    modules = world.modules()
    for engine in world.engines.values():
        assert modules is not None
        assert engine.served == {module.name: module.path for module in modules.modules}


def check_idempotent(world: World) -> None:
    """Looking at everything once more writes nothing."""
    before = world.kube.writes
    world.refresh()
    for key in world.store.keys(Kind.POD):
        world.enqueue(key)
    world.passes(500)
    assert world.kube.writes == before


# What it found, one by one


@pytest.mark.parametrize("seed", range(20))
def test_a_list_that_was_lost_is_not_made_again_before_every_adapter_is_known(seed: int) -> None:
    world = start(seed)
    before = [engine.served for engine in world.engines.values()]
    world.remove(MODULES)
    world.restart()
    happen(world, lambda world: world.skip(5.0))
    assert [engine.served for engine in world.engines.values()] == before
    assert [len(modules.modules) for modules in world.lists] == [2]


@pytest.mark.parametrize("seed", range(10))
def test_a_list_that_was_lost_keeps_what_pods_hold_and_somebody_wants_though_its_content_is_not_there(
    seed: int,
) -> None:
    world = start(seed)
    before = [engine.served for engine in world.engines.values()]
    lost = [
        place
        for place, body in world.objects.items()
        if place[0] == "ModelArtifact" and body["spec"]["source"]["huggingFace"]["repo"] == "org/one"
    ]
    world.bad_repos.add("org/one")
    for place in (*lost, MODULES):
        world.remove(place)
    world.restart()
    happen(world, lambda world: world.skip(30.0))
    told_of = told(world.objects["LoRAAdapter", *ADAPTERS[0]])
    assert told_of["Downloaded"]["status"] == "False", "the Hub is away, so it can't be fetched again"
    assert [engine.served for engine in world.engines.values()] == before
    world.remove(("LoRAAdapter", *ADAPTERS[0]))
    world.skip(30.0)
    assert all(
        known["a"] not in engine.served.values() for engine, known in zip(world.engines.values(), before, strict=True)
    )


def test_what_a_user_writes_just_before_a_status_write_needs_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    world = start(11)
    world.skip(30)
    world.write(world.objects[LLAMA] | {"status": {}})
    world._hear(all_of_it=True)
    hear = world._hear
    monkeypatch.setattr(world, "_hear", lambda *, all_of_it: hear(all_of_it=True) if all_of_it else None)
    happen(world, apply(deployment(replicas=3)))
    world.passes(1000)  # asserts it, and that it ends
    assert world.objects[LLAMA]["status"]["observedGeneration"] == world.objects[LLAMA]["metadata"]["generation"]
    assert world.objects["Deployment", *LLAMA[1:]]["spec"]["replicas"] == 3
