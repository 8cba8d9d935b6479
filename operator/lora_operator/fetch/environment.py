"""Prepares the process before huggingface_hub is imported: that library reads its settings, and ambient credentials, at import.

The only identity of a Job is the token file that its request names. Whatever tokens, endpoints, caches or modes the image, the node or
a mounted home directory bring along must not be used, and are removed here.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Final, Literal

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text
from lora_operator.manifest import FetchRequest

DOWNLOAD_TIMEOUT_S: Final = 30  # without a byte, per request; the library tries five times more before it gives up
METADATA_TIMEOUT_S: Final = 15

_TOKEN_BYTES: Final = 4096
_AMBIENT: Final = (
    "HF_",
    "HUGGINGFACE_",
    "HUGGING_FACE_",
    "TRANSFORMERS_",
    "DISABLE_TELEMETRY",
    "DO_NOT_TRACK",
    "NETRC",
    "XDG_",
)
# Group-writable, so that the next Job may run as another user of the volume's group.
_UMASK: Final = 0o002


def prepare(request: FetchRequest, *, home: Path) -> None:
    """Sets umask and environment; `home` is an empty, private, writable directory."""
    os.umask(_UMASK)
    for name in list(os.environ):
        if name.upper().startswith(_AMBIENT):
            del os.environ[name]
    os.environ.update(
        {
            "HOME": str(home),
            "NETRC": os.devnull,
            "HF_HOME": str(home / "huggingface"),
            "HF_ENDPOINT": request.hugging_face.endpoint.rstrip("/"),
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_SHARED_BLOBS": "1",  # payloads stay in the repository's own blobs
            "HF_HUB_DISABLE_SYMLINKS_WARNING": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_XET": "1",  # its transfers bypass the HTTP client, and so the rules of `transport`
            "HF_HUB_DOWNLOAD_TIMEOUT": str(DOWNLOAD_TIMEOUT_S),
            "HF_HUB_ETAG_TIMEOUT": str(METADATA_TIMEOUT_S),
        }
    )


def private_home() -> tempfile.TemporaryDirectory[str]:
    """A directory for what libraries want to write to a home directory; the container's root is read-only."""
    return tempfile.TemporaryDirectory(prefix="lora-operator-", ignore_cleanup_errors=True)


def read_token(request: FetchRequest) -> str | Literal[False]:
    """The token of this Job, or False for anonymous access. Raises ReasonError where one was promised and is not usable."""
    if request.token_file is None:
        return False
    try:
        with Path(request.token_file).open("rb") as file:
            raw = file.read(_TOKEN_BYTES + 1)
    except OSError as error:
        raise ReasonError(
            Reason.CREDENTIALS_KEY_MISSING, f"the token could not be read from its Secret: {error.strerror}"
        ) from error
    token = raw.decode("ascii", "replace").strip()
    text.protect(token)
    if not token:
        raise ReasonError(Reason.CREDENTIALS_KEY_MISSING, "the token in the Secret is empty; put a token into that key")
    if len(raw) > _TOKEN_BYTES or not all("!" <= c <= "~" for c in token):
        raise ReasonError(
            Reason.UNAUTHORIZED,
            "the value in the Secret is not a token: it is too long or has spaces, line breaks or other characters inside",
        )
    return token
