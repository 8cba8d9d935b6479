"""Which adapters the module list has room for: the API server takes no more than 1 MiB of data in a ConfigMap."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

from lora_operator.plan.adapter_list import Module, ModuleList, encode_module

# Some 10,000 adapters of usual names, and 2,700 of the longest that can't be packed. In base64 that is below 1 MiB as well, more than
# which the client would rather not send at once.
MAX_PACKED_BYTES: Final = 750 * 2**10
AT_ONCE: Final = 32  # entries between two looks at the size: each look costs some bytes
_FIRST: Final = datetime.min.replace(tzinfo=UTC)


def give_way(everybody: ModuleList, made: Mapping[str, datetime | None]) -> frozenset[str]:
    """The UIDs of the adapters that a list of all has no room for; `made`: when adapters were, by UID.

    It is the surplus of the namespaces that have most, the youngest first, so that nobody's adapters are in the way of somebody who
    has fewer. It depends on who is there alone, not on who came to the list when. An adapter of unknown age counts as old: it
    can't be told.
    """
    if len(everybody.encoded) <= MAX_PACKED_BYTES or len(everybody.packed) <= MAX_PACKED_BYTES:
        return frozenset()
    order = _by_turns(everybody, made)
    kept = _guess(order)
    # Names may be chosen so that they pack well in the order of turns and badly in the list's own: only the list itself tells.
    while kept and (size := len(replace(everybody, modules=tuple(sorted(order[:kept]))).packed)) > MAX_PACKED_BYTES:
        kept = min(kept - 1, kept * MAX_PACKED_BYTES // size)
    return frozenset(module.uid for module in order[kept:])


def _guess(order: Sequence[Module]) -> int:
    """How many of the first there is room for, as they pack in this order."""
    packer, size = zlib.compressobj(9, wbits=31), 0
    for start in range(0, len(order), AT_ONCE):
        size += sum(len(packer.compress(encode_module(module))) for module in order[start : start + AT_ONCE])
        size += len(packer.flush(zlib.Z_SYNC_FLUSH))
        if size > MAX_PACKED_BYTES:
            return start
    return len(order)


def _by_turns(everybody: ModuleList, made: Mapping[str, datetime | None]) -> list[Module]:
    """The oldest of each namespace, then the second oldest of each, and so on."""
    ages = sorted((made.get(module.uid) or _FIRST, module.uid, module) for module in everybody.modules)
    counts: dict[str, int] = {}
    turns = []
    for age, uid, module in ages:
        namespace = module.adapter.partition("/")[0]
        counts[namespace] = counts.get(namespace, 0) + 1
        turns.append((counts[namespace], age, uid, module))
    return [module for *_, module in sorted(turns)]
