"""Turns to download: as many as may, nobody twice, nobody for ever, and no namespace at the cost of another."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from lora_operator.plan.turns import Ticket, describe_ahead, order, places
from tests.unit.builders import NOW

NAMESPACES = ("team-a", "team-b", "team-c")
_namespaces = st.lists(st.sampled_from(NAMESPACES), min_size=1, max_size=3, unique=True).map(lambda x: tuple(sorted(x)))
_waiting = st.lists(st.tuples(st.integers(0, 5), _namespaces), max_size=30).map(
    lambda rows: [Ticket(NOW + timedelta(seconds=s), f"a{n}", of) for n, (s, of) in enumerate(rows)]
)
_running = st.lists(_namespaces, max_size=5)


def ticket(name: str, *namespaces: str, at: int = 0) -> Ticket:
    return Ticket(NOW + timedelta(seconds=at), name, namespaces)


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
    left, found = sorted(waiting), list[Ticket]()
    served = Counter(namespace for of in running for namespace in of)
    turn, count = dict(last), max(last.values(), default=0)
    while left:
        heads = {namespace: ticket for ticket in reversed(left) for namespace in ticket.namespaces}
        chosen = heads[min(heads, key=lambda name: (served[name], turn.get(name, 0), heads[name], name))]
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
    assert sorted(order(waiting, running)) == sorted(waiting)
    assert order(list(reversed(waiting)), running) == order(waiting, running), "whatever order they came in"


@given(_waiting, _running)
def test_within_a_namespace_it_goes_by_age(waiting: list[Ticket], running: list[tuple[str, ...]]) -> None:
    for namespace in NAMESPACES:
        alone = [found for found in order(waiting, running) if found.namespaces == (namespace,)]
        assert alone == sorted(alone)


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
