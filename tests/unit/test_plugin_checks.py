"""The adapter checks against hostile and honest files, made here byte by byte (the real model's are in e2e/test_engine_plugin.py)."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_operator.constants import Reason
from lora_operator.engine_plugin import values
from lora_operator.engine_plugin.basemodel import BaseModel
from lora_operator.engine_plugin.checks import (
    CONFIG,
    WEIGHTS,
    AdapterProblem,
    ProblemKind,
    check_adapter,
    read_base_model,
)
from tests.unit.adapter_files import (
    BASE,
    GOOD_CONFIG,
    HIDDEN,
    PREFIX,
    RANK,
    Q,
    Shapes,
    adapter,
    pair,
    problem,
    safetensors,
    with_header,
)


def test_kinds_of_problems_are_reasons_of_conditions() -> None:
    assert {kind.value for kind in ProblemKind} <= {reason.value for reason in Reason}


def test_a_good_adapter_is_described(tmp_path: Path) -> None:
    shapes = pair(Q) | pair("model.layers.1.self_attn.k_proj", rank=4, outputs=4)
    info = check_adapter(
        adapter(tmp_path / "a", weights=safetensors(shapes), rank_pattern={"k_proj": 4}), base=BASE, max_rank=4
    )
    assert (info.rank, info.target_modules, info.tensors) == (4, ("k_proj", "q_proj"), 4)
    assert info.size_bytes == (tmp_path / "a" / WEIGHTS).stat().st_size


def test_the_checks_need_the_standard_library_only() -> None:
    """They run in engines' images; with -S there are no site packages."""
    root = Path(__file__).resolve().parents[2] / "operator"
    code = "import lora_operator.engine_plugin.checks, lora_operator.engine_plugin.launcher, lora_operator.engine_plugin.admin_guard"
    subprocess.run([sys.executable, "-S", "-c", code], check=True, env={"PYTHONPATH": str(root)}, timeout=60)


