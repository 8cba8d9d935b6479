r"""The pattern keys of adapter_config.json: a tenant's regular expressions, held to a grammar that no name makes slow.

vLLM 0.32 and PEFT run `re.match(rf"(.*\.)?({key})$", name)` for every key and module, vLLM within the engine's step, where an
expression without end is an engine without end. What PEFT writes are names of modules. Allowed beside them are several of them
between `|`, or one with `^` before, `$` after, and at most two groups of plain alternatives and two repeats of any character, a
digit or a class of characters: then the steps of a match are bounded by what is known beforehand.
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
# In steps of about 10 ns each: of one match, in which nothing else of the engine runs, and of all matches of an adapter.
_MAX_MATCH: Final = 1_000_000
_MAX_STEPS: Final = 500_000_000
_MAX_ROW: Final = 64  # characters of which it is looked at how often they can be found
_ANY: Final = "*"
_NEXT_STEPS: Final = 0.25  # to look at one more character where the one before it was found
_DIGITS: Final = (r"\d+", "[0-9]+")
_CALL_STEPS: Final = 180  # what a call takes beside the matching: vLLM puts the expression together each time

_CLASS: Final = r"\[(?:[A-Za-z0-9_](?:-[A-Za-z0-9])?)+\]"
_LETTER: Final = r"[A-Za-z0-9_\-]"
_PLAIN: Final = rf"(?:{_LETTER}|\\?\.|\\d|{_CLASS})+"
_GROUP: Final = rf"\((?:\?:)?{_PLAIN}(?:\|{_PLAIN})*\)"
_GRAMMAR: Final = re.compile(rf"\^?(?:{_LETTER}|\\\.|\.[*+]?|\\d\+?|{_CLASS}\+?|{_GROUP})+\$?|{_PLAIN}(?:\|{_PLAIN})+")
_ROWS: Final = re.compile("[0-9]+")
_ELEMENT: Final = re.compile(
    rf"(?P<loop>\.[*+]|\\d\+|{_CLASS}\+)|(?P<group>{_GROUP})|(?P<any>\.|\\d|{_CLASS})|(?P<letter>\\?.)", re.DOTALL
)


class NotAllowed(Exception):  # noqa: N818
    """A key that is no expression of the grammar."""


@dataclass(frozen=True)
class PatternKey:
    """One key, as the engine runs it."""

    expression: re.Pattern[str]
    elements: Sequence[tuple[str, str]]  # what kind of element of the grammar, and its text

    @classmethod
    def of(cls, text: str) -> PatternKey:
        """The key of a text from adapter_config.json, compiled; raises NotAllowed."""
        if len(text) > _MAX_KEY or not _GRAMMAR.fullmatch(text):  # the length first: the text may be megabytes
            raise NotAllowed
        # Names between `|` stand in vLLM's own group.
        whole = text if "(" in text or "|" not in text else f"({text})"
        elements = [(found.lastgroup or "", found[0]) for found in _ELEMENT.finditer(whole)]
        kinds = [kind for kind, _ in elements]
        if kinds.count("loop") > _MAX_LOOPS or kinds.count("group") > _MAX_GROUPS:
            raise NotAllowed
        try:
            return cls(re.compile(rf"(.*\.)?({text})$"), elements)
        except re.error:  # a class like [z-a]
            raise NotAllowed from None

    def steps(self, *, length: int, dots: int, digits: int) -> int:
        """No match with a name of so many characters, dots among them, and digits in a row takes more.

        Counted is in how many ways and at how many places of the name each element is come to. A loop goes on at every place; a row
        of characters is found only so often as it fits into the name beside itself, or overlapping where it repeats itself.
        """
        total, ways, places = float(length), 1, dots + 1
        row: str = ""
        shifts: list[int] = []
        for kind, text in self.elements:
            total += ways * places * (len(text) if kind == "group" else 1 if not row else _NEXT_STEPS)
            if text == "^":
                places = 1
            elif kind in ("letter", "any"):
                letter = text[-1] if kind == "letter" else _ANY
                if len(row) == _MAX_ROW:
                    row, shifts = "", []
                shifts = [by for by in (*shifts, len(row)) if by and _alike(row[len(row) - by], letter)]
                row += letter
                places = min(places, length // min([*shifts, len(row)]) + 1)
                continue
            elif text in _DIGITS:
                total += ways * places * digits
                ways *= max(digits, 1)
            elif kind == "loop":
                total += ways * places * length
                ways, places = ways * places, length
            else:
                ways *= text.count("|") + 1
            row, shifts = "", []
        return math.ceil(total) + ways * places


def _alike(one: str, other: str) -> bool:
    """Whether two characters of a key may stand for the same of a name."""
    return one == other or _ANY in (one, other)


@dataclass(frozen=True)
class PatternValue(Generic[Value]):
    """A key and what it gives the modules that it matches."""

    key: PatternKey
    value: Value


def first_match(entries: Iterable[PatternValue[Value]], name: str) -> Value | None:
    """The value of the first key that matches, as PEFT and vLLM have it."""
    return next((entry.value for entry in entries if entry.key.expression.match(name)), None)


def take_too_long(keys: Sequence[PatternKey], names: Sequence[str]) -> bool:
    """Whether one match might take more than 10 ms, or all keys with all names more than 5 s, of the engine's time."""
    if not keys or not names:
        return False
    length, dots = max(map(len, names)), max(name.count(".") for name in names)
    digits = max((len(row) for name in names for row in _ROWS.findall(name)), default=0)
    steps = [key.steps(length=length, dots=dots, digits=digits) for key in keys]
    return max(steps) > _MAX_MATCH or len(names) * (sum(steps) + len(keys) * _CALL_STEPS) > _MAX_STEPS
