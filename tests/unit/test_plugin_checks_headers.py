"""Our parser of headers against the safetensors library: what that refuses, an engine can't read, so we must refuse it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from lora_operator.engine_plugin import checks
from lora_operator.engine_plugin.tensors import ADAPTER_HEADER_BYTES, FileProblem, read_header, require_readable
from tests.unit.adapter_files import Q, adapter, pair, problem, safetensors, with_header

PARTS = {
    "<entry>": '"dtype":"F32","shape":[1],"data_offsets":[0,4]',
    "<digits>": "9" * 400,
    "<nested>": "[" * 200 + "]" * 200,
}


def written(header: str) -> bytes:
    """A header with what its placeholders stand for."""
    for name, text in PARTS.items():
        header = header.replace(name, text)
    return header.encode()


def refused_by_library(path: Path) -> bool:
    """Whether the library itself can't read the header; there is no numpy here, which it wants only after that."""
    try:
        with safe_open(path, framework="numpy"):
            return False
    except ImportError:
        return False
    except SafetensorError:
        return True


def refused_by_us(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            read_header(file, limit=ADAPTER_HEADER_BYTES)
    except FileProblem:
        return True
    return False


# Each in place of a whole header; True where the library refuses it.
HEADERS: dict[str, tuple[str, bool]] = {
    "good": ('{"a":{<entry>}}', False),
    "texts": ('{"__metadata__":{"a":"b"},"a":{<entry>}}', False),
    "spaces": ('{ "a" : {<entry>} }   ', False),
    "a number in the metadata": ('{"__metadata__":{"a":1},"a":{<entry>}}', True),
    "null in the metadata": ('{"__metadata__":{"a":null},"a":{<entry>}}', True),
    "a list in the metadata": ('{"__metadata__":{"a":[]},"a":{<entry>}}', True),
    "nested metadata": ('{"__metadata__":{"a":{"b":"c"}},"a":{<entry>}}', True),
    "metadata that is a text": ('{"__metadata__":"a","a":{<entry>}}', True),
    "metadata that is a list": ('{"__metadata__":["a"],"a":{<entry>}}', True),
    "half a character in the metadata": (r'{"__metadata__":{"a":"\ud800"},"a":{<entry>}}', True),
    "half a character in a key of it": (r'{"__metadata__":{"\udfff":"a"},"a":{<entry>}}', True),
    "half a character in a name": (r'{"\ud800":{<entry>}}', True),
    "half a character in a type": (r'{"a":{"dtype":"\ud800","shape":[1],"data_offsets":[0,4]}}', True),
    "an offset of -0": ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', True),
    "a fraction": ('{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', True),
    "an exponent": ('{"a":{"dtype":"F32","shape":[1e0],"data_offsets":[0,4]}}', True),
    "a number of 400 digits": ('{"a":{<entry>,"x":<digits>}}', True),
    "an infinite number": ('{"a":{<entry>,"x":1e999}}', True),
    "deep nesting": ('{"a":{<entry>,"x":<nested>}}', True),
    "sides whose product is beyond 64 bits": (
        '{"a":{<entry>},"b":{"dtype":"F32","shape":[9223372036854775807,9223372036854775807,0],"data_offsets":[4,4]}}',
        True,
    ),
    "three offsets": ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}}', True),
    "no type": ('{"a":{"shape":[1],"data_offsets":[0,4]}}', True),
    "a field twice": ('{"a":{<entry>,"dtype":"F32"}}', True),
    "a control character": ('{"a\x01":{<entry>}}', True),
    "two values": ('{"a":{<entry>}} {}', True),
    "a comment": ('{"a":{<entry>}} // no', True),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_what_the_library_refuses_is_refused_without_it_and_with_it(tmp_path: Path, case: str) -> None:
    header, refused = HEADERS[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_header(written(header), b"0000"))
    assert refused_by_library(path) is refused
    assert refused_by_us(path) is refused
    with path.open("rb") as file:
        if refused:
            with pytest.raises(FileProblem, match="can't be read by the safetensors library"):
                require_readable(file)
        else:
            require_readable(file)


def test_null_metadata_and_unknown_fields_are_the_librarys_affair(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_header(written('{"__metadata__":null,"a":{<entry>}}'), b"0000"))
    assert refused_by_us(path) is refused_by_library(path)
    path.write_bytes(with_header(written('{"a":{<entry>,"x":1}}'), b"0000"))
    assert refused_by_us(path), "stricter: nobody writes others"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 1 << 65)
    | st.sampled_from([0, 4, 8])
    | st.floats()
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
FIELDS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16", "I64", "F4", "C64", "F99"]) | JSON,
        "shape": st.lists(st.integers(0, 4), max_size=3) | JSON,
        "data_offsets": st.sampled_from([[0, 4], [4, 8], [0, 8], [0, 0], [4, 4]]) | JSON,
    },
    optional={"more": JSON},
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__", "\ud800"]), FIELDS | JSON, max_size=3),
    st.sampled_from([0, 4, 8]),
)
@example({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, 4)
def test_nothing_that_the_library_refuses_is_accepted(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], size: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "odd.safetensors"
    path.write_bytes(with_header(json.dumps(header).encode(), b"0" * size))
    if refused_by_library(path):
        assert refused_by_us(path)


def test_the_library_is_asked_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header that our own parser knows nothing against."""
    path = adapter(tmp_path / "a", weights=safetensors(pair(Q)))
    checks.check_adapter(path)

    def refuse(*_: object, **__: object) -> None:
        raise SafetensorError("some rule of a version to come")

    monkeypatch.setattr("safetensors.safe_open", refuse)
    assert "can't be read by the safetensors library: some rule of a version to come" in problem(path).message
    monkeypatch.setitem(sys.modules, "safetensors", None)  # as in an image without it
    checks.check_adapter(path)
