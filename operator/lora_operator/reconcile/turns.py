"""Who waits for a turn to download, per cache; in memory, found again after a restart by every artifact's own reconcile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field
from heapq import nsmallest

from lora_operator.plan.fair_share import Ticket, free_places, keeps_back, order, places
from lora_operator.reconcile.store import ObjectKey

Running = dict[str, tuple[str, ...]]  # artifact → namespaces of who wants it


@dataclass
class _Queue:
    tickets: dict[str, Ticket] = field(default_factory=dict)
    starting: Running = field(default_factory=dict)  # their Jobs are being created
    busy: Running = field(default_factory=dict)  # those, and what ran at the last look
    limit: int = 0
    last: dict[str, int] = field(default_factory=dict)  # namespace → number of its last turn
    ahead: dict[str, int] = field(default_factory=dict)
    stale: bool = False  # `ahead` is of other tickets, or of other Jobs
    used: Running = field(default_factory=dict)  # all content of the cache that somebody wants, there or not
    users: Counter[str] = field(default_factory=Counter)  # namespace → how many of those

    def settle(self) -> None:
        """Find the places anew."""
        waiting = [ticket for name, ticket in self.tickets.items() if name not in self.busy]
        running = list(self.busy.values())
        ordered = order(waiting, running, self.last)
        self.ahead = dict(places(ordered, free=free_places(ordered, running, self.users, limit=self.limit)))
        self.stale = False

    def is_full_for(self, ticket: Ticket) -> bool:
        """Whether it can't start now, whoever else waits."""
        kept = keeps_back(ticket.namespaces, self.busy.values(), self.users, limit=self.limit)
        return len(self.busy) >= self.limit or kept


class Turns:
    """The queues of all caches."""

    def __init__(self) -> None:
        self._queues: dict[ObjectKey, _Queue] = {}

    def ahead(self, cache: ObjectKey, ticket: Ticket, running: Running, *, limit: int) -> int:
        """How many are ahead of the ticket's artifact, which now waits if it did not; 0: it may start.

        One that comes while no place is free for it is told that all others are ahead of it, until the next look: a thousand that
        come at once cost no thousand orders.
        """
        queue, name = self._queues.setdefault(cache, _Queue()), ticket.artifact
        new = queue.tickets.get(name) != ticket
        queue.tickets[name] = ticket
        busy = running | queue.starting
        if new or (queue.busy, queue.limit) != (busy, limit):
            queue.busy, queue.limit, queue.stale = busy, limit, True
        if new and queue.is_full_for(ticket):
            queue.ahead[name] = max(1, len(queue.tickets))
        elif queue.stale:
            queue.settle()
        return queue.ahead.get(name, 0)

    def use(self, cache: ObjectKey, artifact: str, namespaces: tuple[str, ...]) -> None:
        """Whose content in the cache the artifact is; nobody's: ()."""
        queue = self._queues.setdefault(cache, _Queue())
        before = queue.used.get(artifact, ())
        if before == namespaces:
            return
        queue.used[artifact] = namespaces
        touched = {*before, *namespaces}
        known = touched & queue.users.keys()
        queue.users.update(namespaces)
        queue.users.subtract(before)
        for namespace in touched:
            if not queue.users[namespace]:
                del queue.users[namespace]
        queue.stale = queue.stale or known != touched & queue.users.keys()

    def forget(self, artifact: ObjectKey) -> None:
        """Leave every queue, and use no cache any more: the artifact was deleted."""
        self.leave(artifact)
        for cache, queue in self._queues.items():
            if cache[0] == artifact[0]:
                self.use(cache, artifact[1], ())
                queue.used.pop(artifact[1], None)

    def prune(self, caches: Container[ObjectKey]) -> None:
        """Forget the queues of caches that are gone, once no artifact names them any more."""
        for cache in [key for key in self._queues if key not in caches]:
            queue = self._queues[cache]
            if not (queue.tickets or queue.starting or queue.used):
                del self._queues[cache]

    def start(self, cache: ObjectKey, artifact: str) -> None:
        """Its Job is being created: it waits no longer, and takes a place."""
        queue = self._queues.setdefault(cache, _Queue())
        ticket = queue.tickets.pop(artifact, None)
        queue.starting[artifact] = ticket.namespaces if ticket else ()
        number = max(queue.last.values(), default=0) + 1
        queue.last |= dict.fromkeys(queue.starting[artifact], number)
        queue.stale = True

    def starting(self, cache: ObjectKey) -> int:
        """How many Jobs are being created."""
        queue = self._queues.get(cache)
        return len(queue.starting) if queue is not None else 0

    def waits(self, cache: ObjectKey) -> bool:
        """Whether anybody waits for a place."""
        queue = self._queues.get(cache)
        return queue is not None and any(name not in queue.busy for name in queue.tickets)

    def started(self, cache: ObjectKey, artifact: str) -> None:
        """Its Job exists by now, or can't be made."""
        queue = self._queues.get(cache)
        if queue is not None and queue.starting.pop(artifact, None) is not None:
            queue.stale = True

    def leave(self, artifact: ObjectKey) -> None:
        """It does not wait: it is gone, is done, or waits for something else."""
        for (namespace, _), queue in self._queues.items():
            if namespace == artifact[0] and queue.tickets.pop(artifact[1], None) is not None:
                queue.stale = True

    def give_up(self, artifact: ObjectKey) -> None:
        """It neither waits nor starts: its pass has failed, at whatever point that was."""
        self.leave(artifact)
        for cache in self._queues:
            if cache[0] == artifact[0]:
                self.started(cache, artifact[1])

    def next(self, cache: ObjectKey, count: int, running: Running | None = None) -> list[str]:
        """The artifacts at the head, to be looked at when a Job has ended; by what is `running` since, or as at the last look."""
        queue = self._queues.get(cache)
        if queue is None:
            return []
        if running is not None and queue.busy != running | queue.starting:
            queue.busy, queue.stale = running | queue.starting, True
        if queue.stale:
            queue.settle()
        waiting = [name for name in queue.tickets if name in queue.ahead]
        return nsmallest(count, waiting, key=lambda name: (queue.ahead[name], queue.tickets[name].place))

    def heads(self, namespace: str) -> list[str]:
        """The artifact at the head of each of a namespace's queues."""
        return [name for cache in self._queues if cache[0] == namespace for name in self.next(cache, 1)]
