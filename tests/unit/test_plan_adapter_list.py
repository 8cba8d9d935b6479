"""The module list: it only ever grows in generation, and what is unknown stays as it is."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_operator.plan.adapter_list import (
    Decision,
    Drop,
    Entry,
    Keep,
    Module,
    ModuleList,
    Serve,
    Unknown,
    decode_from_config_map,
    encode,
    encode_for_config_map,
    names_passed_on,
    plan_list,
)
from tests.unit.builders import make_module

OWNER = "serving/llama"


def listed(*modules: Module, generation: int = 5) -> ModuleList:
    return ModuleList(OWNER, generation, tuple(sorted(modules)))


def served(module: Module) -> Decision:
    return Decision(module.uid, 1, Serve(module))


def kept(module: Module) -> Decision:
    return Decision(module.uid, 1, Keep())


def refused(module: Module) -> Decision:
    return Decision(module.uid, 1, Drop())


A = make_module("a", uid="uid-a", adapter="team-a/a", path="/model-cache/artifacts/a1")
A2 = make_module("a", uid="uid-a", adapter="team-a/a", path="/model-cache/artifacts/a2")
A_RENAMED = make_module("z", uid="uid-a", adapter="team-a/a", path="/model-cache/artifacts/a1")
B = make_module("b", uid="uid-b", adapter="team-b/b", path="/model-cache/artifacts/b1")
B_AS_A = make_module("a", uid="uid-b", adapter="team-b/b", path="/model-cache/artifacts/b1")

PLANS: dict[str, tuple[ModuleList | None, Sequence[Decision], int, tuple[int, tuple[Module, ...]]]] = {
    "the first list": (None, [served(B), served(A)], 0, (1, (A, B))),
    "the first list, and nothing is wanted": (None, [], 0, (1, ())),
    "nothing changed": (listed(A, B), [served(A), served(B)], 0, (5, (A, B))),
    "the order of decisions is no change": (listed(A, B), [served(B), served(A)], 0, (5, (A, B))),
    "one more": (listed(A), [served(A), served(B)], 0, (6, (A, B))),
    "one is gone": (listed(A, B), [served(A)], 0, (6, (A,))),
    "one is no longer accepted": (listed(A, B), [served(A), refused(B)], 0, (6, (A,))),
    "one has new content": (listed(A, B), [served(A2), served(B)], 0, (6, (A2, B))),
    "one about which nothing is known keeps its entry": (listed(A, B), [kept(A), served(B)], 0, (5, (A, B))),
    "one whose new revision downloads keeps the old": (listed(A), [kept(A2)], 0, (5, (A,))),
    "one that is kept and was never listed is not": (listed(B), [kept(A), served(B)], 0, (5, (B,))),
    "an adapter made anew does not inherit the entry of its namesake": (
        listed(A),
        [Decision("uid-new", 1, Keep())],
        0,
        (6, ()),
    ),
    "a pod holds a higher generation: the list goes above it": (listed(A), [served(A)], 9, (10, (A,))),
    "a pod holds the same generation": (listed(A), [served(A)], 5, (5, (A,))),
    "the ConfigMap was lost, pods hold a list": (None, [served(A)], 41, (42, (A,))),
    "a name goes to who is decided on now, not to who had it before a rename": (
        listed(A, B),
        [kept(A), served(B_AS_A)],
        0,
        (6, (B_AS_A,)),
    ),
    "whatever the order": (listed(A, B), [served(B_AS_A), kept(A)], 0, (6, (B_AS_A,))),
    "two decisions never make two entries of one name": (None, [served(A), served(B_AS_A)], 0, (1, (A,))),
}


@pytest.mark.parametrize("case", PLANS)
def test_plan_list(case: str) -> None:
    previous, decisions, above, (generation, modules) = PLANS[case]
    result = plan_list(previous, decisions, deployment=OWNER, above=above)
    assert (result.deployment, result.generation, result.modules) == (OWNER, generation, modules)
    if previous is not None and result.generation == previous.generation:
        assert result is previous


@pytest.mark.parametrize("decision", [served, kept], ids=["decided now", "kept"])
def test_nothing_is_left_for_a_first_request_where_all_is_loaded_at_the_start(
    decision: Callable[[Module], Decision],
) -> None:
    lazy, placed = replace(A, lazy=True), replace(B, preload=1)
    result = plan_list(listed(lazy, placed), map(decision, (lazy, placed)), deployment=OWNER, all_eager=True)
    assert (result.generation, result.modules) == (6, (A, B))
    assert plan_list(result, map(decision, (lazy, placed)), deployment=OWNER, all_eager=True) is result
    hot = plan_list(result, map(served, (lazy, placed)), deployment=OWNER)
    assert (hot.generation, hot.modules) == (7, (lazy, placed))


words = st.text("abc", min_size=1, max_size=2)
modules_strategy = st.builds(
    Module, name=words, path=words, base_model_name=words, revision=words, adapter=words, uid=words
)
entries_strategy = st.one_of(
    st.builds(Serve, modules_strategy), st.builds(Keep, st.none() | words), st.just(Drop()), st.builds(Unknown)
)


def of_its_own(uid: str, generation: int, entry: Entry) -> Decision:
    """An adapter's entry has its UID."""
    return Decision(uid, generation, Serve(replace(entry.module, uid=uid)) if isinstance(entry, Serve) else entry)


