"""What an S3 service declares of an object's content.

An ETag is the content's MD5 where the object came in one piece and is not encrypted with a key of KMS or the client's. An object that
came in parts declares a checksum of all of it (FULL_OBJECT; AWS keeps CRC64NVME unless told otherwise), or one of its parts' checksums
one behind the other (COMPOSITE, and the ETag with `-<parts>`), which takes knowing how long a part is. Foreign data, all of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from lora_operator.fetch.sources.checksums import ALGORITHMS, Declared, decoded

_MD5: Final = re.compile(r"[0-9a-f]{32}")
_PARTS: Final = re.compile(r"(.+)-([1-9][0-9]{0,4})")


def from_etag(etag: str, *, encrypted: bool) -> Declared | None:
    """The MD5 that an ETag is; None where it is none."""
    text = etag.strip('"').lower()
    return Declared("MD5", bytes.fromhex(text)) if _MD5.fullmatch(text) and not encrypted else None


def from_head(head: Mapping[str, Any]) -> Declared | None:
    """The checksum of the whole object in the answer to a HEAD that asked for checksums; None where there is none."""
    if head.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT":
        for algorithm in ALGORITHMS:
            if value := decoded(head.get(f"Checksum{algorithm}")):
                return Declared(algorithm, value)
    return None


def parts_of(etag: str) -> int:
    """How many parts an object's ETag says that it has; 0 where it does not say."""
    found = _PARTS.fullmatch(etag.strip('"'))
    return int(found[2]) if found else 0


def from_parts(
    head: Mapping[str, Any], *, etag: str, size: int, first: int, last: int, encrypted: bool
) -> Declared | None:
    """The checksum over parts, where the object's first and last part fit parts of equal length; None where they do not."""
    count = parts_of(etag)
    if count == 0 or first < 1 or (count - 1) * first + last != size or not 0 < last <= first:
        return None
    for algorithm in ALGORITHMS:
        if value := decoded((_PARTS.fullmatch(str(head.get(f"Checksum{algorithm}", ""))) or ("", ""))[1]):
            return Declared(algorithm, value, part=first)
    md5 = etag.strip('"').lower().partition("-")[0]
    return Declared("MD5", bytes.fromhex(md5), part=first) if _MD5.fullmatch(md5) and not encrypted else None
