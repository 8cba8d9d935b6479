"""What Google and Azure declare of an object's content: obstore does not tell, so a HEAD of our own asks, by an address that obstore signs.

Google keeps the CRC32C of every object, and the MD5 of those that came in one piece. Azure keeps the MD5 of blobs that came in one piece,
and of others what their writer said. Foreign data, all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Final
from urllib.parse import quote

import httpx2
import obstore
from obstore.store import AzureStore, GCSStore

from lora_operator.fetch.s3_sums import decoded
from lora_operator.fetch.sums import Declared

_SIGNED_FOR: Final = timedelta(minutes=5)
_GOOGLE: Final = {"md5": "MD5", "crc32c": "CRC32C"}  # the stronger one first
_BYTES: Final = {"MD5": 16, "CRC32C": 4}


class ChangedError(Exception):
    """The object is another one than was listed."""


class NoAnswerError(Exception):
    """The service has no answer just now; the message says which status it gave."""


def signed(client: GCSStore | AzureStore) -> Callable[[str], str]:
    """Addresses of keys that are signed for one HEAD."""
    return lambda key: obstore.sign(client, "HEAD", key, _SIGNED_FOR)


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