decisions_strategy = st.lists(
    st.builds(of_its_own, words, st.integers(1, 3), entries_strategy),
    max_size=6,
    unique_by=lambda decision: decision.uid,
)
lists_strategy = st.none() | st.builds(
    lambda generation, modules: listed(*modules, generation=generation),
    st.integers(1, 9),
    st.lists(modules_strategy, max_size=5, unique_by=(lambda module: module.name, lambda module: module.uid)),
)


@given(previous=lists_strategy, decisions=decisions_strategy, above=st.integers(0, 12))
def test_a_second_plan_over_the_firsts_result_changes_nothing(
    previous: ModuleList | None, decisions: list[Decision], above: int
) -> None:
    first = plan_list(previous, decisions, deployment=OWNER, above=above)
    assert plan_list(first, decisions, deployment=OWNER, above=above) is first
    assert plan_list(first, decisions, deployment=OWNER, above=first.generation) is first
    stored = decode_from_config_map(encode_for_config_map(first))
    assert stored == first
    assert plan_list(stored, decisions, deployment=OWNER, above=above) == first


@given(previous=lists_strategy, decisions=decisions_strategy, above=st.integers(0, 12))
def test_a_list_is_sorted_has_every_name_once_and_never_goes_back(
    previous: ModuleList | None, decisions: list[Decision], above: int
) -> None:
    result = plan_list(previous, decisions, deployment=OWNER, above=above)
    names = [module.name for module in result.modules]
    assert names == sorted(set(names))
    assert result.generation >= max(above, previous.generation if previous else 1)
    if previous is not None and result.modules != previous.modules:
        assert result.generation > previous.generation


@given(previous=lists_strategy)
def test_nothing_known_loses_nothing(previous: ModuleList | None) -> None:
    modules = previous.modules if previous else ()
    unknown = [Decision(m.uid, 1, Unknown()) for m in modules]
    result = plan_list(previous, unknown, deployment=OWNER)
    # An adapter has one entry; where a list has more for one UID (nothing makes such a one), one stays.
    assert {m.uid for m in result.modules} == {m.uid for m in modules}
    if len({m.uid for m in modules}) == len(modules) and previous is not None:
        assert result is previous


def test_the_form_that_plugins_read() -> None:
    assert json.loads(encode(listed(A, generation=12))) == {
        "version": 1,
        "deployment": OWNER,
        "generation": 12,
        "modules": [
            {
                "name": "a",
                "path": "/model-cache/artifacts/a1",
                "baseModelName": "meta/Llama",
                "revision": A.revision,
                "adapter": "team-a/a",
                "uid": "uid-a",
            }
        ],
    }


def test_a_lazy_entry_says_so_and_one_that_some_preload_is_lazy_until_a_pod_is_told_otherwise() -> None:
    eager, lazy, some = (
        make_module("a"),
        make_module("b", uid="uid-b", lazy=True),
        make_module("c", uid="uid-c", preload=2),
    )
    modules = listed(eager, lazy, some)
    entries = json.loads(encode(modules))["modules"]
    assert [(one.get("loadPolicy"), one.get("preload")) for one in entries] == [
        (None, None),
        ("Lazy", None),
        ("Lazy", 2),
    ]
    assert decode_from_config_map(encode_for_config_map(modules)) == modules
    assert modules.digest == hashlib.sha256(encode(modules)).hexdigest()
    assert modules.digest != listed(eager).digest


def test_the_config_maps_form_is_the_same_every_time() -> None:
    modules = listed(A, B)
    assert encode_for_config_map(modules) == encode_for_config_map(modules)
    assert gzip.decompress(base64.b64decode(encode_for_config_map(modules))) == encode(modules)


def test_a_thousand_adapters_fit_a_config_map() -> None:
    many = [make_module(f"adapter-{i}", path=f"/model-cache/artifacts/{i:040x}", uid=f"{i:036x}") for i in range(5000)]
    assert len(encode_for_config_map(listed(*many))) < 900_000


