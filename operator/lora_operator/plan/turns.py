"""Whose turn it is to download, where a cache runs so many Jobs at once: the namespaces that want content take turns."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Final

_EXACT: Final = 10
_STEPS: Final = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


@dataclass(frozen=True, order=True)
class Ticket:
    """One artifact that could start now, but for its turn."""

    since: datetime
    artifact: str
    namespaces: tuple[str, ...]  # of who wants it, sorted; never empty


def order(
    waiting: Iterable[Ticket], running: Collection[tuple[str, ...]], last: Mapping[str, int] = MappingProxyType({})
) -> list[Ticket]:
    """The order in which `waiting` start; `running` are the namespaces behind each Job that runs.

    Each place goes to the namespace that has the fewest Jobs by then, those that run counted too; of equal ones to the one whose turn
    was longest ago by `last` (a number that grows with every turn), then to the one that waits longest. Within a namespace it goes by age. An artifact that several namespaces want counts for each of them: it costs
    nobody more than one of their own would.
    """
    queues: dict[str, deque[Ticket]] = {}
    for ticket in sorted(waiting):
        for namespace in ticket.namespaces:
            queues.setdefault(namespace, deque()).append(ticket)
    served = dict.fromkeys(queues, 0)
    for namespaces in running:
        for namespace in namespaces:
            if namespace in served:
                served[namespace] += 1
    turn = dict(last)
    count = max(turn.values(), default=0)
    found: list[Ticket] = []
    taken: set[str] = set()
    while queues:
        for namespace in [name for name, queue in queues.items() if _drop_taken(queue, taken)]:
            del queues[namespace]
        if not queues:
            break
        chosen = min(queues, key=lambda name: (served[name], turn.get(name, 0), queues[name][0], name))
        ticket = queues[chosen].popleft()
        taken.add(ticket.artifact)
        found.append(ticket)
        count += 1
        for namespace in ticket.namespaces:
            served[namespace] += 1
            turn[namespace] = count
    return found


def places(ordered: Iterable[Ticket], *, free: int) -> Mapping[str, int]:
    """How many are ahead of each artifact before it may start; 0: it is its turn."""
    return {ticket.artifact: max(0, place - max(free, 0) + 1) for place, ticket in enumerate(ordered)}


def describe_ahead(ahead: int) -> str:
    """A number for a message that is not to change with every Job that ends: exact to ten, then at least so many."""
    if ahead < _EXACT:
        return str(ahead)
    return f"at least {max(step for step in _STEPS if step <= ahead)}"


def _drop_taken(queue: deque[Ticket], taken: set[str]) -> bool:
    """Removes what another namespace's turn has taken from the front; whether nothing is left."""
    while queue and queue[0].artifact in taken:
        queue.popleft()
    return not queue
