"""rank_pattern and alpha_pattern: which keys go, what they may cost the engine, and engines that don't obey them."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from lora_operator.engine_plugin.checks import ProblemKind, check_adapter
from lora_operator.engine_plugin.patterns import PatternKey, take_too_long
from tests.unit.adapter_files import BASE, RANK, Q, adapter, pair, problem, safetensors

K = "model.layers.1.self_attn.k_proj"

# What PEFT writes and documents, and what trainers' options write, with a module that it matches.
GOOD_KEYS = {
    "q_proj": Q,
    "self_attn.q_proj": Q,
    Q: Q,
    "^model.decoder.layers.0.q_proj": "model.decoder.layers.0.q_proj",
    "model.layers.(0|1).self_attn.q_proj": Q,
    r"model\.layers\.(?:0|1)\.self_attn\.(q_proj|k_proj)": Q,
    r".*\.q_proj": Q,
    r".*\.layers\.1\..*k_proj$": K,
    r"layers\.\d+\.self_attn\.q_proj": Q,
    r"layers.[0-9]+.self_attn.[qk]_proj": Q,
    "q_proj|v_proj": Q,
    "self_attn.q_proj|self_attn.k_proj|mlp.down_proj": Q,
    r"layers\.(?:[0-9]|1[0-9])\.self_attn\.(?:[qk]_proj|v_proj)": Q,
    "experts.gate_up_proj": "model.layers.0.mlp.experts.gate_up_proj",
    "model.layers.(" + "|".join(map(str, range(80))) + ").self_attn.q_proj": Q,
}

BAD_KEYS = [
    "(a|aa)" * 32 + "[0-9]",  # exponential without any quantifier
    "(a+)+",
    "(a*)*b",
    ".*a.*b.*c",
    "(a|b){50}",
    "a{1,50}",
    "a?" * 8 + "a" * 8,
    r"(.*)\1",
    "(?=a)a",
    "(?P<n>q_proj)",
    "(",
    "[",
    "[z-a]",
    "(q_proj",
    "^a|b",
    "a|",
    "|",
    "a|.*",
    "(a|b)|c",
    "",
    "q_proj\n",
    "x" * 600,
]

# Names that make a matcher go back as often as the grammar allows for.
HOSTILE_NAMES = [
    "a" * 500,
    "a." * 250,
    "." * 500,
    "0" * 500,
    ("layers.0." * 60)[:500],
    "a" * 250 + "." * 250 + "b",
    ".q_proj" * 70 + "!",
]


@pytest.mark.parametrize("key", GOOD_KEYS)
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_keys_that_peft_writes_and_documents_are_accepted_and_mean_what_it_means(
    tmp_path: Path, field: str, key: str
) -> None:
    changes: dict[str, Any] = {field: {key: RANK}}
    check_adapter(adapter(tmp_path / "a", **changes))
    assert PatternKey.of(key).expression.match(GOOD_KEYS[key])


@pytest.mark.parametrize("key", BAD_KEYS, ids=lambda key: key[:20])
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_other_expressions_are_refused(tmp_path: Path, field: str, key: str) -> None:
    changes: dict[str, Any] = {field: {key: RANK}}
    found = problem(adapter(tmp_path / "a", **changes))
    assert found.kind is ProblemKind.INVALID
    assert f"the {field} key" in found.message


# The dearest that the grammar allows for, beside what people write.
DEAR_KEYS = [
    *GOOD_KEYS,
    ".*.*",
    ".*a.*b",
    ".+.+b",
    r"\d+\d+b",
    "(a|aa)(a|aa)b",
    "(a|aa|aaa|aaaa).*(a|aa|aaa|aaaa).*b",
    "." * 250,
    "a" * 500,
    ".*" + "a" * 400 + "b",
    ".*" + "a" * 250 + ".*" + "a" * 200 + "b",
    r"\d+\.\d+b",
    "(a|aa)" + "a" * 200 + "(a|aa)b",
    "[a-z]+a[a-z]+b",
    "." * 200 + ".*b",
    "(?:[ab]|a[a-c]).*(?:a|[a-c]b)c",
]


def test_every_accepted_key_matches_long_hostile_names_within_the_steps_that_it_is_taken_for() -> None:
    """Adapters are judged by those: ten nanoseconds a step; a slow and busy machine gets ten times that."""
    slow = 0
    for text in DEAR_KEYS:
        key = PatternKey.of(text)
        for name in HOSTILE_NAMES:
            digits = max(map(len, re.findall("[0-9]+", name)), default=0)
            steps = key.steps(length=len(name), dots=name.count("."), digits=digits)
            if steps > 20_000_000:  # no adapter with five such modules is accepted, see below
                slow += 1
                continue
            began = time.process_time()
            key.expression.match(name)
            assert time.process_time() - began < 0.05 + steps * 100e-9, (text, name[:20])
    assert slow < len(DEAR_KEYS) * len(HOSTILE_NAMES) / 4


@pytest.mark.parametrize(
    "names", [["a" * 400 + ".q_proj", "a." * 200 + "q_proj"], [f"m{n}.q_proj" for n in range(10_000)]]
)
def test_an_adapter_whose_keys_and_names_might_take_seconds_is_refused_quickly(
    tmp_path: Path, names: list[str]
) -> None:
    keys = {f".*{'x' * (1 + n % 20)}{n}.*{n}": RANK for n in range(256)}
    shapes = {name: shape for module in names for name, shape in pair(module).items()}
    path = adapter(tmp_path / "a", weights=safetensors(shapes), alpha_pattern=keys)
    began = time.process_time()
    found = problem(path)
    assert time.process_time() - began < 2
    assert "might hold up the engine" in found.message


@pytest.mark.parametrize(
    "text", ["(" * (1 << 20), "(a" * (1 << 19), "[" * (1 << 20), "a|" * (1 << 19), "." * (1 << 20)]
)
def test_a_key_of_a_megabyte_is_refused_at_once(tmp_path: Path, text: str) -> None:
    path = adapter(tmp_path / "a", alpha_pattern={text: 4})
    began = time.process_time()
    found = problem(path)
    assert time.process_time() - began < 0.5
    assert "the alpha_pattern key" in found.message


MIXTURE = [
    f"model.layers.{layer}.{kind}"
    for layer in range(48)
    for kind in (
        *(f"self_attn.{kind}_proj" for kind in "qkvo"),
        *(f"mlp.experts.{number}.{kind}_proj" for number in range(128) for kind in ("gate", "up", "down")),
    )
]


@pytest.mark.parametrize(
    ("keys", "quick"),
    {
        "globs in a row": (["model.layers.*.mlp.experts.*.down_proj"], True),
        "globs": ([r".*\.q_proj", r".*\.mlp\.experts\..*down_proj"], True),
        "digits": ([r"model\.layers\.\d+\.mlp\.experts\.\d+\.down_proj"], True),
        "a key for each layer": ([f"model.layers.{number}.self_attn.q_proj" for number in range(48)], True),
        "as many keys as there may be": ([f"model.layers.{number}.self_attn.q_proj" for number in range(256)], False),
        "all that is general": ([".*a.*b"], False),
    }.values(),
)
def test_what_large_mixtures_of_experts_may_have(keys: list[str], quick: bool) -> None:
    """Qwen3-MoE with adapters of all modules; vLLM's 18,624 matches of one key take 0.04 s."""
    assert take_too_long([PatternKey.of(key) for key in keys], MIXTURE) is not quick


