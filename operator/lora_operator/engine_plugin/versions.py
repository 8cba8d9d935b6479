"""What a version of vLLM says about what the engine does."""

from __future__ import annotations

import re
from typing import Final

Version = tuple[int, int]

# From here on rank_pattern and alpha_pattern are obeyed; before, all modules get r and lora_alpha.
PATTERNS: Final = (0, 32)
KNOWN: Final = (0, 32)  # up to here it is known which classes take adapters of embeddings
HEADS: Final = (0, 31)  # from here on modules_to_save may name a classification head
# A clone without tags calls itself 0.1.dev…, some builds 0.0.0: that is no release, and says nothing.
FIRST_RELEASE: Final = (0, 2)
_VERSION: Final = re.compile(r"v?(\d{1,6})\.(\d{1,6})(?!\d)")


def parse_version(text: str) -> Version | None:
    """'0.32.0', 'v0.26.1rc2' as numbers; None for what is no release of vLLM: most callers assume the better of it."""
    found = _VERSION.match(text)
    if found is None:
        return None
    version = (int(found[1]), int(found[2]))
    return version if version >= FIRST_RELEASE else None


def shown(version: Version) -> str:
    """A version as messages have it: major and minor, which is all that matters here."""
    return f"{version[0]}.{version[1]}"
