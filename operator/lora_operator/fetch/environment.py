"""Prepares the process before a source's library is imported: huggingface_hub reads settings, and ambient credentials, at import.

The only identity of a Job lies in the files of the folder that its request names. Whatever tokens, keys, endpoints, caches or modes the image, the node or
a mounted home directory bring along must not be used, and are removed here.
"""

from __future__ import annotations

import os
import ssl
import tempfile
from pathlib import Path
from typing import Final, Literal

import certifi

from lora_operator.constants import CREDENTIALS_KEY, Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text
from lora_operator.source_kinds import KEYS_BY_MEMBER
from lora_operator.wire.jobs import FetchRequest, HuggingFaceRequest

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
    "RUST_",
    "TOKIO_",
)
# What the cloud's machinery tells a pod of its service account's identity. Of instance metadata nothing: that is the node's.
_IDENTITY: Final = (
    "AWS_ROLE_ARN",
    "AWS_ROLE_SESSION_NAME",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_STS_REGIONAL_ENDPOINTS",
    "AWS_ENDPOINT_URL_STS",
)
# Group-writable, so that the next Job may run as another user of the volume's group.
_UMASK: Final = 0o002


def prepare(request: FetchRequest, *, home: Path) -> None:
    """Sets umask and environment; `home` is an empty, private, writable directory. Raises ReasonError for a bundle that is none."""
    os.umask(_UMASK)
    kept = _IDENTITY if request.workload_identity is not None else ()
    for name in list(os.environ):
        if name.upper().startswith(_AMBIENT) and name not in kept:
            del os.environ[name]
    if request.ca_bundle is not None:
        trust(Path(request.ca_bundle), home=home)
    os.environ.update(
        {
            "HOME": str(home),
            "NETRC": os.devnull,
            "HF_HOME": str(home / "huggingface"),
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_SHARED_BLOBS": "1",  # each repository keeps its own
            "HF_HUB_DISABLE_SYMLINKS_WARNING": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_XET": "1",  # the library's own use of it keeps none of the rules of `transport`; `xet` does
            "RUST_LOG": "error",  # hf_xet writes a log of its own into the home
            "HF_HUB_DOWNLOAD_TIMEOUT": str(DOWNLOAD_TIMEOUT_S),
            "HF_HUB_ETAG_TIMEOUT": str(METADATA_TIMEOUT_S),
            # The client has no provider of credentials either; this is for whatever else would ask.
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }
    )
    if isinstance(request.source, HuggingFaceRequest):
        os.environ["HF_ENDPOINT"] = request.source.endpoint.rstrip("/")


def trust(bundle: Path, *, home: Path) -> None:
    """Has every library trust the bundle's authorities beside the public ones. Raises ReasonError."""
    try:
        added = bundle.read_text("ascii", "replace")
        ssl.create_default_context(cadata=added)
    except (OSError, ValueError, ssl.SSLError) as error:
        raise ReasonError(
            Reason.JOB_FAILED,
            f"spec.network.caBundle of the ModelCache can't be used: {text.clean(str(error), limit=200)}; put certificates "
            "in PEM into that key of the ConfigMap",
        ) from error
    everything = home / "ca.pem"
    everything.write_text(Path(certifi.where()).read_text() + "\n" + added)
    os.environ.update({"SSL_CERT_FILE": str(everything), "REQUESTS_CA_BUNDLE": str(everything)})


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
    keys = KEYS_BY_MEMBER[request.source.kind]
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
