"""What one engine process serves, has served, and failed to serve: the plugin's memory, without any I/O.

Content is (public name, path). Each has one integer id for ever, and no id ever another content, so what the engine keeps by id is
always right. The first content that a process serves under a name has the plain name as its internal one, other content gets
`<name>@<revision>.<list generation>`; a name with an @ is never another content's. The plain name may go over to the current
content, but only once no request of other content can be running under it, and only in an engine whose prefix cache tells paths
apart: two contents under one internal name poison caches or end the engine (docs/decisions.md 1 and 16). So nothing that was
ever loaded is forgotten. Times are monotonic seconds, given by the caller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

from .clean_text import clean
from .list_file import ListedAdapter

DRAIN_SECONDS: Final = 30.0  # after that, a request that the metrics do not show is no user of retired content
QUIET_SECONDS: Final = 1.0  # how long nothing may be seen of retired content before nothing is left of it
_BACKOFF: Final = {"checks": (1.0, 60.0), "engine": (5.0, 600.0)}  # first and longest wait before the next try

ContentKey = tuple[str, str]  # public name and path


@dataclass(frozen=True)
class LoadedContent:
    """Content that this process has loaded under a public name."""

    name: str
    path: str
    internal: str
    int_id: int | None  # None: loaded before the plugin, in an engine without a registry
    base_model_name: str | None

    @property
    def key(self) -> ContentKey:
        """Its public name and path, by which it is known: the weights behind them never change."""
        return self.name, self.path


@dataclass(frozen=True)
class LoadFailure:
    """Why an adapter of the list is not served."""

    stage: str  # checks or engine
    message: str
    tries: int
    retry_at: float


@dataclass(frozen=True)
class Retirement:
    """What is no longer served under its internal name, since when."""

    content: LoadedContent
    since: float


class History:
    """What one engine process has loaded, serves, has given up and could not load."""

    def __init__(self) -> None:
        self.current: dict[str, LoadedContent] = {}  # by public name
        self.retired: dict[str, Retirement] = {}  # by internal name, until no request can use it
        self.failures: dict[ContentKey, LoadFailure] = {}
        self._contents: dict[ContentKey, LoadedContent] = {}
        self._paths: set[str] = set()  # of contents that this process has loaded, under whatever name
        self._internals: dict[str, LoadedContent] = {}  # what has, or had last, an internal name
        self._aliases: dict[str, set[str]] = {}  # all internal names of a public name
        self._touched: dict[str, float] = {}  # by public name: when a request could last have come by other content
        self._quiet: dict[str, float] = {}  # by public name: since when nothing is seen of other content

    def recall(self, entry: ListedAdapter, list_generation: int) -> LoadedContent | None:
        """How this content was loaded before, under a name that it may have now; None when it never was, or can't be put back.

        Its internal name may be another content's by now (the plain name went over to that): then it gets a new one. The id stays,
        for the engine keeps the weights by it.
        """
        found = self._contents.get((entry.name, entry.path))
        if found is None or found.int_id is None:
            return None
        if self._internals[found.internal].key == found.key:
            return found
        return replace(found, internal=self.mint(entry, list_generation))

    def has_loaded(self, entry: ListedAdapter) -> bool:
        """Whether this process has loaded this content, so that it can be put back without a load."""
        found = self._contents.get((entry.name, entry.path))
        return found is not None and found.int_id is not None

    def has_loaded_path(self, path: str) -> bool:
        """Whether this process has loaded this content, under whatever name."""
        return path in self._paths

    def by_internal(self, internal: str) -> LoadedContent | None:
        """The content that has, or had, an internal name."""
        return self._internals.get(internal)

    def aliases(self, name: str) -> set[str]:
        """Internal names that a public name ever had, beside itself."""
        return self._aliases.get(name, set()) - {name}

    def alias(self, asked: str) -> LoadedContent | None:
        """The content that is served now and has, or had, this internal name, other than its public one."""
        found = self._internals.get(asked)
        if found is None or found.name == asked:
            return None
        present = self.current.get(found.name)
        return present if present is not None and present.key == found.key else None

    def mint(self, entry: ListedAdapter, list_generation: int) -> str:
        """An internal name that this process never used."""
        if entry.name not in self._internals:
            return entry.name
        revision = "".join(char for char in entry.revision if char.isascii() and char.isalnum())[:8] or "r"
        stem = name = f"{entry.name}@{revision}.{list_generation}"
        number = 1
        while name in self._internals:
            number += 1
            name = f"{stem}.{number}"
        return name

    def remember(self, content: LoadedContent) -> None:
        """Content was loaded, or got another internal name; its id stays its own for ever."""
        self._contents[content.key] = content
        self._paths.add(content.path)
        self._internals[content.internal] = content
        self._aliases.setdefault(content.name, set()).add(content.internal)

    def serve(self, content: LoadedContent, now: float) -> LoadedContent | None:
        """Content answers under its public name; returns what it replaced, under another internal name.

        What stood in the registry in between may have been another's writing, which nobody saw: so this is a change in any case.
        """
        self.remember(content)
        self.touch(content.name, now)
        before = self.current.get(content.name)
        self.current[content.name] = content
        self.retired.pop(content.internal, None)
        self.failures.pop(content.key, None)
        if before is None or before.internal == content.internal:
            return None
        self.retired[before.internal] = Retirement(before, now)
        return before

    def withdraw(self, name: str, now: float) -> LoadedContent | None:
        """Nothing answers under a public name any more; returns what did."""
        before = self.current.pop(name, None)
        self.touch(name, now)
        if before is not None:
            self.retired[before.internal] = Retirement(before, now)
        return before

    def touch(self, name: str, now: float) -> None:
        """Requests that began before now may have come by any content of a public name: somebody else wrote into the registry."""
        self._touched[name] = now
        self._quiet.pop(name, None)

    def fail(self, entry: ListedAdapter, stage: str, message: str, now: float) -> LoadFailure:
        """An adapter can't be served; the wait before the next try doubles each time."""
        key = (entry.name, entry.path)
        tries = self.failures[key].tries + 1 if key in self.failures else 1
        first, longest = _BACKOFF[stage]
        wait = min(first * 2.0 ** min(tries - 1, 20), longest)
        failure = self.failures[key] = LoadFailure(stage, clean(message), tries, now + wait)
        return failure

    def quarantine(self, entry: ListedAdapter, message: str) -> None:
        """An adapter is not tried again for as long as it is in the list as it is."""
        self.failures[entry.name, entry.path] = LoadFailure("engine", clean(message), 1, math.inf)

    def must_wait(self, entry: ListedAdapter, now: float) -> bool:
        """Whether it failed so lately that it is not tried yet."""
        failure = self.failures.get((entry.name, entry.path))
        return failure is not None and failure.retry_at > now

    def next_retry(self) -> float | None:
        """When the first failure is due."""
        return min((failure.retry_at for failure in self.failures.values()), default=None)

    def keep_failures(self, keys: set[ContentKey]) -> None:
        """Forget the failures of what is not listed any more."""
        self.failures = {key: failure for key, failure in self.failures.items() if key in keys}

    def running(self, in_use: frozenset[str] | None, oldest_request: float | None, now: float) -> frozenset[str]:
        """Internal names of retired content that requests may still use.

        `in_use` is what the metrics tell (None: nothing). A request that began before the change may not have reached the engine,
        of which alone the metrics know: for a while, or without metrics for as long as it lasts, it counts as a user.
        """
        names = set()
        for name, one in self.retired.items():
            older = oldest_request is not None and oldest_request <= one.since
            if (in_use and name in in_use) or (older and (in_use is None or now - one.since < DRAIN_SECONDS)):
                names.add(name)
        return frozenset(names)

    def forget_retired(self, running: frozenset[str]) -> None:
        """Retired content that no request can use is retired no longer; its id stays taken."""
        self.retired = {name: one for name, one in self.retired.items() if name in running}

    def ready_for_plain_name(
        self, in_use: frozenset[str] | None, oldest_request: float | None, now: float
    ) -> list[LoadedContent]:
        """The current contents that may have their plain name back, each with that as its internal one.

        To be asked again and again: the wait begins when nothing of other content is seen, and begins anew when something is.
        No request may be left that began before the last change of the public name, whatever it asks for, and the metrics must not
        have shown another internal name of it for a while: a request that was broken off leaves the engine after its client.
        """
        found = []
        for name, present in self.current.items():
            if present.internal == name:
                continue
            older = oldest_request is not None and oldest_request <= self._touched.get(name, now)
            if older or (in_use is not None and in_use & ((self.aliases(name) | {name}) - {present.internal})):
                self._quiet.pop(name, None)
            elif now - self._quiet.setdefault(name, now) >= QUIET_SECONDS:
                found.append(replace(present, internal=name))
        return found
