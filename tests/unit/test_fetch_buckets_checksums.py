"""What Google and Azure declare of an object, in the headers in which they do."""

from __future__ import annotations

import base64
import hashlib

import pytest

from lora_operator.fetch.sources.buckets.checksums import from_headers, plain
from lora_operator.fetch.sources.checksums import Declared

DATA = b"123456789"
MD5, CRC = hashlib.md5(DATA).digest(), bytes.fromhex("e3069283")
MD5_TEXT, CRC_TEXT = (base64.b64encode(value).decode() for value in (MD5, CRC))

DECLARED: dict[str, tuple[dict[str, str], Declared | None]] = {
    "Google's sums of an object in one piece": (
        {"x-goog-hash": f"crc32c={CRC_TEXT},md5={MD5_TEXT}"},
        Declared("MD5", MD5),
    ),
    "the same as two headers, as a client joins them": (
        {"x-goog-hash": f"md5={MD5_TEXT}, crc32c={CRC_TEXT}"},
        Declared("MD5", MD5),
    ),
    "Google's sum of an object in several pieces": ({"x-goog-hash": f"crc32c={CRC_TEXT}"}, Declared("CRC32C", CRC)),
    "Azure's sum": ({"content-md5": MD5_TEXT}, Declared("MD5", MD5)),
    "no sum": ({"content-length": "9"}, None),
    "sums that are none": ({"x-goog-hash": "crc32c=AA==,md5=no base64!", "content-md5": "AAAA"}, None),
}


@pytest.mark.parametrize("sentence", DECLARED)
def test_the_strongest_sum_in_the_headers_is_taken(sentence: str) -> None:
    headers, expected = DECLARED[sentence]
    assert from_headers(headers) == expected


def test_addresses_of_keys_are_quoted_and_have_the_signature_that_a_secret_has() -> None:
    assert plain("https://gcs.test/models")("a b/x#1.json") == "https://gcs.test/models/a%20b/x%231.json"
    assert plain("https://acc.test/c/", query="sig=x")("a") == "https://acc.test/c/a?sig=x"
