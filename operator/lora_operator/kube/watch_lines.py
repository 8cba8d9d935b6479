"""What kopf gets to see of the API server's answers: where a list ends, and events that its parser can't fail at.

kopf parses whole lists and single lines of watches with Python's own parser, which raises on what nests deeply; and what it raises
ends the process, and the next one at the same object.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from lora_operator.kube.answers import flattened, parsed

log = logging.getLogger(__name__)


async def drop_items(response: Any) -> None:
    """Leave of a list's answer only its resourceVersion: kopf then watches from there, and asks for no other page."""
    metadata = parsed("list", await response.read()).get("metadata") or {}
    kept = {"resourceVersion": metadata.get("resourceVersion")}
    response._body = json.dumps({"metadata": kept, "items": []}).encode()  # where aiohttp keeps what was read


class Lines:
    """A watch's stream in whole lines, each of them JSON that nests no deeper than any parser follows."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def iter_chunked(self, size: int) -> AsyncIterator[bytes]:
        """The lines as they come; `size` is that of the pieces that are read."""
        pieces: list[bytes] = []
        async for data in self._stream.iter_chunked(size):
            *lines, rest = data.split(b"\n")
            for line in lines:
                yield _safe(b"".join([*pieces, line]))
                pieces.clear()
            if rest:
                pieces.append(rest)
        if pieces:
            yield _safe(b"".join(pieces))


def _safe(line: bytes) -> bytes:
    """The line with its end; an empty one in the place of what is no JSON: our own list tells of that kind what is the matter."""
    flat = flattened(line)
    try:
        if flat is not line:
            json.loads(flat)
    except ValueError:
        log.warning("a line of %d bytes of a watch can't be read, and is left out", len(line))
        return b"\n"
    return flat + b"\n"
