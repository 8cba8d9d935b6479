"""What a view of an engine shows, made of what its plugin reports and what the engine itself lists."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lora_operator.plan.adapter_list import ModuleList
from lora_operator.plan.deployment_pods import PodView, Served, too_old_message
from lora_operator.plan.engine_view import (
    MINIMUM_VERSIONS,
    build_view,
    changed_names,
    holds,
    is_at_rest,
    list_for,
    parse_version,
)
from lora_operator.wire.plugin import (
    FailedAdapter,
    LoadedAdapter,
    PluginState,
    RetiredContent,
    ServedModel,
    WaitingAdapter,
)
from tests.unit.builders import make_module, make_view

SQL = make_module()
OLD = make_module(path="/model-cache/artifacts/older")


def loaded(name: str, internal: str | None = None, path: str = SQL.path) -> LoadedAdapter:
    return LoadedAdapter(name=name, internal_name=internal or name, path=path, base_model_name="meta/Llama")


def model(name: str, root: str | None = SQL.path, parent: str | None = "meta/Llama") -> ServedModel:
    return ServedModel(id=name, root=root, parent=parent)


def state(*adapters: LoadedAdapter, **more: object) -> PluginState:
    values: dict[str, object] = {
        "kit": "k",
        "vllm_version": "0.32.0",
        "list_generation": 4,
        "settled": True,
        "loaded": adapters,
        "failures": (),
        "retired": (),
        "atomic_swap": True,
    }
    return PluginState(**(values | more))  # type: ignore[arg-type]


BASE = (model("meta/Llama", "/model-cache/artifacts/b", None), model("llama", "/model-cache/artifacts/b", None))


def view(said: PluginState, *models: ServedModel) -> PodView:
    return build_view("uid", "container", said, (*BASE, *models), served_names=("meta/Llama", "llama"))


def test_a_view_has_public_names_with_what_the_engine_itself_lists() -> None:
    seen = view(state(loaded("sql", "sql@fedcba98.4")), model("sql@fedcba98.4"))
    assert seen.served == {"sql": Served(SQL.path, "meta/Llama", "sql@fedcba98.4")}
    assert (seen.list_generation, seen.settled, seen.guarded, seen.orphans) == (4, True, True, ())


def test_what_the_plugin_claims_and_the_engine_does_not_list_is_not_served() -> None:
    assert view(state(loaded("sql"))).served == {}


def test_the_engines_word_on_path_and_lineage_counts_and_not_the_plugins() -> None:
    seen = view(state(loaded("sql")), model("sql", "/elsewhere", "llama"))
    assert seen.served["sql"] == Served("/elsewhere", "llama", "sql")


@pytest.mark.parametrize("internal", ["sql", "sql@fedcba98.4"])
def test_what_a_first_request_loads_between_the_two_questions_is_served_and_no_orphan(internal: str) -> None:
    waits_for = state(waiting=(WaitingAdapter("sql", SQL.path), WaitingAdapter("chat", OLD.path)))
    seen = view(waits_for, model(internal))
    assert seen.served == {"sql": Served(SQL.path, "meta/Llama", internal)}
    assert (seen.waiting, seen.orphans) == ({"chat": OLD.path}, ())
    other = view(waits_for, model(internal, "/elsewhere"))
    assert (other.served, other.orphans) == ({}, (internal,)), "of that name, but other content"


def test_what_the_engine_lists_and_the_plugin_does_not_know_is_an_orphan() -> None:
    seen = view(state(loaded("sql")), model("sql"), model("zombie"), model("ghost"))
    assert seen.orphans == ("ghost", "zombie")


def test_the_base_models_names_are_none() -> None:
    assert view(state()).orphans == ()


def test_failures_are_by_public_name() -> None:
    failure = FailedAdapter(name="sql", path="/x", stage="engine", message="no")
    assert view(state(failures=(failure,))).failures == {"sql": "no"}


def test_retired_content_is_not_served() -> None:
    retired = RetiredContent(internal_name="sql", path="/x", running=True)
    assert view(state(retired=(retired,))).served == {}


VERSIONS = {"0.32.0": False, "0.26.0": False, "0.25.1": True, "0.9.2": True, "1.0.0": False, "dev": False}


@pytest.mark.parametrize("version", VERSIONS)
def test_engines_that_are_too_old_for_hot_loading(version: str) -> None:
    assert view(state(vllm_version=version)).too_old is VERSIONS[version]


def test_a_name_that_became_plain_between_the_two_questions_is_served_and_no_orphan() -> None:
    seen = view(state(loaded("sql", "sql@fedcba98.4")), model("sql"))
    assert seen.served == {"sql": Served(SQL.path, "meta/Llama", "sql@fedcba98.4")}
    assert seen.orphans == ()


def test_what_waits_for_its_first_request_is_told() -> None:
    seen = view(state(waiting=(WaitingAdapter(name="sql", path="/x"),), list_digest="abc"))
    assert (seen.waiting, seen.list_digest, seen.served) == ({"sql": "/x"}, "abc", {})


ROLLING = {"0.32.0": False, "0.18.1": False, "0.10.0": False, "0.9.2": True, "dev": False}


@pytest.mark.parametrize("version", ROLLING)
def test_a_pod_that_is_never_hot_loaded_may_be_older(version: str) -> None:
    seen = view(state(vllm_version=version, update_strategy="Rollout"))
    assert seen.too_old is ROLLING[version]
    assert seen.update_strategy == "Rollout"
    assert too_old_message(seen) == f"vLLM {version} is too old: use 0.10 or newer"


@pytest.mark.parametrize(
    ("text", "version", "hot"),
    [
        ("0.32.0", (0, 32, 0), True),
        ("v0.26", (0, 26), True),
        ("0.26.1rc2", (0, 26, 1), True),
        ("0.25.9", (0, 25, 9), False),
        ("0.11.2+cpu", (0, 11, 2), False),
        ("1.0.0", (1, 0, 0), True),
        ("dev", None, None),
        ("0.1.dev12+gabcdef", None, None),  # a clone without tags
        ("0.0.0", None, None),
        ("", None, None),
    ],
)
def test_versions_are_compared_as_numbers(text: str, version: tuple[int, ...] | None, hot: bool | None) -> None:
    assert parse_version(text) == version
    if version is not None:
        assert (version >= MINIMUM_VERSIONS["HotLoad"]) is hot


# What a pod is sent, and what its view is news to


def test_each_pod_is_sent_what_it_preloads_and_the_rest_lazily() -> None:
    pods = {"llama-0", "llama-1", "llama-2"}
    modules = ModuleList("serving/llama", 4, (make_module(preload=1), make_module("chat", lazy=True)))
    sent = {pod: list_for(modules, pod, pods) for pod in pods}
    for one in sent.values():
        assert one is not None
        assert (one.generation, [module.preload for module in one.modules]) == (4, [0, 0])
        assert one.modules[1].lazy
    assert sum(one is not None and not one.modules[0].lazy for one in sent.values()) == 1
    plain = ModuleList("serving/llama", 4, (make_module(),))
    assert list_for(plain, "llama-0", pods) is plain
    assert list_for(None, "llama-0", pods) is None


@pytest.mark.parametrize(
    ("generation", "digest", "same"), [(4, None, True), (4, "own", True), (4, "other", False), (3, "own", False)]
)
def test_a_plugin_without_a_digest_knows_one_list_per_generation(
    generation: int, digest: str | None, same: bool
) -> None:
    modules = ModuleList("serving/llama", 4, (make_module(),))
    held = state(list_generation=generation, list_digest=modules.digest if digest == "own" else digest)
    assert holds(held, modules) is same


BUSY = {
    "nothing": ({}, True),
    "not all tried yet": ({"settled": False}, False),
    "one that waits for its first request": ({"waiting": {"sql": "/x"}}, False),
    "a failure": ({"failures": {"sql": "no"}}, False),
    "content that requests may use": ({"retired": ("/x",)}, False),
    "no answer": ({"error": "no answer"}, False),
}


@pytest.mark.parametrize("case", BUSY)
def test_a_pod_is_at_rest_with_nothing_that_its_list_of_models_would_not_show(case: str) -> None:
    more, expected = BUSY[case]
    assert is_at_rest(replace(make_view(SQL), **more)) is expected  # type: ignore[arg-type]


NEWS = {
    "nothing": ({}, set()),
    "another path": ({"served": {"sql": Served("/other", "meta/Llama", "sql")}}, {"sql"}),
    "a failure of another name": ({"failures": {"chat": "no"}}, {"chat"}),
    "one more that waits": ({"waiting": {"lazy": "/x"}}, {"lazy"}),
    "another error": ({"error": "no answer"}, None),
    "another guard": ({"guarded": False}, None),
}


@pytest.mark.parametrize("case", NEWS)
def test_a_view_is_news_to_the_names_that_it_shows_otherwise(case: str) -> None:
    more, expected = NEWS[case]
    old = make_view(SQL)
    assert changed_names(old, replace(old, **more), None) == expected  # type: ignore[arg-type]
    assert changed_names(None, old, None) is None
    assert changed_names(old, None, None) is None


def test_an_acknowledged_list_is_news_to_the_names_that_it_brought() -> None:
    old, new = (replace(make_view(), list_generation=generation) for generation in (3, 4))
    modules = ModuleList("serving/llama", 4, (make_module("chat"), make_module()), since={"chat": 2})
    assert changed_names(old, new, modules) == {"sql"}
