"""Blobs whose snapshots were removed and that had to stay: noted on the volume until an eviction comes that may remove them.

Without the note they would count as what a download left a moment ago, and stay for a day.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from lora_operator.fetch.volume.layout import TMP
from lora_operator.fetch.volume.store_locks import STATE

_NAME: Final = "released.json"


def read(root: Path) -> dict[Path, set[str]]:
    """Names by store; whatever is not understood is nothing. Raises OSError where the note can't be read."""
    try:
        found = json.loads((root / STATE / _NAME).read_text("utf-8"))
        return {root / str(store): set(map(str, names)) for store, names in found.items()}
    except (FileNotFoundError, ValueError, AttributeError, TypeError):
        return {}


def write(root: Path, released: Mapping[Path, set[str]]) -> None:
    """Notes these in the place of those before."""
    note = root / STATE / _NAME
    left = {str(store.relative_to(root)): sorted(names) for store, names in released.items() if names}
    if not left:
        note.unlink(missing_ok=True)
        return
    fresh = note.with_name(f"{TMP}{_NAME}-{secrets.token_hex(4)}")
    fresh.write_text(json.dumps(left), "utf-8")
    fresh.replace(note)
