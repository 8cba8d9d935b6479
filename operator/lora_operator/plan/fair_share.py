"""Whose turn it is to download, where a cache runs so many Jobs at once: the namespaces that want content take turns."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from heapq import heapify, heappop, heapreplace
from types import MappingProxyType
from typing import Final

FEWEST_TO_KEEP_ONE: Final = 3
_EXACT: Final = 10
_STEPS: Final = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


@dataclass(frozen=True)
class Ticket:
    """One artifact that could start now, but for its turn."""

    since: datetime
    artifact: str
    namespaces: tuple[str, ...]  # of who wants it, sorted; never empty
    adapter: bool = True  # else a whole deployment waits for it: a base model, tokenizer or draft model

    @property
    def place(self) -> tuple[bool, datetime, str, tuple[str, ...]]:
        """What it is put in order by: what deployments wait for first, then by age."""
        return (self.adapter, self.since, self.artifact, self.namespaces)


def order(
    waiting: Iterable[Ticket], running: Collection[tuple[str, ...]], last: Mapping[str, int] = MappingProxyType({})
) -> list[Ticket]:
    """The order in which `waiting` start; `running` are the namespaces behind each Job that runs.

    Each place goes to the namespace that has the fewest Jobs by then, those that run counted too; of equal ones to the one whose turn
    was longest ago by `last` (a number that grows with every turn), then to the one whose first ticket comes first by its `place`.
    Within a namespace it goes by that too. An artifact that several namespaces want counts for each of them: it costs nobody more than one of their own would.
    """
    queues: dict[str, deque[Ticket]] = {}
    for ticket in sorted(waiting, key=lambda ticket: ticket.place):
        for namespace in ticket.namespaces:
            queues.setdefault(namespace, deque()).append(ticket)
    served = Counter(namespace for namespaces in running for namespace in namespaces)
    turn = dict(last)
    count = max(turn.values(), default=0)

    def claim(namespace: str) -> tuple[object, ...]:
        return (served[namespace], turn.get(namespace, 0), queues[namespace][0].place, namespace)

    # A claim only ever gets later, so what lies in the heap is at worst too early: it is looked at anew when it comes up.
    heap = [claim(namespace) for namespace in queues]
    heapify(heap)
    found: list[Ticket] = []
    taken: set[str] = set()
    while heap:
        namespace = str(heap[0][-1])
        queue = queues[namespace]
        while queue and queue[0].artifact in taken:  # by another namespace's turn
            queue.popleft()
        if not queue:
            heappop(heap)
            continue
        if (present := claim(namespace)) != heap[0]:
            heapreplace(heap, present)
            continue
        ticket = queue[0]
        taken.add(ticket.artifact)
        found.append(ticket)
        count += 1
        for each in ticket.namespaces:
            served[each] += 1
            turn[each] = count
    return found


def keeps_back(
    namespaces: tuple[str, ...], running: Collection[tuple[str, ...]], users: Iterable[str], *, limit: int
) -> bool:
    """Whether one of these namespaces may not start now, though a place is free, for it would then hold all of them.

    The last place is kept for the namespaces that have none: those of `users`, who have content in the cache. They would wait for
    hours otherwise, as a Job is not interrupted. Where less than three run at once too much would lie idle.
    """
    if limit < FEWEST_TO_KEEP_ONE or len(running) + 1 < limit:
        return False
    active = {namespace for each in running for namespace in each}
    holds_all = set(namespaces).intersection(*running)
    return bool(holds_all) and active.issuperset(namespaces) and any(user not in active for user in users)


def free_places(
    ordered: Sequence[Ticket], running: Collection[tuple[str, ...]], users: Iterable[str], *, limit: int
) -> int:
    """How many of those in order may start now."""
    free = max(0, limit - len(running))
    if not 0 < free <= len(ordered):
        return free
    *others, last = [ticket.namespaces for ticket in ordered[:free]]
    return free - keeps_back(last, [*running, *others], users, limit=limit)


def places(ordered: Iterable[Ticket], *, free: int) -> Mapping[str, int]:
    """How many are ahead of each artifact before it may start; 0: it is its turn."""
    return {ticket.artifact: max(0, place - max(free, 0) + 1) for place, ticket in enumerate(ordered)}


def describe_ahead(ahead: int) -> str:
    """A number for a message that is not to change with every Job that ends: exact to ten, then at least so many."""
    if ahead < _EXACT:
        return str(ahead)
    return f"at least {max(step for step in _STEPS if step <= ahead)}"