@pytest.mark.parametrize(
    ("changes", "says"),
    {
        "alpha is infinite": ({"config": b'{"r": 2, "lora_alpha": 1e999, "target_modules": []}'}, "too large"),
        "alpha is NaN": ({"config": b'{"r": 2, "lora_alpha": NaN, "target_modules": []}'}, "NaN is not a number"),
        "r is true": ({"r": True}, "no whole number"),
        "r has 5000 digits": ({"config": b'{"r": ' + b"9" * 5000 + b"}"}, "not valid JSON"),
        "a key is there twice": ({"config": b'{"r": 2, "r": 3}'}, "twice"),
        "it nests too deeply": ({"config": b"[" * 200_000}, "nested too deeply"),
        "it is not UTF-8": ({"config": b'{"r": "\xff"}'}, "not UTF-8"),
        "it is a number": ({"config": b"8"}, "no JSON object"),
        "it is huge": ({"config": b" " * (5 << 20)}, "larger than"),
        "the rank pattern is no object": ({"rank_pattern": [1]}, "no object"),
        "a pattern loops for ever": ({"alpha_pattern": {"(a+)+": 8}}, "for ever"),
        "a pattern has many loops": ({"rank_pattern": {".*a.*b.*c.*d.*e.*": 2}}, "for ever"),
        "the type is no text": ({"peft_type": 7}, "only LORA"),
        "a target is no text": ({"target_modules": [1]}, "target_modules"),
        "a text leaves its line": ({"bias": "none\n\x1b[31m\u202eALERT"}, "'none [31m ALERT'"),
    }.values(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_configuration_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    found = problem(adapter(tmp_path / "a", **changes))
    assert found.kind is ProblemKind.INVALID
    assert says in found.message
    assert CONFIG in found.message


@pytest.mark.parametrize(
    "changes",
    [
        {"rank_pattern": {}, "alpha_pattern": None, "modules_to_save": None},
        {"use_rslora": True, "init_lora_weights": "Gaussian", "layer_replication": None},
        {"target_modules": r"model\.layers\..*(q|k)_proj"},
        {"bias": None, "peft_type": None},
        {"rank_pattern": {r"model.layers.(0|1).self_attn.q_proj": RANK}, "r": 16},
    ],
    ids=str,
)
def test_an_unusual_configuration_is_accepted(tmp_path: Path, changes: dict[str, Any]) -> None:
    check_adapter(adapter(tmp_path / "a", **changes), base=BASE, max_rank=16)


@pytest.mark.parametrize(
    ("weights", "says"),
    {
        "the header is longer than any": (struct.pack("<Q", 1 << 62), "more than the"),
        "the header is longer than the file": (struct.pack("<Q", 1000) + b"{}", "cut off inside its header"),
        "the header is no JSON": (with_header(b"{nope"), "not valid JSON"),
        "the header is a list": (with_header(b"[]"), "damaged header"),
        "the header nests too deeply": (with_header(b'{"a":' * 100_000), "nested too deeply"),
        "a tensor is there twice": (with_header(b'{"a": {}, "a": {}}'), "twice"),
        "a tensor is a number": (with_header(b'{"a": 1}'), "wrongly"),
        "a side is negative": (
            with_header(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', b"0000"),
            "no whole number",
        ),
        "a side is a float": (
            with_header(b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}', b"0000"),
            "no whole number",
        ),
        "the shape needs other bytes": (
            with_header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', b"0000"),
            "another number of bytes",
        ),
        "tensors overlap": (
            with_header(
                b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},'
                b' "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}',
                b"000",
            ),
            "overlap",
        ),
        "the type is unknown": (
            with_header(b'{"a": {"dtype": "F99", "shape": [], "data_offsets": [0, 4]}}', b"0000"),
            "unknown type",
        ),
        "the file is too long": (safetensors(pair(Q)) + b"\0", "1 bytes too many"),
        "the file is too short": (safetensors(pair(Q))[:-3], "3 bytes are missing"),
        "numbers are integers": (safetensors(pair(Q), dtype="I32"), "no floating-point"),
        "a tensor has no known name": (safetensors({f"{PREFIX}{Q}.lora_A.default.weight": (2, 8)}), "no plain LoRA"),
        "a tensor's name is hostile": (safetensors({f"{PREFIX}\u202e\n{'x' * 400}": (2, 8)}), "no plain LoRA"),
        "a magnitude vector is there": (
            safetensors(pair(Q) | {f"{PREFIX}{Q}.lora_magnitude_vector": (8,)}),
            "no plain LoRA",
        ),
        "a bias is there": (safetensors(pair(Q) | {f"{PREFIX}{Q}.lora_B.bias": (8,)}), "no plain LoRA"),
        "a head is there that was not saved": (safetensors(pair(Q) | {f"{PREFIX}score.weight": (2, 8)}), "no plain"),
        "tensors have three dimensions": (
            safetensors({f"{PREFIX}{Q}.lora_A.weight": (2, 8, 1), f"{PREFIX}{Q}.lora_B.weight": (8, 2, 1)}),
            "no matrices",
        ),
        "the two halves' ranks differ": (
            safetensors({f"{PREFIX}{Q}.lora_A.weight": (2, 8), f"{PREFIX}{Q}.lora_B.weight": (8, 4)}),
            "rank 2 and 4",
        ),
    }.values(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_weights_are_refused(tmp_path: Path, weights: bytes, says: str) -> None:
    found = problem(adapter(tmp_path / "a", weights=weights), base=BASE)
    assert found.kind is ProblemKind.INVALID
    assert says in found.message
    assert WEIGHTS in found.message


@pytest.mark.parametrize(
    ("shapes", "says"),
    {
        "another width": (pair(Q, inputs=16), "16 to 8 wide"),
        "an unknown kind of module": (pair("transformer.h.0.attn.c_attn"), "none of that kind"),
        "a layer that is not there": (pair("model.layers.7.self_attn.q_proj"), "would drop them"),
        "the model without its head's wrapper": (pair("layers.0.self_attn.q_proj"), "would drop them"),
    }.values(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_the_base_model_is_refused(tmp_path: Path, shapes: Shapes, says: str) -> None:
    path = adapter(tmp_path / "a", weights=safetensors(shapes))
    found = problem(path, base=BASE)
    assert found.kind is ProblemKind.INCOMPATIBLE
    assert says in found.message
    check_adapter(path)  # without a base model nothing can be said


@pytest.mark.parametrize(
    "shapes",
    {
        "a quantised module": pair("model.layers.0.mlp.packed_proj", inputs=64, outputs=60),
        "embeddings": {
            f"{PREFIX}model.embed_tokens.lora_embedding_A": (2, 32),
            f"{PREFIX}model.embed_tokens.lora_embedding_B": (HIDDEN, 2),
            f"{PREFIX}model.embed_tokens.base_layer.weight": (32, HIDDEN),
        },
        "a head that the checkpoint ties to the embeddings": pair("lm_head", outputs=32),
        "stacked experts": {
            f"{PREFIX}model.layers.0.mlp.experts.base_layer.lora_A.weight": (16, HIDDEN),
            f"{PREFIX}model.layers.0.mlp.experts.base_layer.lora_B.weight": (64, 16),
        },
        "modules under another root": pair("model.language_model.layers.0.self_attn.q_proj", inputs=60),
        "no prefix, but the engine's names": {
            name.removeprefix(PREFIX): shape for name, shape in pair(Q).items()
        },
    }.values(),
    ids=lambda value: next(iter(value)).removeprefix(PREFIX),
)  # fmt: skip
def test_what_may_fit_the_base_model_is_accepted(tmp_path: Path, shapes: Shapes) -> None:
    check_adapter(adapter(tmp_path / "a", weights=safetensors(shapes)), base=BASE)


def test_transposed_weights_are_compared_both_ways(tmp_path: Path) -> None:
    base = BaseModel.of({"h.0.c_attn": (HIDDEN, 24)})  # stored as (inputs, outputs)
    path = adapter(tmp_path / "a", weights=safetensors(pair("h.0.c_attn", outputs=24)), fan_in_fan_out=True)
    check_adapter(path, base=base)
    assert problem(adapter(path, weights=safetensors(pair("h.0.c_attn", outputs=24))), base=base).kind is (
        ProblemKind.INCOMPATIBLE
    )


def test_a_saved_classification_head_is_accepted(tmp_path: Path) -> None:
    weights = safetensors(pair(Q) | {f"{PREFIX}score.weight": (2, 8)})
    check_adapter(adapter(tmp_path / "a", weights=weights, modules_to_save=["score"]), base=BASE)


def test_only_the_rank_pattern_that_matches_first_counts(tmp_path: Path) -> None:
    weights = safetensors(pair(Q, rank=4))
    check_adapter(adapter(tmp_path / "a", weights=weights, rank_pattern={"self_attn.q_proj": 4, "q_proj": 8}))
    found = problem(adapter(tmp_path / "b", weights=weights, rank_pattern={"q_proj": 8, Q: 4}))
    assert "says 8" in found.message


def test_pickle_files_are_unsafe_and_only_looked_for_without_safetensors(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a")
    (path / "adapter_model.bin").write_bytes(b"cposix\nsystem\n")
    check_adapter(path)
    (path / WEIGHTS).unlink()
    assert problem(path).kind is ProblemKind.UNSAFE


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_links_may_not_leave_the_root_and_special_files_are_never_opened(tmp_path: Path, name: str) -> None:
    root = tmp_path / "cache"
    root.mkdir()
    path = adapter(root / "a")
    blob = root / "blob"
    (path / name).rename(blob)
    (path / name).symlink_to("../blob")
    check_adapter(path, root=root)
    outside = blob.rename(tmp_path / "outside")
    (path / name).unlink()
    (path / name).symlink_to(outside)
    check_adapter(path)
    assert "leads out of the cache" in problem(path, root=root).message
    (path / name).unlink()
    os.mkfifo(path / name)  # opening it to read would wait for a writer
    assert "not a regular file" in problem(path, root=root).message
    (path / name).unlink()
    (path / name).symlink_to(path / name)
    assert problem(path, root=root).kind is ProblemKind.INVALID


@pytest.mark.parametrize("path", ["/nonexistent/lora", "/proc/self/environ", "/tmp/\0", "relative"], ids=repr)
def test_a_path_that_is_no_folder_is_a_problem(path: str) -> None:
    assert problem(Path(path)).kind is ProblemKind.INVALID


# Values as the file has them, little-endian: all but the last two of each type are finite.
VALUES = {
    "F32": (4, [struct.pack("<f", v) for v in (0.0, -1.5, 65504.0, -65504.0, 40000.0, 1e-45)], [b"\0\0\x80\x7f", b"\1\0\x80\xff"]),
    "F64": (8, [struct.pack("<d", v) for v in (0.0, 65504.0, -65504.0, 5e-324)], [struct.pack("<d", float("inf")), b"\1" * 6 + b"\xf1\x7f"]),
    "F16": (2, [struct.pack("<e", v) for v in (0.0, 65504.0, -65504.0)], [b"\0\x7c", b"\1\xfe"]),
    "BF16": (2, [b"\0\0", b"\x7f\x47", b"\x7f\xc7", b"\xff\x46"], [b"\x80\x7f", b"\xc0\xff"]),
    "F8_E5M2": (1, [b"\0", b"\x7b", b"\xfb"], [b"\x7c", b"\xff"]),
    "F8_E4M3": (1, [b"\0", b"\x7e", b"\xfe"], [b"\x7f", b"\xff"]),
}  # fmt: skip


@pytest.mark.parametrize("dtype", VALUES)
def test_values_that_are_not_finite_are_found(tmp_path: Path, dtype: str) -> None:
    width, finite, special = VALUES[dtype]
    shapes = pair(Q)
    count = 2 * RANK * HIDDEN
    empty = safetensors(shapes, dtype=dtype, width=width)
    header = empty[: len(empty) - count * width]
    values = [finite[index % len(finite)] for index in range(count)]
    path = adapter(tmp_path / "a", weights=header + b"".join(values))
    check_adapter(path, scan_values=True)
    for place, bad in ((0, special[0]), (count - 1, special[1]), (RANK * HIDDEN, special[0])):
        changed = [*values[:place], bad, *values[place + 1 :]]
        adapter(path, weights=header + b"".join(changed))
        check_adapter(path)
        found = problem(path, scan_values=True)
        assert ("lora_A" if place == 0 else "lora_B") in found.message


def test_the_scan_crosses_its_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "_CHUNK", 16)
    weights = bytearray(safetensors(pair(Q)))
    path = adapter(tmp_path / "a", weights=bytes(weights))
    check_adapter(path, scan_values=True)
    weights[-4:] = struct.pack("<f", float("nan"))
    adapter(path, weights=bytes(weights))
    assert "lora_B" in problem(path, scan_values=True).message


@settings(max_examples=200, deadline=None)
@given(config=st.binary(max_size=200), weights=st.binary(max_size=200))
def test_nothing_but_a_problem_comes_of_random_bytes(
    tmp_path_factory: pytest.TempPathFactory, config: bytes, weights: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "random"
    problem(adapter(path, config=config, weights=weights))
    problem(adapter(path, weights=with_header(weights, config)), base=BASE)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([*GOOD_CONFIG, "rank_pattern", "alpha_pattern", "modules_to_save"]), JSON), JSON)
def test_nothing_but_a_problem_comes_of_random_json(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], entry: Any
) -> None:
    path = adapter(tmp_path_factory.getbasetemp() / "json", config=GOOD_CONFIG | changes)
    with contextlib.suppress(AdapterProblem):
        check_adapter(path, base=BASE, max_rank=16)
    header = {f"{PREFIX}{Q}.lora_A.weight": entry}
    problem(adapter(path, weights=with_header(json.dumps(header).encode())))


def test_base_models_are_read_from_headers_of_one_file_or_of_an_index(tmp_path: Path) -> None:
    single = tmp_path / "single"
    single.mkdir()
    (single / "model.safetensors").write_bytes(safetensors({"a.q_proj.weight": (4, 8), "a.norm.weight": (8,)}))
    base = read_base_model(single)
    assert dict(base.modules) == {"a.q_proj": (4, 8), "a.norm": None}
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    (sharded / "m-1.safetensors").write_bytes(safetensors({"a.q_proj.qweight": (4, 8)}, dtype="I32"))
    (sharded / "m-2.safetensors").write_bytes(safetensors({"a.k_proj.weight": (4, 8)}))
    index = {"weight_map": {"a.q_proj.qweight": "m-1.safetensors", "a.k_proj.weight": "m-2.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert dict(read_base_model(sharded).modules) == {"a.q_proj": None, "a.k_proj": (4, 8)}, "no scales: not known"
    (sharded / "m-2.safetensors").unlink()
    with pytest.raises(AdapterProblem, match=r"m-2\.safetensors' is missing"):
        read_base_model(sharded)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../m.safetensors"}}))
    with pytest.raises(AdapterProblem, match="no plain file name"):
        read_base_model(sharded)


# Parameters of a module of 64 inputs and 32 outputs in 4 bits, by what the files of each method hold.
QUANTISED: dict[str, tuple[dict[str, tuple[int, ...]], tuple[int | None, int | None]]] = {
    "GPTQ": ({"qweight": (8, 32), "qzeros": (2, 4), "scales": (2, 32), "g_idx": (64,)}, (32, 64)),
    "GPTQ without groups' order": ({"qweight": (8, 32), "qzeros": (2, 4), "scales": (2, 32)}, (32, None)),
    "GPTQ in 8 bits": ({"qweight": (16, 32), "qzeros": (2, 8), "scales": (2, 32), "g_idx": (64,)}, (32, 64)),
    "AWQ": ({"qweight": (64, 4), "qzeros": (2, 4), "scales": (2, 32), "bias": (32,)}, (32, 64)),
    "compressed-tensors": ({"weight_packed": (32, 8), "weight_scale": (32, 2), "weight_shape": (2,)}, (32, None)),
}


@pytest.mark.parametrize("method", QUANTISED)
def test_the_widths_of_quantised_modules_are_those_of_the_module(tmp_path: Path, method: str) -> None:
    parameters, shape = QUANTISED[method]
    base = tmp_path / "base"
    base.mkdir()
    # Parts of one module may lie in several files.
    for name, size in parameters.items():
        (base / f"model-{name}.safetensors").write_bytes(safetensors({f"{Q}.{name}": size}, dtype="I32"))
    found = read_base_model(base)
    assert dict(found.modules) == {Q: shape}
    right = safetensors(pair(Q, inputs=64, outputs=32))
    check_adapter(adapter(tmp_path / "good", weights=right), base=found)
    wrong = problem(adapter(tmp_path / "bad", weights=safetensors(pair(Q, inputs=64, outputs=4))), base=found)
    assert (wrong.kind, "as 64 to 4 wide" in wrong.message) == (ProblemKind.INCOMPATIBLE, True)
    other = problem(
        adapter(tmp_path / "other", weights=safetensors(pair("model.layers.0.self_attn.o_proj"))), base=found
    )
    assert "has none of that kind" in other.message


@pytest.mark.parametrize(("dtype", "width"), [("U8", 1), ("I8", 1)])
def test_the_widths_of_weights_in_whole_bytes_are_not_judged(tmp_path: Path, dtype: str, width: int) -> None:
    weights = safetensors({f"{Q}.weight": (128, 1)}, dtype=dtype, width=width)
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert dict(read_base_model(tmp_path).modules) == {Q: None}


def test_everything_fits_a_model_in_mistrals_own_format_whose_modules_have_other_names(tmp_path: Path) -> None:
    (tmp_path / "consolidated.safetensors").write_bytes(safetensors({"layers.0.attention.wq.weight": (4, 8)}))
    base = read_base_model(tmp_path)
    check_adapter(adapter(tmp_path / "a"), base=base)
    (tmp_path / "consolidated.safetensors").write_bytes(b"short")
    with pytest.raises(AdapterProblem, match=r"'consolidated\.safetensors' is too short"):
        read_base_model(tmp_path)


def test_pickled_base_models_are_not_opened_but_must_be_all_there(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "1.bin", "b": "2.bin"}}))
    for name in ("1.bin", "2.bin"):
        with pytest.raises(AdapterProblem, match=f"'{name}' is missing, and pytorch_model.bin.index.json names it"):
            read_base_model(tmp_path)
        (tmp_path / name).write_bytes(b"never read")
    assert not read_base_model(tmp_path).modules


def test_everything_fits_a_base_model_without_safetensors(tmp_path: Path) -> None:
    base = read_base_model(tmp_path)
    check_adapter(adapter(tmp_path / "a", weights=safetensors(pair("any.module", inputs=99))), base=base)
