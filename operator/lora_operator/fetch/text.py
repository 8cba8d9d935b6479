"""Makes foreign text fit to be shown: bounded, on one line, and without the credentials of this Job.

Names, error texts and headers come from sources and tenants. Everything that leaves this program (result, progress, log) goes
through here; nothing else may decide what is harmless.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final

MESSAGE_BYTES: Final = 1024

# Signed download addresses carry their credentials in the query.
_QUERY: Final = re.compile(r"(https?://[^\s?#'\"<>]+)\?[^\s'\"<>]*")
_USERINFO: Final = re.compile(r"(https?://)[^\s/@'\"<>]+@")
_SPACE: Final = re.compile(r"\s+")
_MIN_SECRET: Final = 4

_secrets: set[str] = set()


def protect(secret: str) -> None:
    """Never show `secret` from now on; shorter ones than four characters would make every text unreadable."""
    if len(secret) >= _MIN_SECRET:
        _secrets.add(secret)


def redact(text: str) -> str:
    """Text without the protected secrets and without queries and user names in addresses; line breaks stay."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _USERINFO.sub(r"\1***@", _QUERY.sub(r"\1?***", text))


def clean(text: str, *, limit: int = MESSAGE_BYTES) -> str:
    """One redacted line of printable characters and at most `limit` bytes of UTF-8."""
    printable = "".join(" " if unicodedata.category(c) in _UNPRINTABLE else c for c in redact(text))
    return cut(_SPACE.sub(" ", printable).strip(), limit)


def cut(text: str, limit: int) -> str:
    """The beginning of `text` that fits `limit` bytes of UTF-8, with an ellipsis where something was left out."""
    data = text.encode("utf-8", "replace")
    if len(data) <= limit:
        return data.decode("utf-8")
    return data[: limit - 3].decode("utf-8", "ignore") + "…"


def size(count: int) -> str:
    """Bytes for people: `1.5 GiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


# Control, format (bidirectional overrides among them), surrogate, private and unassigned characters, line and paragraph separators.
_UNPRINTABLE: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
