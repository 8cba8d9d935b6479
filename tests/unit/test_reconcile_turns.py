"""Turns as reconcilers take them: one by one, never more at once than may run, and nobody is forgotten."""

from __future__ import annotations

import time
from datetime import timedelta

from lora_operator.plan.fair_share import Ticket
from lora_operator.reconcile.turns import Running, Turns
from tests.unit.builders import NOW

CACHE = ("serving", "default")


def ticket(name: str, namespace: str = "team-a", at: int = 0) -> Ticket:
    return Ticket(NOW + timedelta(seconds=at), name, (namespace,))


def test_no_more_start_than_may_though_their_jobs_are_not_seen_yet() -> None:
    turns = Turns()
    assert turns.ahead(CACHE, ticket("a"), {}, limit=2) == 0
    turns.start(CACHE, "a")
    assert turns.ahead(CACHE, ticket("b", at=1), {}, limit=2) == 0
    turns.start(CACHE, "b")
    assert turns.ahead(CACHE, ticket("c", at=2), {}, limit=2) == 1
    assert turns.ahead(CACHE, ticket("d", at=3), {}, limit=2) == 2
    assert turns.starting(CACHE) == 2
    running: Running = {"a": ("team-a",), "b": ("team-a",)}
    turns.started(CACHE, "a")
    turns.started(CACHE, "b")
    assert turns.ahead(CACHE, ticket("c", at=2), running, limit=2) == 1
    assert turns.next(CACHE, 1) == ["c"]
    assert turns.heads("serving") == ["c"]
    del running["a"]
    assert turns.ahead(CACHE, ticket("d", at=3), running, limit=2) == 1
    assert turns.ahead(CACHE, ticket("c", at=2), running, limit=2) == 0


def test_who_leaves_is_waited_for_no_longer_and_caches_have_queues_of_their_own() -> None:
    turns = Turns()
    for place, name in enumerate("abc"):
        turns.ahead(CACHE, ticket(name, at=place), {"x": ("team-b",)}, limit=1)
    assert turns.ahead(CACHE, ticket("c", at=2), {"x": ("team-b",)}, limit=1) == 3
    turns.leave(("serving", "a"))
    turns.leave(("elsewhere", "b"))
    assert turns.ahead(CACHE, ticket("c", at=2), {"x": ("team-b",)}, limit=1) == 2
    assert turns.ahead(("serving", "second"), ticket("d"), {}, limit=1) == 0


def test_a_limit_that_is_raised_lets_more_start() -> None:
    turns = Turns()
    for place, name in enumerate("abc"):
        turns.ahead(CACHE, ticket(name, at=place), {"x": ("team-b",)}, limit=1)
    assert turns.ahead(CACHE, ticket("b", at=1), {"x": ("team-b",)}, limit=3) == 0


def test_the_head_is_whose_turn_it_is_though_it_came_last() -> None:
    turns = Turns()
    running: Running = {"x": ("team-a",)}
    assert turns.ahead(CACHE, ticket("x"), {}, limit=1) == 0
    turns.start(CACHE, "x")
    turns.started(CACHE, "x")
    for place, name in enumerate("abc"):
        turns.ahead(CACHE, ticket(name, at=place), running, limit=1)
    assert turns.ahead(CACHE, ticket("z", "team-b", at=9), running, limit=1) == 4, "until somebody looks again"
    assert turns.next(CACHE, 1) == ["z"]
    assert turns.ahead(CACHE, ticket("z", "team-b", at=9), running, limit=1) == 1
    assert turns.ahead(CACHE, ticket("z", "team-b", at=9), {}, limit=1) == 0, "the other namespace had its turn"


def test_who_is_next_is_found_by_what_still_runs() -> None:
    turns = Turns()
    running: Running = {"x": ("team-a",), "y": ("team-b",)}
    for name, namespace, at in (("a0", "team-a", 0), ("c0", "team-c", 9)):
        turns.ahead(CACHE, ticket(name, namespace, at=at), running, limit=2)
    assert turns.next(CACHE, 1, running) == ["c0"]
    del running["x"]
    assert turns.next(CACHE, 1, running) == ["a0"], "its namespace has none now, and it waits longer"
    assert turns.ahead(CACHE, ticket("a0"), running, limit=2) == 0


def test_a_place_is_kept_for_a_namespace_that_has_none() -> None:
    turns = Turns()
    turns.use(CACHE, "warm", ("team-b",))
    busy: Running = {f"x{n}": ("team-a",) for n in range(3)}
    assert turns.ahead(CACHE, ticket("a0"), busy, limit=4) == 1
    assert turns.ahead(CACHE, ticket("a0"), busy, limit=4) == 1
    assert turns.ahead(CACHE, ticket("b0", "team-b", at=9), busy, limit=4) == 0
    turns.leave(("serving", "b0"))
    turns.forget(("serving", "warm"))
    assert turns.ahead(CACHE, ticket("a0"), busy, limit=4) == 0, "nobody else uses the cache"


def test_a_thousand_that_come_at_once_cost_little() -> None:
    turns = Turns()
    for n in range(100):
        turns.use(CACHE, f"warm{n}", (f"team-{n}",))
    running: Running = {"x": ("team-0",)}
    began = time.process_time()
    for n in range(1000):
        turns.ahead(CACHE, ticket(f"a{n}", f"team-{n % 100}", at=n), running, limit=1)
    assert time.process_time() - began < 1, "seconds of this process; an order each would take a minute"
    assert sorted(
        turns.ahead(CACHE, ticket(f"a{n}", f"team-{n % 100}", at=n), running, limit=1) for n in range(1000)
    ) == list(range(1, 1001))


def test_a_thousand_that_may_not_take_the_last_place_cost_little() -> None:
    turns = Turns()
    turns.use(CACHE, "warm", ("team-b",))
    running: Running = {f"x{n}": ("team-a",) for n in range(15)}
    began = time.process_time()
    for n in range(1000):
        assert turns.ahead(CACHE, ticket(f"a{n}", at=n), running, limit=16)
    assert time.process_time() - began < 1, "seconds of this process; an order each would take longer"


def test_one_whose_pass_fails_while_its_job_is_made_gives_its_place_back() -> None:
    turns = Turns()
    turns.ahead(CACHE, ticket("a"), {}, limit=1)
    turns.start(CACHE, "a")
    assert turns.ahead(CACHE, ticket("b", at=1), {}, limit=1) == 1
    turns.give_up(("elsewhere", "a"))
    assert turns.starting(CACHE) == 1
    turns.give_up(("serving", "a"))
    assert turns.starting(CACHE) == 0
    assert turns.next(CACHE, 1, {}) == ["b"]
    assert turns.ahead(CACHE, ticket("b", at=1), {}, limit=1) == 0
