r"""The pattern keys of adapter_config.json: a tenant's regular expressions, held to a grammar that no name makes slow.

vLLM 0.32 and PEFT run `re.match(rf"(.*\.)?({key})$", name)` for every key and module, vLLM within the engine's step, where an
expression without end is an engine without end. What PEFT writes are names of modules. Allowed beside them are `^` before, `$`
after, and at most two groups of plain alternatives and two repeats of any character, a digit or a class of characters: then the
steps of a match are bounded by a product that is known beforehand.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

Value = TypeVar("Value", int, float)

MAX_KEYS: Final = 256  # of both patterns together: vLLM's cache of compiled expressions holds 500
_MAX_KEY: Final = 512
_MAX_LOOPS: Final = 2
_MAX_GROUPS: Final = 2
# Steps of all matches of an adapter, of about 10 ns each; a call of vLLM's takes as long as some hundred of them.
_MAX_STEPS: Final = 100_000_000
_CALL_STEPS: Final = 250

_PLAIN: Final = r"(?:[A-Za-z0-9_\-]|\\?\.)+"
_GROUP: Final = rf"\((?:\?:)?{_PLAIN}(?:\|{_PLAIN})*\)"
_CLASS: Final = r"\[(?:[A-Za-z0-9_](?:-[A-Za-z0-9])?)+\]"
_GRAMMAR: Final = re.compile(rf"\^?(?:[A-Za-z0-9_\-]|\\\.|\.[*+]?|\\d\+?|{_CLASS}\+?|{_GROUP})+\$?")
_LOOP: Final = re.compile(r"\.[*+]|\\d\+|\]\+")
_GROUPS: Final = re.compile(r"\(([^)]*)\)")


class NotAllowed(Exception):  # noqa: N818
    """A key that is no expression of the grammar."""


@dataclass(frozen=True)
class Key:
    """One key, as the engine runs it."""

    expression: re.Pattern[str]
    loops: int
    branches: int  # in how many ways its groups can be gone through

    @classmethod
    def of(cls, text: str) -> Key:
        """Raises NotAllowed."""
        groups = _GROUPS.findall(text)
        loops = len(_LOOP.findall(text))
        if len(text) > _MAX_KEY or not _GRAMMAR.fullmatch(text) or loops > _MAX_LOOPS or len(groups) > _MAX_GROUPS:
            raise NotAllowed
        try:
            expression = re.compile(rf"(.*\.)?({text})$")
        except re.error:  # a class like [z-a]
            raise NotAllowed from None
        return cls(expression, loops, math.prod(group.count("|") + 1 for group in groups))

    def steps(self, *, length: int, dots: int) -> int:
        """No match with a name of so many characters, and dots among them, takes more."""
        repeats: int = length**self.loops
        return _CALL_STEPS + (dots + 1) * repeats * self.branches


@dataclass(frozen=True)
class Entry(Generic[Value]):
    """A key and what it gives the modules that it matches."""

    key: Key
    value: Value


def first_match(entries: Iterable[Entry[Value]], name: str) -> Value | None:
    """The value of the first key that matches, as PEFT and vLLM have it."""
    return next((entry.value for entry in entries if entry.key.expression.match(name)), None)


def take_too_long(keys: Sequence[Key], names: Sequence[str]) -> bool:
    """Whether to match all keys with all names might hold an engine up for a second or more."""
    if not keys or not names:
        return False
    length, dots = max(map(len, names)), max(name.count(".") for name in names)
    return len(names) * sum(key.steps(length=length, dots=dots) for key in keys) > _MAX_STEPS
