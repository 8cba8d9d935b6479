"""Who waits for a turn to download, per cache; in memory, found again after a restart by every artifact's own reconcile."""

from __future__ import annotations

from dataclasses import dataclass, field

from lora_operator.plan.turns import Ticket, order, places
from lora_operator.reconcile.store import ObjectKey

Running = dict[str, tuple[str, ...]]  # artifact → namespaces of who wants it


@dataclass
class _Queue:
    tickets: dict[str, Ticket] = field(default_factory=dict)
    starting: dict[str, tuple[str, ...]] = field(default_factory=dict)  # their Jobs are being created
    ahead: dict[str, int] = field(default_factory=dict)
    of: tuple[object, ...] | None = None  # what `ahead` was computed from, but for the tickets


class Turns:
    """The queues of all caches."""

    def __init__(self) -> None:
        self._queues: dict[ObjectKey, _Queue] = {}

    def ahead(self, cache: ObjectKey, ticket: Ticket, running: Running, *, limit: int) -> int:
        """How many are ahead of the ticket's artifact, which now waits if it did not; 0: it may start."""
        queue = self._queues.setdefault(cache, _Queue())
        if queue.tickets.get(ticket.artifact) != ticket:
            queue.tickets[ticket.artifact] = ticket
            queue.of = None
        busy = running | queue.starting
        present = (tuple(sorted(busy.items())), limit)
        if queue.of != present:
            waiting = [found for name, found in queue.tickets.items() if name not in busy]
            queue.ahead = dict(places(order(waiting, list(busy.values())), free=limit - len(busy)))
            queue.of = present
        return queue.ahead.get(ticket.artifact, 0)

    def start(self, cache: ObjectKey, artifact: str) -> None:
        """Its Job is being created: it waits no longer, and takes a place."""
        queue = self._queues.setdefault(cache, _Queue())
        ticket = queue.tickets.pop(artifact, None)
        queue.starting[artifact] = ticket.namespaces if ticket else ()
        queue.of = None

    def starting(self, cache: ObjectKey) -> int:
        """How many Jobs are being created."""
        queue = self._queues.get(cache)
        return len(queue.starting) if queue is not None else 0

    def started(self, cache: ObjectKey, artifact: str) -> None:
        """Its Job exists by now, or can't be made."""
        queue = self._queues.get(cache)
        if queue is not None and queue.starting.pop(artifact, None) is not None:
            queue.of = None

    def leave(self, artifact: ObjectKey) -> None:
        """It does not wait: it is gone, is done, or waits for something else."""
        for (namespace, _), queue in self._queues.items():
            if namespace == artifact[0] and queue.tickets.pop(artifact[1], None) is not None:
                queue.of = None

    def next(self, cache: ObjectKey, count: int) -> list[str]:
        """The artifacts at the head, by what was computed last: to be looked at when a Job has ended."""
        queue = self._queues.get(cache)
        if queue is None:
            return []
        waiting = [name for name in queue.tickets if name in queue.ahead]
        return sorted(waiting, key=lambda name: (queue.ahead[name], queue.tickets[name]))[:count]

    def heads(self, namespace: str) -> list[str]:
        """The artifact at the head of each of a namespace's queues."""
        return [name for cache in self._queues if cache[0] == namespace for name in self.next(cache, 1)]
