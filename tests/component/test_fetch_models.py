"""The download program with what base models and tokenizers may ask for, against the Hub fixture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.fixtures.hub import HubServer
from lora_operator.desired.job import build_request
from tests.component.fetch_support import Fetcher, make_base
from tests.unit.builders import make_artifact, make_cache


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a base model."""
    return make_base(tmp_path_factory.mktemp("content") / "base")


@pytest.fixture
def hub(base: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.create_repo("org/base")
        server.commit("org/base", base)
        yield server


@pytest.fixture
def fetcher(hub: HubServer, tmp_path: Path) -> Fetcher:
    """One with an empty cache."""
    (tmp_path / "cache").mkdir()
    return Fetcher(hub.url, tmp_path / "cache", tmp_path / "jobs")


def bodies(hub: HubServer, repo: str) -> dict[str, int]:
    """How often each file was downloaded."""
    return {path: count for path, count in hub.downloads(repo).items() if count}


def test_a_base_model_in_a_folder_is_a_view_of_that_folder(hub: HubServer, fetcher: Fetcher, base: Path) -> None:
    files = {f"checkpoint-500/{path.name}": path.read_bytes() for path in base.iterdir()}
    hub.create_repo("org/folders")
    hub.commit(
        "org/folders", files | {"config.json": b"{}", "model.safetensors": b"another model's", "other/x.json": b"{}"}
    )
    result = fetcher.run("org/folders", type="BaseModel", path="checkpoint-500").ok
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert [file.path for file in fetcher.manifest(result).files] == names
    assert bodies(hub, "org/folders") == {f"checkpoint-500/{name}": 1 for name in names}
    model = fetcher.cache / result.path / "model.safetensors"
    assert model.read_bytes() == (base / "model.safetensors").read_bytes()


def test_python_files_are_not_even_downloaded_unless_they_are_trusted(
    hub: HubServer, fetcher: Fetcher, base: Path
) -> None:
    files = {path.name: path.read_bytes() for path in base.iterdir()}
    hub.create_repo("org/code")
    hub.commit("org/code", files | {"modeling_x.py": b"print('run')", "kernel.so": b"\x7fELF"})
    for patterns in ([], ["*"]):
        plain = fetcher.run("org/code", type="BaseModel", allowPatterns=patterns).ok
        assert not [file.path for file in fetcher.manifest(plain).files if file.path.endswith((".py", ".so"))]
    assert not {"modeling_x.py", "kernel.so"} & bodies(hub, "org/code").keys()
    trusted = fetcher.run("org/code", type="BaseModel", want={"trustRemoteCode": True}).ok
    assert "modeling_x.py" in [file.path for file in fetcher.manifest(trusted).files]
    assert bodies(hub, "org/code")["model.safetensors"] == 1, "what both have was there"


def test_the_format_says_which_weights_are_downloaded(hub: HubServer, fetcher: Fetcher, base: Path) -> None:
    files = {path.name: path.read_bytes() for path in base.iterdir()}
    hub.create_repo("org/formats")
    hub.commit("org/formats", files | {"pytorch_model.bin": b"pickled", "model.pt": b"older"})
    weights = {}
    for load_format in ("auto", "safetensors", "pt"):
        result = fetcher.run("org/formats", type="BaseModel", want={"loadFormat": load_format}).ok
        names = [file.path for file in fetcher.manifest(result).files]
        weights[load_format] = [name for name in names if name.startswith(("model.", "pytorch"))]
    assert weights == {"auto": ["model.safetensors"], "safetensors": ["model.safetensors"], "pt": ["model.pt"]}
    assert "pytorch_model.bin" not in bodies(hub, "org/formats")
    reason, message = fetcher.run("org/formats", type="BaseModel", want={"loadFormat": "mistral"}).failed
    assert (reason, "weights (consolidated*.safetensors), which loadFormat mistral reads" in message) == (
        "IncompleteModel",
        True,
    )


def test_a_tokenizer_alone_and_a_model_that_needs_none(hub: HubServer, fetcher: Fetcher, base: Path) -> None:
    tokenizer = fetcher.run("org/base", type="Tokenizer").ok
    names = [file.path for file in fetcher.manifest(tokenizer).files]
    assert names == ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert "model.safetensors" not in bodies(hub, "org/base")
    files = {path.name: path.read_bytes() for path in base.iterdir() if "token" not in path.name}
    hub.create_repo("org/bare")
    hub.commit("org/bare", files)
    assert fetcher.run("org/bare", type="BaseModel", want={"withoutTokenizer": True}).ok.files == 3
    for type_ in ("BaseModel", "Tokenizer"):
        reason, message = fetcher.run("org/bare", type=type_).failed
        assert (reason, "tokenizer.json" in message) == ("IncompleteModel", True)


def test_a_pickled_base_model_that_lacks_a_file_of_its_index(hub: HubServer, fetcher: Fetcher, base: Path) -> None:
    files = {path.name: path.read_bytes() for path in base.iterdir() if path.suffix == ".json"}
    index = {"weight_map": {"a": "pytorch_model.bin", "b": "pytorch_model_b.bin"}}
    files |= {"pytorch_model.bin": b"x", "pytorch_model.bin.index.json": json.dumps(index).encode()}
    hub.create_repo("org/pickled")
    hub.commit("org/pickled", files)
    reason, message = fetcher.run("org/pickled", type="BaseModel").failed
    assert (reason, "'pytorch_model_b.bin' is missing" in message) == ("IncompleteModel", True)
    hub.commit("org/pickled", files | {"pytorch_model_b.bin": b"y"})
    assert fetcher.run("org/pickled", type="BaseModel").ok.files == 7


def test_an_artifact_of_the_longest_name_is_published(hub: HubServer, fetcher: Fetcher) -> None:
    """As the Job is told: with 253 characters and a revision the view's name would be too long for a file system."""
    artifact = make_artifact("a." * 126 + "b", repo="org/base", type="BaseModel")
    request = build_request(artifact, make_cache(), base_model_path=None, with_credentials=False)
    result = fetcher.run("org/base", type="BaseModel", artifact=request.artifact).ok
    assert (fetcher.cache / result.path).is_dir()