def test_one_match_may_not_take_long(tmp_path: Path) -> None:
    name = "a" * 400
    path = adapter(
        tmp_path / "a", weights=safetensors(pair(name)), alpha_pattern={".*" + "a" * 150 + ".*" + "a" * 150 + "b": 4}
    )
    assert "might hold up the engine" in problem(path).message


def test_patterns_have_at_most_256_keys_together(tmp_path: Path) -> None:
    half = {f"m{number}": RANK for number in range(128)}
    check_adapter(adapter(tmp_path / "a", rank_pattern=half, alpha_pattern=half))
    found = problem(adapter(tmp_path / "a", rank_pattern=half, alpha_pattern=half | {"one_more": RANK}))
    assert "257 keys" in found.message


def test_a_modules_name_has_at_most_512_bytes(tmp_path: Path) -> None:
    check_adapter(adapter(tmp_path / "a", weights=safetensors(pair(f"{'a' * 400}.q_proj"))))
    found = problem(adapter(tmp_path / "a", weights=safetensors(pair(f"{'ä' * 250}.q_proj"))))
    assert "more than 512 bytes" in found.message


@pytest.mark.parametrize(
    ("changes", "rank"),
    [
        ({"rank_pattern": {r".*\.layers\.0\..*q_proj$": 4}}, 4),
        ({"rank_pattern": {r".*\.layers\.1\..*q_proj$": 4}}, RANK),
        ({"rank_pattern": {"(k|v)_proj": 4, r".*_proj": 1}}, 1),
    ],
)
def test_expressions_decide_about_the_rank_that_tensors_must_have(
    tmp_path: Path, changes: dict[str, Any], rank: int
) -> None:
    check_adapter(adapter(tmp_path / "a", weights=safetensors(pair(Q, rank=rank)), **changes), base=BASE)
    found = problem(adapter(tmp_path / "a", weights=safetensors(pair(Q, rank=3)), **changes), base=BASE)
    assert f"adapter_config.json says {rank}" in found.message


