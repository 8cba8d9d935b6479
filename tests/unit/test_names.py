"""Names: deterministic, valid for Kubernetes, and different where the things are different."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_operator import names
from lora_operator.constants import LABEL_ARTIFACT, LABEL_COMPONENT, LABEL_DEPLOYMENT, LABEL_MANAGED_BY

DNS_SUBDOMAIN = re.compile(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$")
LABEL = re.compile(r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$")
object_names = st.from_regex(
    r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?){0,3}", fullmatch=True
)


@pytest.mark.parametrize(
    ("quantity", "size"),
    [
        (None, None),
        (5, 5),
        ("0", 0),
        ("1.5Ki", 1536),
        ("10Gi", 10 * 2**30),
        ("3G", 3 * 10**9),
        ("1e3", 1000),
        ("2E", 2 * 10**18),
        ("0.1", 1),
        ("1e99", names.MAX_SIZE),
        ("1e100", names.MAX_SIZE),
        ("1e9999999999999999999999999999", names.MAX_SIZE),
        ("9" * 32, names.MAX_SIZE),
        ("0e100", 0),
        (-1, 0),
        (10**40, names.MAX_SIZE),
    ],
)
def test_sizes_as_kubernetes_writes_them(quantity: int | str | None, size: int | None) -> None:
    assert names.parse_size(quantity) == size


@pytest.mark.parametrize("quantity", ["", "-1", "10GiB", "1e3Gi", "ten"])
def test_what_is_no_size(quantity: str) -> None:
    with pytest.raises(ValueError, match="is no size like 10Gi"):
        names.parse_size(quantity)


@pytest.mark.parametrize(("text", "seconds"), [("1h30m", 5400), ("90s", 90), ("1.5h", 5400), (None, None), ("", None)])
def test_durations(text: str | None, seconds: float | None) -> None:
    assert names.parse_duration(text) == seconds


def test_a_hash_is_of_the_value_and_not_of_its_spelling() -> None:
    assert names.short_hash({"a": 1, "b": [1, 2]}) == names.short_hash({"b": [1, 2], "a": 1})
    assert names.short_hash([1, 2]) != names.short_hash([2, 1])
    assert re.fullmatch(r"[0-9a-f]{10}", names.short_hash("ü"))
    # Names of objects in clusters follow from this very value: it may never change.
    assert names.short_hash({"a": 1}) == "015abd7f5c"


def test_long_names_that_begin_alike_stay_different() -> None:
    first, second = names.bounded("a" * 80 + "x", 63), names.bounded("a" * 80 + "y", 63)
    assert first != second
    assert len(first) == len(second) == 63
    assert names.bounded("short", 63) == "short"


@given(object_names)
def test_a_bounded_name_is_a_name(name: str) -> None:
    for limit in (20, 63):
        bounded = names.bounded(name, limit)
        assert len(bounded) <= limit
        assert DNS_SUBDOMAIN.match(bounded)


@given(repo=st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,40}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,50})?", fullmatch=True))
def test_an_artifacts_name_and_its_jobs_fit(repo: str) -> None:
    name = names.artifact_name(source=repo, want={"repo": repo})
    assert DNS_SUBDOMAIN.match(name)
    assert len(name) <= 51
    assert len(names.job_name(name, 10**9)) <= 63
    assert LABEL.match(names.label_value(name))


ARTIFACT_NAMES = {
    "the repository's last part makes it readable": ("org/Llama-2-7b-SQL_test.v1", "llama-2-7b-sql-test-v1-"),
    "a long one is cut": ("org/" + "x" * 90, "x" * 30 + "-"),
    "a bucket's folder too": ("s3://Models/team-a/sql", "sql-"),
    "a bucket": ("s3://models", "models-"),
    "one with nothing readable still has a name": ("org/___", "x-"),
}


@pytest.mark.parametrize("case", ARTIFACT_NAMES)
def test_artifact_name(case: str) -> None:
    repo, beginning = ARTIFACT_NAMES[case]
    assert re.fullmatch(re.escape(beginning) + "[0-9a-f]{20}", names.artifact_name(source=repo, want={}))


def test_a_job_of_a_hand_made_artifact_with_a_long_name_fits_too() -> None:
    first, second = names.job_name("a" * 253, 1), names.job_name("a" * 253, 2)
    assert len(first) <= 63
    assert first != second


REVISIONS = {
    "a full commit": ("0" * 40, True),
    "a branch": ("main", False),
    "a short commit, which may become ambiguous": ("0123abcd", False),
    "a tag of forty letters that are no hex digits": ("g" * 40, False),
}


@pytest.mark.parametrize("case", REVISIONS)
def test_is_pinned(case: str) -> None:
    revision, pinned = REVISIONS[case]
    assert names.is_pinned(revision) is pinned


def test_labels_and_the_scale_subresources_selector_say_the_same() -> None:
    labels = names.engine_labels("llama")
    assert set(labels) == {LABEL_MANAGED_BY, LABEL_COMPONENT, LABEL_DEPLOYMENT}
    assert names.engine_selector("llama") == ",".join(f"{key}={labels[key]}" for key in sorted(labels))
    assert names.fetch_labels("x")[LABEL_ARTIFACT] == "x"
    assert names.fetch_labels("x")[LABEL_COMPONENT] != labels[LABEL_COMPONENT]


@given(object_names)
def test_children_have_names_that_fit(deployment: str) -> None:
    for name in (
        names.modules_config_map(deployment),
        names.guard_secret(deployment, "uid", "token"),
        names.token_secret(deployment, "0123456789abcdef"),
        names.plugin_config_map(deployment, "0123456789"),
    ):
        assert DNS_SUBDOMAIN.match(name)
        assert len(name) <= 253


def test_two_plugins_have_two_config_maps() -> None:
    assert names.plugin_config_map("llama", "aaa") == "llama-kit-aaa"
    assert names.plugin_config_map("llama", "bbb") == "llama-kit-bbb"


SIZES: dict[str, tuple[int, str]] = {
    "nothing": (0, "0"),
    "bytes": (512, "512"),
    "the last byte before a unit": (1023, "1023"),
    "a round unit has no .0": (1024, "1Ki"),
    "one digit below ten": (int(3.2 * 2**30), "3.2Gi"),
    "none from ten on": (128 * 2**20 + 1, "128Mi"),
    "terabytes": (3 * 2**40, "3Ti"),
    "a unit that is nearly full is the next one": (2**20 - 1, "1Mi"),
}


@pytest.mark.parametrize("case", SIZES)
def test_format_size(case: str) -> None:
    size, text = SIZES[case]
    assert names.format_size(size) == text


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)
    )
)
def test_a_hash_is_stable(value: Any) -> None:
    assert names.short_hash(value) == names.short_hash(value)
