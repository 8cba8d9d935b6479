"""Turns to download: as many as may, nobody twice, nobody for ever, and no namespace at the cost of another."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_operator.plan.fair_share import Ticket, describe_ahead, free_places, order, places
from tests.unit.builders import NOW

NAMESPACES = ("team-a", "team-b", "team-c")
_namespaces = st.lists(st.sampled_from(NAMESPACES), min_size=1, max_size=3, unique=True).map(lambda x: tuple(sorted(x)))
_waiting = st.lists(st.tuples(st.integers(0, 5), _namespaces, st.booleans()), max_size=30).map(
    lambda rows: [Ticket(NOW + timedelta(seconds=s), f"a{n}", of, adapter) for n, (s, of, adapter) in enumerate(rows)]
)
_running = st.lists(_namespaces, max_size=5)


def ticket(name: str, *namespaces: str, at: int = 0, adapter: bool = True) -> Ticket:
    return Ticket(NOW + timedelta(seconds=at), name, namespaces, adapter)


def place(of: Ticket) -> Any:
    return of.place


def names(waiting: list[Ticket], *running: tuple[str, ...]) -> list[str]:
    return [found.artifact for found in order(waiting, running)]


def test_namespaces_take_turns_though_one_asked_first_for_all() -> None:
    crowd = [ticket(f"a{n}", "team-a", at=n) for n in range(4)]
    assert names([*crowd, ticket("b0", "team-b", at=50), ticket("b1", "team-b", at=51)]) == [
        "a0",
        "b0",
        "a1",
        "b1",
        "a2",
        "a3",
    ]


def test_what_a_fleet_waits_for_goes_before_adapters_of_its_namespace_and_no_other() -> None:
    crowd = [ticket(f"a{n}", "team-a", at=n) for n in range(3)]
    base = ticket("base", "team-a", at=50, adapter=False)
    assert names([*crowd, base]) == ["base", "a0", "a1", "a2"]
    assert names([*crowd, base], ("team-a",)) == ["base", "a0", "a1", "a2"]
    assert names([base, ticket("b0", "team-b", at=60), ticket("b1", "team-b", at=61)]) == ["base", "b0", "b1"]
    assert names([base, ticket("b0", "team-b", at=60)], ("team-a",)) == ["b0", "base"]


A, B = ("team-a",), ("team-b",)
FREE: dict[str, tuple[int, list[tuple[str, ...]], list[Ticket], tuple[str, ...], int]] = {
    "the last place is kept for who may come": (4, [A, A], [ticket("a0", *A), ticket("a1", *A)], ("team-b",), 1),
    "nobody else may come": (4, [A, A], [ticket("a0", *A), ticket("a1", *A)], ("team-a",), 2),
    "who has none takes it": (4, [A, A, A], [ticket("b0", *B)], ("team-b",), 1),
    "who has none takes it with another": (4, [A, A, A], [ticket("x", "team-a", "team-b")], ("team-b",), 1),
    "others have places already": (4, [A, A, B], [ticket("a0", *A)], ("team-b", "team-c"), 1),
    "others' Jobs are this one's too": (4, [A, ("team-a", "team-b"), A], [ticket("a0", *A)], ("team-c",), 0),
    "of two places half would lie idle": (2, [A], [ticket("a0", *A)], ("team-b",), 1),
    "nothing runs": (3, [], [ticket(f"a{n}", *A) for n in range(5)], ("team-b",), 2),
    "more run than may": (3, [A] * 5, [ticket("a0", *A)], ("team-b",), 0),
    "places that nobody waits for are free": (4, [A], [ticket("a0", *A)], ("team-b",), 3),
}


@pytest.mark.parametrize("case", FREE)
def test_no_namespace_holds_all_places(case: str) -> None:
    limit, running, ordered, users, free = FREE[case]
    assert free_places(ordered, running, users, limit=limit) == free


def test_what_runs_counts() -> None:
    waiting = [ticket("a0", "team-a"), ticket("b0", "team-b", at=9)]
    assert names(waiting, ("team-a",), ("team-a",)) == ["b0", "a0"]
    assert names(waiting, ("team-c",)) == ["a0", "b0"]


def test_namespaces_take_turns_where_one_job_runs_at_a_time() -> None:
    waiting = [ticket("a1", "team-a", at=1), ticket("a2", "team-a", at=2), ticket("b0", "team-b", at=9)]
    assert [found.artifact for found in order(waiting, [], {"team-a": 1})] == ["b0", "a1", "a2"]
    assert [found.artifact for found in order(waiting, [], {"team-a": 1, "team-b": 2})] == ["a1", "b0", "a2"]


def test_what_two_namespaces_want_is_done_once_at_the_earlier_turn() -> None:
    waiting = [ticket("a0", "team-a"), ticket("shared", "team-a", "team-b", at=1), ticket("b0", "team-b", at=2)]
    assert names(waiting) == ["a0", "shared", "b0"]


def plainly(waiting: list[Ticket], running: list[tuple[str, ...]], last: Mapping[str, int]) -> list[Ticket]:
    """The order by its definition, as slow as it may be."""
    left, found = sorted(waiting, key=place), list[Ticket]()
    served = Counter(namespace for of in running for namespace in of)
    turn, count = dict(last), max(last.values(), default=0)
    while left:
        heads = {namespace: ticket for ticket in reversed(left) for namespace in ticket.namespaces}
        chosen = heads[min(heads, key=lambda name: (served[name], turn.get(name, 0), heads[name].place, name))]
        count += 1
        served.update(chosen.namespaces)
        turn |= dict.fromkeys(chosen.namespaces, count)
        left.remove(chosen)
        found.append(chosen)
    return found


@given(_waiting, _running, st.dictionaries(st.sampled_from(NAMESPACES), st.integers(1, 9)))
def test_the_order_is_that_of_its_definition(
    waiting: list[Ticket], running: list[tuple[str, ...]], last: dict[str, int]
) -> None:
    assert order(waiting, running, last) == plainly(waiting, running, last)


def test_five_thousand_of_a_thousand_namespaces_hold_nobody_up() -> None:
    crowd = [ticket(f"a{n:05}", f"team-{n % 1000:04}", at=n) for n in range(5000)]
    began = time.process_time()
    assert len(order(crowd, [("team-0000",)] * 16)) == 5000
    assert time.process_time() - began < 0.3, "seconds of this process; three of them with a look at each namespace"


@given(_waiting, _running)
def test_everybody_is_served_once(waiting: list[Ticket], running: list[tuple[str, ...]]) -> None:
    assert sorted(order(waiting, running), key=place) == sorted(waiting, key=place)
    assert order(list(reversed(waiting)), running) == order(waiting, running), "whatever order they came in"


@given(_waiting, _running)
def test_within_a_namespace_what_fleets_wait_for_goes_first_and_then_it_goes_by_age(
    waiting: list[Ticket], running: list[tuple[str, ...]]
) -> None:
    for namespace in NAMESPACES:
        alone = [found for found in order(waiting, running) if found.namespaces == (namespace,)]
        assert alone == sorted(alone, key=place)


@given(_waiting, _running)
def test_no_place_goes_to_a_namespace_that_has_more_than_one_that_waits(
    waiting: list[Ticket], running: list[tuple[str, ...]]
) -> None:
    served = Counter(namespace for of in running for namespace in of)
    left = order(waiting, running)
    while left:
        chosen, *rest = left
        least = min(served[namespace] for found in left for namespace in found.namespaces)
        assert min(served[namespace] for namespace in chosen.namespaces) == least
        served.update(chosen.namespaces)
        left = rest


@given(_waiting, st.integers(-2, 10))
def test_as_many_start_as_there_are_free_places(waiting: list[Ticket], free: int) -> None:
    found = places(order(waiting, []), free=free)
    assert sum(1 for ahead in found.values() if ahead == 0) == min(len(waiting), max(0, free))
    assert sorted(ahead for ahead in found.values() if ahead) == list(
        range(1, 1 + len(waiting) - min(len(waiting), max(0, free)))
    )


def test_a_thousand_that_wait_are_told_seldom() -> None:
    texts = {describe_ahead(n) for n in range(1, 1001)}
    assert len(texts) <= 20
    assert describe_ahead(3) == "3"
    assert describe_ahead(199) == "at least 100"
    assert describe_ahead(10) == "at least 10"
