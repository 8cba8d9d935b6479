"""Makes foreign text fit to be shown: bounded and on one line.

Names, tensor keys and engine errors come from tenants' files. Every message of the plugin that holds any of them goes through here.
"""

from __future__ import annotations

import unicodedata
from typing import Final

MESSAGE_CHARS: Final = 600
NAME_CHARS: Final = 120

# Control, format (bidirectional overrides among them), surrogate, private, unassigned, line and paragraph separators.
_UNPRINTABLE: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def clean(text: object, *, limit: int = MESSAGE_CHARS) -> str:
    """`text` as one line of printable characters, at most `limit` of them, with an ellipsis where something was left out."""
    try:
        raw = text if isinstance(text, str) else str(text)
    except ValueError:  # an integer of thousands of digits
        raw = "(too long to be shown)"
    raw = raw[: limit * 4]
    shown = "".join(" " if unicodedata.category(char) in _UNPRINTABLE else char for char in raw)
    shown = " ".join(shown.split())
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def quoted(name: object) -> str:
    """A name of a tenant's choosing, as messages show it."""
    return f"'{clean(name, limit=NAME_CHARS)}'"
