"""Which files of a listing are wanted, and which listings are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch.content.file_names import MAX_FILES
from lora_operator.fetch.content.select import Kind, Options, RemoteFile, choose

OID = "0" * 40
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
MODEL = ("config.json", "model.safetensors", "tokenizer.json")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def listed(*paths: str) -> list[RemoteFile]:
    return [RemoteFile(path=path, size=1, git_oid=OID, sha256=None) for path in paths]


WANTED: dict[str, tuple[Kind, dict[str, object], tuple[str, ...], tuple[str, ...]]] = {
    "an adapter's own files and its tokenizer, without pickles, trainer state, pictures and readme": (
        "Adapter",
        {},
        (
            *ADAPTER, "adapter_model.bin", "optimizer.pt", "training_args.bin", "trainer_state.json", "README.md", "a.png",
            ".gitattributes", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "special_tokens_map.json",
        ),
        (*ADAPTER, "chat_template.jinja", "special_tokens_map.json", "tokenizer.json", "tokenizer.model"),
    ),
    "the adapter at the root, not its checkpoints": (
        "Adapter",
        {},
        (*ADAPTER, "checkpoint-500/adapter_config.json", "checkpoint-500/adapter_model.safetensors"),
        ADAPTER,
    ),
    "the adapter in the folder, named from there": (
        "Adapter",
        {"folder": "checkpoint-500/"},
        (*ADAPTER, "checkpoint-500/adapter_config.json", "checkpoint-500/adapter_model.safetensors", "checkpoint-5/x.json"),
        ADAPTER,
    ),
    "not a merged model that lies beside the adapter": (
        "Adapter",
        {},
        (*ADAPTER, "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        ADAPTER,
    ),
    "patterns of the user in place of the defaults": (
        "Adapter",
        {"allow": ["adapter_*"], "ignore": ["*.md"]},
        (*ADAPTER, "tokenizer.json", "adapter_card.md"),
        ADAPTER,
    ),
    "never a pickle for an adapter, whatever is asked for": (
        "Adapter", {"allow": ["*"]}, (*ADAPTER, "adapter_model.bin", "x.PT"), ADAPTER,
    ),
    "the one pickle that vLLM reads, where pickled weights are allowed and there are no others": (
        "Adapter",
        {"options": Options(pickled_weights=True)},
        ("adapter_config.json", "adapter_model.bin", "adapter_model.pt", "adapter_model.pkl", "other.bin", "training_args.bin"),
        ("adapter_config.json", "adapter_model.bin"),
    ),
    "no pickle where there are safetensors, be it allowed or not": (
        "Adapter", {"allow": ["*"], "options": Options(pickled_weights=True)}, (*ADAPTER, "adapter_model.bin"), ADAPTER,
    ),
    "never the manifest's own name": ("Adapter", {"allow": ["*"]}, (*ADAPTER, ".lora-operator.json"), ADAPTER),
    "ignored files less": ("Adapter", {"ignore": ["tokenizer*"]}, (*ADAPTER, "tokenizer.json"), ADAPTER),
    "a base model's safetensors and no second copy of the weights": (
        "BaseModel",
        {},
        (
            *MODEL, "pytorch_model.bin", "consolidated.safetensors", "original/consolidated.00.pth", "original/params.json",
            "onnx/model.onnx", "onnx/config.json", "model.gguf", "fp16/model.safetensors", "generation_config.json",
            "chat_template.jinja", "merges.txt", "README.md", "logo.png", "1_Pooling/config.json", "flax_model.msgpack",
        ),
        (
            "1_Pooling/config.json", "chat_template.jinja", "config.json", "generation_config.json", "merges.txt",
            "model.safetensors", "tokenizer.json",
        ),
    ),
    "a base model's only weights, be they pickles": (
        "BaseModel",
        {},
        ("config.json", "tokenizer.model", "pytorch_model.bin", "training_args.bin", "model.pt"),
        ("config.json", "pytorch_model.bin", "tokenizer.model"),
    ),
    "consolidated weights when there are no others": (
        "BaseModel",
        {},
        ("config.json", "tekken.json", "consolidated.safetensors"),
        ("config.json", "consolidated.safetensors", "tekken.json"),
    ),
    "safetensors where they are asked for, with their own index alone": (
        "BaseModel",
        {"options": Options(load_format="safetensors")},
        (
            "config.json", "tokenizer.json", *SHARDS, "model.safetensors.index.json", "pytorch_model.bin",
            "pytorch_model.bin.index.json", "consolidated.safetensors", "consolidated.safetensors.index.json",
        ),
        ("config.json", "tokenizer.json", *SHARDS, "model.safetensors.index.json"),
    ),
    "Mistral's own files where they are asked for, without the index of the others": (
        "BaseModel",
        {"options": Options(load_format="mistral")},
        ("params.json", "tekken.json", "consolidated.safetensors", *SHARDS, "model.safetensors.index.json"),
        ("params.json", "tekken.json", "consolidated.safetensors"),
    ),
    "*.pt where they are asked for, as vLLM reads them, though there are safetensors": (
        "BaseModel",
        {"options": Options(load_format="pt")},
        (*MODEL, "gptq-4bit.pt", "pytorch_model.bin", "rng_state_0.pth", "optimizer.pt"),
        ("config.json", "gptq-4bit.pt", "tokenizer.json"),
    ),
    "all shards of pickled weights with their index": (
        "BaseModel",
        {"options": Options(load_format="hf")},
        ("config.json", "tokenizer.model", "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json", "consolidated.safetensors"),
        ("config.json", "tokenizer.model", "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"),
    ),
    "the model's Python files where they are trusted": (
        "BaseModel",
        {"options": Options(code=True)},
        (*MODEL, "modeling_x.py", "lib/kernel.py", "lib/kernel.so", "original/run.py"),
        (*MODEL, "lib/kernel.py", "modeling_x.py"),
    ),
    "no code where it is not trusted, whatever the patterns ask for": (
        "BaseModel", {"allow": ["*"]}, (*MODEL, "modeling_x.py", "a/X.PY", "kernel.so", "old.pyc"), MODEL,
    ),
    "no code for an adapter ever": (
        "Adapter", {"allow": ["*"], "options": Options(code=True)}, (*ADAPTER, "x.py"), ADAPTER,
    ),
    "a model without tokenizer where another one is given": (
        "BaseModel", {"options": Options(own_tokenizer=False)}, MODEL[:2], MODEL[:2],
    ),
    "a tokenizer's own files out of a whole model": (
        "Tokenizer",
        {},
        (*MODEL, "model.safetensors.index.json", "tokenizer_config.json", "merges.txt", "tokenization_x.py", "onnx/tokenizer.json", "x/a.json"),
        ("config.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"),
    ),
    "a tokenizer's Python files where they are trusted": (
        "Tokenizer", {"options": Options(code=True)}, ("tokenizer.model", "tokenization_x.py"), ("tokenization_x.py", "tokenizer.model"),
    ),
    "a folder pattern as everything in it": (
        "BaseModel",
        {"allow": ["*.json", "model.safetensors", "extra/"]},
        (*MODEL, "extra/a/b.bin"),
        ("config.json", "extra/a/b.bin", "model.safetensors", "tokenizer.json"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("sentence", WANTED)
def test_wants(sentence: str) -> None:
    kind, options, paths, expected = WANTED[sentence]
    assert tuple(file.name for file in choose(listed(*paths), kind=kind, **options)) == tuple(sorted(expected))  # type: ignore[arg-type]


REFUSED: dict[str, tuple[Kind, dict[str, object], tuple[str, ...], Reason, str]] = {
    "an empty repository": ("Adapter", {}, (), Reason.ENTRY_NOT_FOUND, "no files"),
    "a folder that is not there, naming those that are": (
        "Adapter", {"folder": "checkpoint-5"}, (*ADAPTER, "checkpoint-50/x.json"), Reason.ENTRY_NOT_FOUND, "checkpoint-50",
    ),
    "a folder that is a file": ("Adapter", {"folder": "adapter_config.json"}, ADAPTER, Reason.ENTRY_NOT_FOUND, "is a file"),
    "a folder outside": ("Adapter", {"folder": "../x"}, ADAPTER, Reason.ENTRY_NOT_FOUND, "not a folder inside"),
    "an absolute folder": ("Adapter", {"folder": "/x"}, ADAPTER, Reason.ENTRY_NOT_FOUND, "not a folder inside"),
    "pickled adapters": ("Adapter", {}, ("adapter_config.json", "adapter_model.bin"), Reason.UNSAFE_FORMAT, "adapter_model.bin"),
    "pickled adapters that the patterns ask for": (
        "Adapter", {"allow": ["*"]}, ("adapter_config.json", "adapter_model.pt"), Reason.UNSAFE_FORMAT, "adapter_model.pt",
    ),
    "a pickle of a name that vLLM does not read, though pickled weights are allowed": (
        "Adapter", {"options": Options(pickled_weights=True)}, ("adapter_config.json", "adapter_model.pkl"),
        Reason.UNSAFE_FORMAT, "adapter_model.pkl), which can run code when read; convert them to adapter_model.safetensors",
    ),
    "an ignored pickle, though pickled weights are allowed": (
        "Adapter", {"ignore": ["*.bin"], "options": Options(pickled_weights=True)}, ("adapter_config.json", "adapter_model.bin"),
        Reason.UNSAFE_FORMAT, "adapter_model.bin",
    ),
    "a pickle that lies on the cache's volume already, though pickled weights are allowed": (
        "Adapter", {"options": Options(pickled_weights=True, in_place=True)}, ("adapter_config.json", "adapter_model.bin"),
        Reason.UNSAFE_FORMAT, "adapter_model.bin), which can run code when read; convert them to adapter_model.safetensors; those that lie "
        "on the cache's volume already are not taken after a scan either",
    ),
    "an adapter without weights": (
        "Adapter", {}, ("adapter_config.json", "training_args.bin"), Reason.INVALID_ADAPTER, "no adapter_model.safetensors",
    ),
    "no adapter at all": ("Adapter", {}, MODEL, Reason.INVALID_ADAPTER, "no adapter_config.json"),
    "an adapter in a folder that was not named": (
        "Adapter", {}, ("checkpoint-5/adapter_config.json", "README.md"), Reason.INVALID_ADAPTER, "checkpoint-5",
    ),
    "an adapter whose configuration the patterns leave out": (
        "Adapter", {"allow": ["*.safetensors"]}, ADAPTER, Reason.INVALID_ADAPTER, "the chosen files have no adapter_config.json",
    ),
    "a model without configuration": ("BaseModel", {}, MODEL[1:], Reason.INCOMPLETE_MODEL, "config.json"),
    "a model without weights": ("BaseModel", {}, ("config.json", "tokenizer.json"), Reason.INCOMPLETE_MODEL, "weights"),
    "a model without tokenizer": ("BaseModel", {}, MODEL[:2], Reason.INCOMPLETE_MODEL, "a tokenizer"),
    "a model without some of its shards, naming them": (
        "BaseModel", {}, ("config.json", "tokenizer.json", "model-00002-of-00003.safetensors"), Reason.INCOMPLETE_MODEL,
        "lacks model-00001-of-00003.safetensors, model-00003-of-00003.safetensors",
    ),
    "all that is missing at once": (
        "BaseModel", {}, ("README.md", "pytorch_model-00001-of-00002.bin"), Reason.INCOMPLETE_MODEL,
        "lacks config.json, pytorch_model-00002-of-00002.bin, a tokenizer (tokenizer.json, tokenizer.model or another "
        "tokenizer's file; or set model.tokenizer)",
    ),
    "a model without weights of the format, naming what there is": (
        "BaseModel", {"options": Options(load_format="pt")}, ("config.json", "tokenizer.json", "pytorch_model.bin"),
        Reason.INCOMPLETE_MODEL,
        "lacks weights (*.pt), which loadFormat pt reads; it has pytorch_model.bin: loadFormat auto takes those",
    ),
    "a model without safetensors where no pickle is wanted": (
        "BaseModel", {"options": Options(load_format="safetensors")}, ("config.json", "tokenizer.json", "pytorch_model.bin"),
        Reason.INCOMPLETE_MODEL, "weights (*.safetensors), which loadFormat safetensors reads",
    ),
    "a tokenizer that is none": ("Tokenizer", {}, ("config.json", "model.safetensors"), Reason.INCOMPLETE_MODEL, "no tokenizer"),
    "patterns that match nothing": ("BaseModel", {"allow": ["nope"]}, MODEL, Reason.ENTRY_NOT_FOUND, "allowPatterns"),
}  # fmt: skip


@pytest.mark.parametrize("sentence", REFUSED)
def test_refuses(sentence: str) -> None:
    kind, options, paths, reason, words = REFUSED[sentence]
    with pytest.raises(ReasonError) as caught:
        choose(listed(*paths), kind=kind, **options)  # type: ignore[arg-type]
    assert caught.value.reason is reason
    assert words in caught.value.message


HOSTILE = {
    "parent folder": "../evil.json",
    "parent folder inside": "a/../../evil.json",
    "absolute": "/etc/evil.json",
    "empty part": "a//evil.json",
    "here": "./evil.json",
    "backslash": "..\\evil.json",
    "line break": "evil\n.json",
    "nul": "evil\0.json",
    "escape": "evil\x1b[2J.json",
    "right-to-left override": "evil\u202etxt.json",
    "half a surrogate": "evil\ud800.json",
    "long part": "e" * 256 + ".json",
    "long path": "/".join(["evil"] * 300) + ".json",
    "same but for case": "CONFIG.json",
    "same but for width": "ｃonfig.json",
    "a file that is also a folder": "config.json/evil.json",
    "a folder that differs in case": "Config.json/evil.json",
    "the manifest's name in a folder": "a/.lora-operator.json",
}


@pytest.mark.parametrize("trick", HOSTILE)
def test_a_wanted_file_with_a_hostile_name_is_refused_and_can_be_left_out(trick: str) -> None:
    names = (*MODEL, HOSTILE[trick])
    with pytest.raises(ReasonError) as caught:
        choose(listed(*names), kind="BaseModel", allow=["*"])
    assert caught.value.reason is Reason.INCOMPLETE_MODEL
    assert caught.value.message.isprintable()
    ignore = ["*evil*", "CONFIG*", "ｃ*", "eee*", "a/*"]
    kept = choose(listed(*names), kind="BaseModel", allow=["*"], ignore=ignore)
    assert [file.name for file in kept] == sorted(MODEL)


def test_the_number_of_files_is_bounded() -> None:
    with pytest.raises(ReasonError, match="more than 2000"):
        choose(listed(*MODEL, *(f"{n}.json" for n in range(MAX_FILES))), kind="BaseModel")


@given(st.lists(st.text(min_size=1, max_size=20), max_size=8, unique=True))
def test_whatever_is_chosen_stays_inside_and_apart(names: list[str]) -> None:
    try:
        chosen = choose(listed(*MODEL, *names), kind="BaseModel", allow=["*"])
    except ReasonError:
        return
    for file in chosen:
        assert not file.name.startswith("/")
        assert not {"", ".", ".."} & set(file.name.split("/"))
        assert "\0" not in file.name
    assert len({file.name.casefold() for file in chosen}) == len(chosen)
