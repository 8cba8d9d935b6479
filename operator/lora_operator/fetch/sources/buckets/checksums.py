"""What Google and Azure declare of an object's content: obstore does not tell, so a HEAD of our own asks, by a signed address.

Google keeps the CRC32C of every object, and the MD5 of those that came in one piece. Azure keeps the MD5 of blobs that came in one piece,
and of others what their writer said. Foreign data, all of it.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Final
from urllib.parse import quote, urlencode

import httpx2
import obstore
from obstore.store import GCSStore

from lora_operator.fetch.sources.checksums import Declared, decoded

_SIGNED_FOR: Final = timedelta(minutes=15)
_AZURE_VERSION: Final = "2022-11-02"
_GOOGLE: Final = {"md5": "MD5", "crc32c": "CRC32C"}  # the stronger one first
_BYTES: Final = {"MD5": 16, "CRC32C": 4}


class ChangedError(Exception):
    """The object is another one than was listed."""


class NoAnswerError(Exception):
    """The service has no answer just now; the message says which status it gave."""


def signed(client: GCSStore) -> Callable[[str], str]:
    """Addresses of keys that are signed for one HEAD."""
    return lambda key: obstore.sign(client, "HEAD", key, _SIGNED_FOR)


def shared_access(account: str, key: str, container: str) -> str:
    """A signature for reading a container's blobs, for the query of their addresses, by the account's key. Raises ValueError.

    obstore's own is right for no endpoint but Azure's. The form is Azure's "Create a service SAS", for versions from 2020-12-06 on.
    """
    expires = f"{datetime.now(UTC) + _SIGNED_FOR:%Y-%m-%dT%H:%M:%SZ}"
    fields = {"sp": "r", "se": expires, "sv": _AZURE_VERSION, "sr": "c"}
    resource = f"/blob/{account}/{container}"
    text = "\n".join(["r", "", expires, resource, "", "", "", _AZURE_VERSION, "c", *[""] * 7])
    signature = hmac.digest(base64.b64decode(key, validate=True), text.encode(), "sha256")
    return urlencode({**fields, "sig": base64.b64encode(signature).decode()})


def plain(folder: str, *, query: str = "") -> Callable[[str], str]:
    """Addresses of keys in a bucket's own, with what a Secret has to be added to each."""
    return lambda key: f"{folder.rstrip('/')}/{quote(key)}" + (f"?{query}" if query else "")


def ask(transport: httpx2.Client, url: str, *, etag: str) -> Declared | None:
    """The sum that the service declares of an object of that ETag; None where it declares none, or does not say.

    Raises ChangedError, NoAnswerError, httpx2.HTTPError.
    """
    answer = transport.head(url, headers={"Accept-Encoding": "identity"}, auth=httpx2.Auth())
    if answer.status_code >= 500 or answer.status_code == 429:
        raise NoAnswerError(f"server error {answer.status_code}")
    if answer.status_code != 200:
        return None  # it can be read; what nobody declares can't be compared
    found = answer.headers.get("ETag", "").strip('"')
    if found and found != etag.strip('"'):
        raise ChangedError
    return from_headers(answer.headers)


def from_headers(headers: Mapping[str, str]) -> Declared | None:
    """The strongest sum in an answer's headers."""
    google = dict(part.strip().partition("=")[::2] for part in headers.get("x-goog-hash", "").split(","))
    values = {algorithm: google.get(name, "") for name, algorithm in _GOOGLE.items()}
    values["MD5"] = values["MD5"] or headers.get("content-md5", "")
    for algorithm, text in values.items():
        value = decoded(text)
        if len(value) == _BYTES[algorithm]:
            return Declared(algorithm, value)
    return None
