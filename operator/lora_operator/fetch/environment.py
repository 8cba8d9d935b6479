"""Prepares the process before a source's library is imported: huggingface_hub reads settings, and ambient credentials, at import.

The only identity of a Job lies in the files of the folder that its request names. Whatever tokens, keys, endpoints, caches or modes the image, the node or
a mounted home directory bring along must not be used, and are removed here.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Final, Literal

from lora_operator.constants import CREDENTIALS_KEY, Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text
from lora_operator.manifest import FetchRequest

DOWNLOAD_TIMEOUT_S: Final = 30  # without a byte, per request; the library tries five times more before it gives up
METADATA_TIMEOUT_S: Final = 15

_SECRET_BYTES: Final = 4096
_DOCUMENT_BYTES: Final = 64 << 10
_AMBIENT: Final = (
    "HF_",
    "HUGGINGFACE_",
    "HUGGING_FACE_",
    "AWS_",
    "BOTO_",
    "TRANSFORMERS_",
    "DISABLE_TELEMETRY",
    "DO_NOT_TRACK",
    "NETRC",
    "XDG_",
    "GOOGLE_",
    "GCLOUD_",
    "CLOUDSDK_",
    "GCE_",
    "AZURE_",
    "MSI_",
    "IDENTITY_",
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
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_SHARED_BLOBS": "1",  # payloads stay in the repository's own blobs
            "HF_HUB_DISABLE_SYMLINKS_WARNING": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_XET": "1",  # its transfers bypass the HTTP client, and so the rules of `transport`
            "HF_HUB_DOWNLOAD_TIMEOUT": str(DOWNLOAD_TIMEOUT_S),
            "HF_HUB_ETAG_TIMEOUT": str(METADATA_TIMEOUT_S),
            # The client has no provider of credentials either; this is for whatever else would ask.
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }
    )
    if request.hugging_face is not None:
        os.environ["HF_ENDPOINT"] = request.hugging_face.endpoint.rstrip("/")


def private_home() -> tempfile.TemporaryDirectory[str]:
    """A directory for what libraries want to write to a home directory; the container's root is read-only."""
    return tempfile.TemporaryDirectory(prefix="lora-operator-", ignore_cleanup_errors=True)


def read_token(request: FetchRequest) -> str | Literal[False]:
    """The Hub's token of this Job, or False for anonymous access. Raises ReasonError where one was promised and is not usable."""
    return False if request.credentials is None else _read(Path(request.credentials), CREDENTIALS_KEY)


def read_keys(request: FetchRequest) -> dict[str, str] | None:
    """The values of this Job's keys by name, None for anonymous access. Raises ReasonError where they were promised and are not usable."""
    if request.credentials is None:
        return None
    folder = Path(request.credentials)
    scheme = request.scheme
    assert scheme is not None  # noqa: S101  the program looked
    assert scheme.secrets is not None  # noqa: S101  as the table says
    assert scheme.secrets.keys is not None  # noqa: S101
    keys = scheme.secrets.keys
    names = keys.choose([path.name for path in folder.glob("*")])
    return {name: _read(folder, name, document=name in keys.documents) for name in names}


def _read(folder: Path, name: str, *, document: bool = False) -> str:
    limit = _DOCUMENT_BYTES if document else _SECRET_BYTES
    try:
        with (folder / name).open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise ReasonError(
            Reason.CREDENTIALS_KEY_MISSING, f"{name} could not be read from its Secret: {error.strerror}"
        ) from error
    value = raw.decode("ascii", "replace").strip()
    text.protect(value)
    if not value:
        raise ReasonError(Reason.CREDENTIALS_KEY_MISSING, f"{name} in the Secret is empty; put its value into that key")
    if len(raw) > limit or not (document or all("!" <= c <= "~" for c in value)):
        raise ReasonError(
            Reason.UNAUTHORIZED,
            f"the value of {name} in the Secret is none: it is too long or has spaces, line breaks or other characters inside",
        )
    return value