B_OF_C = make_module("b", uid="uid-c", adapter="team-c/b", path="/model-cache/artifacts/b1")
A_IN_OTHER_WORDS = make_module(
    "a", uid="uid-a", adapter="team-a/a", path="/model-cache/artifacts/a1", revision="f" * 40, lazy=True
)


def test_a_list_tells_since_when_each_name_stands_for_its_content() -> None:
    def after(previous: ModuleList | None, *modules: Module, above: int = 0) -> ModuleList:
        return plan_list(previous, [served(one) for one in modules], deployment=OWNER, above=above)

    first = after(None, A, B)
    assert (first.generation, first.brought(A), first.brought(B)) == (1, 1, 1)
    second = after(first, A2, B)
    assert (second.generation, second.brought(A2), second.brought(B), second.brought(A)) == (2, 2, 1, None)
    third = after(second, A_RENAMED, B)
    assert (third.generation, third.brought(A_RENAMED), third.brought(A), third.brought(A2)) == (3, 3, None, None)
    gone = after(third, A_RENAMED)
    back = after(gone, A_RENAMED, B)
    assert (back.generation, back.brought(A_RENAMED), back.brought(B)) == (5, 3, 5)
    assert after(back, A_RENAMED, B_OF_C).brought(B_OF_C) == 5, "engines went on answering alike"
    assert after(after(None, A), A_IN_OTHER_WORDS).brought(A_IN_OTHER_WORDS) == 1
    stored = decode_from_config_map(encode_for_config_map(back))
    assert stored is not None
    assert stored.brought(A_RENAMED) == 5, "who has just started knows no better"
    assert after(stored, A_RENAMED, B, A).brought(B) == 5
    assert after(back, A_RENAMED, B, above=8).brought(B) == 9, "pods hold a list that nobody here knows"


def test_who_comes_to_a_name_that_pods_serve_alike_is_told_for_they_will_not_tell() -> None:
    first = plan_list(None, [served(A), served(B)], deployment=OWNER, above=0)
    passed_on = plan_list(first, [served(A), served(B_OF_C)], deployment=OWNER, above=0)
    assert names_passed_on(first, passed_on) == [tuple(B_OF_C.adapter.split("/"))]
    other_content = plan_list(passed_on, [served(A2), served(B_OF_C)], deployment=OWNER, above=0)
    assert names_passed_on(passed_on, other_content) == [], "pods tell of that"
    assert names_passed_on(None, first) == names_passed_on(first, first) == []


def packed(body: Any) -> str:
    return base64.b64encode(gzip.compress(json.dumps(body).encode(), mtime=0)).decode()


GOOD = json.loads(encode(listed(A)))
HEADER_ONLY = gzip.compress(b"")[:10]
BROKEN: dict[str, str] = {
    "empty": "",
    "no base64": "%%%",
    "no gzip": base64.b64encode(b"plain").decode(),
    "cut gzip": base64.b64encode(gzip.compress(b"x" * 1000)[:-12]).decode(),
    "gzip with a broken body": base64.b64encode(HEADER_ONLY + b"\xff" * 40).decode(),
    "no JSON": base64.b64encode(gzip.compress(b"{")).decode(),
    "no UTF-8": base64.b64encode(gzip.compress(b"\xff\xfe{}")).decode(),
    "a list": packed([]),
    "null": packed(None),
    "no modules": packed({k: v for k, v in GOOD.items() if k != "modules"}),
    "modules that are none": packed(GOOD | {"modules": ["sql"]}),
    "a module without a path": packed(GOOD | {"modules": [{"name": "a"}]}),
    "a generation that is no number": packed(GOOD | {"generation": "x"}),
    "a generation without end": packed(GOOD | {"generation": float("inf")}),
    "depth without end": base64.b64encode(gzip.compress(b'{"modules":' + b"[" * 200_000)).decode(),
    "more than any list has, packed well": base64.b64encode(gzip.compress(b" " * (33 * 2**20))).decode(),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_list_is_none(case: str) -> None:
    assert decode_from_config_map(BROKEN[case]) is None


@given(st.binary(max_size=60))
def test_no_bytes_whatever_end_a_reconcile(data: bytes) -> None:
    decode_from_config_map(base64.b64encode(data).decode())
    decode_from_config_map(base64.b64encode(HEADER_ONLY + data).decode())
    decode_from_config_map(base64.b64encode(gzip.compress(data)).decode())
    decode_from_config_map(base64.b64encode(HEADER_ONLY + zlib.compress(data)).decode())
