"""A secondary index that is kept as objects come and go, so that a relation costs what it yields and not the size of the store."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

GroupT = TypeVar("GroupT", bound=Hashable)


class Index(Generic[GroupT]):
    """Maps a group to the (namespace, name) keys in it; a key is in at most one group."""

    def __init__(self) -> None:
        self._keys: dict[GroupT, set[tuple[str, str]]] = {}
        self._group: dict[tuple[str, str], GroupT] = {}

    def assign(self, key: tuple[str, str], group: GroupT | None) -> None:
        """Puts the key into the group, and out of the one it was in; None: into none."""
        old = self._group.get(key)
        if old == group:
            return
        if old is not None:
            members = self._keys[old]
            members.discard(key)
            if not members:
                del self._keys[old]
            del self._group[key]
        if group is not None:
            self._keys.setdefault(group, set()).add(key)
            self._group[key] = group

    def keys_of(self, group: GroupT) -> list[tuple[str, str]]:
        """Keys in the group, sorted."""
        return sorted(self._keys.get(group, ()))
