"""Adapters made byte by byte, and the base model that they are for, for the tests of the checks."""

from __future__ import annotations

import json
import struct
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lora_operator.engine_plugin.basemodel import BaseModel
from lora_operator.engine_plugin.checks import CONFIG, WEIGHTS, AdapterProblem, check_adapter

PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
HIDDEN, RANK = 8, 2
BASE = BaseModel.of(
    {
        "model.embed_tokens": (32, HIDDEN),
        **{
            f"model.layers.{layer}.{module}": shape
            for layer in (0, 1)
            for module, shape in {
                "self_attn.q_proj": (HIDDEN, HIDDEN),
                "self_attn.k_proj": (4, HIDDEN),
                "self_attn.v_proj": (4, HIDDEN),
                "mlp.gate_up_proj": (32, HIDDEN),
                "mlp.packed_proj": None,
                "mlp.gate": (4, HIDDEN),
                "mlp.experts.0.w1": (16, HIDDEN),
            }.items()
        },
    }
)
GOOD_CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": RANK,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "bias": "none",
}

Shapes = Mapping[str, tuple[int, ...]]


def pair(module: str, *, rank: int = RANK, inputs: int = HIDDEN, outputs: int = HIDDEN) -> dict[str, tuple[int, ...]]:
    """The two tensors of one module."""
    return {
        f"{PREFIX}{module}.lora_A.weight": (rank, inputs),
        f"{PREFIX}{module}.lora_B.weight": (outputs, rank),
    }


def safetensors(shapes: Shapes, *, dtype: str = "F32", width: int = 4, fill: bytes = b"\1") -> bytes:
    """A file with tensors of these shapes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = width
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    return with_header(json.dumps(header).encode(), fill * offset)


def with_header(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def adapter(folder: Path, *, weights: bytes | None = None, config: Any = None, **changes: Any) -> Path:
    """An adapter on disk; `changes` are of the good configuration, None takes a field away."""
    folder.mkdir(exist_ok=True)
    fields = {key: value for key, value in (GOOD_CONFIG | changes).items() if value is not None}
    text = config if isinstance(config, bytes) else json.dumps(fields if config is None else config).encode()
    (folder / CONFIG).write_bytes(text)
    (folder / WEIGHTS).write_bytes(safetensors(pair(Q)) if weights is None else weights)
    return folder


def problem(path: Path, **options: Any) -> AdapterProblem:
    """What the checks find; every message is fit to be shown."""
    with pytest.raises(AdapterProblem) as caught:
        check_adapter(path, **options)
    message = caught.value.message
    assert 0 < len(message) <= 600
    assert not any(unicodedata.category(char).startswith("C") for char in message)
    return caught.value