OLD, NEW = (0, 31), (0, 32)


@pytest.mark.parametrize(
    ("changes", "says"),
    {
        "another alpha": ({"alpha_pattern": {"q_proj": 64}}, "rank 2 and scale 32"),
        "another rank": ({"rank_pattern": {"q_proj": 4}, "r": 4, "alpha_pattern": {"q_proj": 8}}, "rank 4 and scale 2"),
        "an expression": ({"alpha_pattern": {r".*\.layers\.(0|1)\..*": 8}}, "rank 2 and scale 4"),
        "another rank of all": ({"r": 1, "rank_pattern": {"q_proj": RANK}}, "rank 2 and scale 2"),
    }.values(),
)
def test_engines_that_ignore_patterns_are_not_given_adapters_that_need_them(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    rank = 4 if changes.get("r") == 4 else RANK
    path = adapter(tmp_path / "a", weights=safetensors(pair(Q, rank=rank)), **changes)
    found = problem(path, base=BASE, engine=OLD)
    assert says in found.message
    assert "needs vLLM 0.32 or newer; this engine is 0.31: it would apply rank" in found.message
    for engine in (NEW, (1, 0), None):
        check_adapter(path, base=BASE, engine=engine)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rank_pattern": {}, "alpha_pattern": None},
        {"rank_pattern": {"q_proj": RANK}, "alpha_pattern": {".*": 4}},
        {"alpha_pattern": {"k_proj": 64}},  # of a module that the adapter does not have
        {"alpha_pattern": {"q_proj": 4.0, ".*": 64}},
    ],
    ids=str,
)
def test_patterns_that_change_nothing_are_good_for_every_engine(tmp_path: Path, changes: dict[str, Any]) -> None:
    check_adapter(adapter(tmp_path / "a", **changes), base=BASE, engine=OLD)


def test_of_scanned_pickles_any_pattern_counts_for_old_engines(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", alpha_pattern={"q_proj": 64})
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    check_adapter(path, scanned=["adapter_model.bin"], engine=NEW)
    found = problem(path, scanned=["adapter_model.bin"], engine=OLD)
    assert "need vLLM 0.32 or newer; this engine is 0.31" in found.message
    adapter(path, alpha_pattern={"q_proj": 4})
    (path / "adapter_model.safetensors").unlink()
    check_adapter(path, scanned=["adapter_model.bin"], engine=OLD)


@pytest.mark.parametrize(
    ("changes", "good"),
    [
        ({"lora_alpha": 2e4}, True),
        ({"lora_alpha": 2.1e4}, False),
        ({"lora_alpha": -2.1e4}, False),
        ({"lora_alpha": 1e308}, False),
        ({"lora_alpha": 10**300}, False),
        ({"lora_alpha": 14100, "use_rslora": True}, True),
        ({"lora_alpha": 14200, "use_rslora": True}, False),
        ({"alpha_pattern": {"q_proj": 1e9}}, False),
        ({"lora_alpha": 3e4, "r": 4, "rank_pattern": {"q_proj": 2}}, False),
        ({"lora_alpha": 0}, False),
        ({"lora_alpha": 0, "alpha_pattern": {"q_proj": 4}}, True),
    ],
    ids=str,
)
def test_scales_are_of_a_sane_size(tmp_path: Path, changes: dict[str, Any], good: bool) -> None:
    path = adapter(tmp_path / "a", **changes)
    if good:
        check_adapter(path)
        return
    found = problem(path)
    assert found.kind is ProblemKind.INVALID
    assert "lora_alpha" in found.message
