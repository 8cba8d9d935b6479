"""Pickled weights are clean only where the scanner took all apart and found nothing but what rebuilds tensors."""

from __future__ import annotations

import io
import logging
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from e2e.fixtures.adapters import Tensor, torch_pickle
from lora_operator.constants import Reason
from lora_operator.engine_plugin.checks import AdapterProblem, check_adapter
from lora_operator.errors import ReasonError
from lora_operator.fetch.content.pickles import require_clean
from lora_operator.wire.jobs import FetchRequest

TENSORS = torch_pickle({"a.lora_A.weight": Tensor((2, 2), bytes(16))})


class _Runs:
    """What runs a program when it is read."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, ("touch /tmp/was-run",)


def added(*entries: tuple[str, bytes], instead: bool = False) -> bytes:
    """The archive of the tensors with further entries, or with these in the place of its pickle."""
    archive = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(TENSORS)) as old, zipfile.ZipFile(archive, "w") as new:
        for name in old.namelist():
            if not (instead and name.endswith(".pkl")):
                new.writestr(name, old.read(name))
        for name, data in entries:
            new.writestr(name, data)
    return archive.getvalue()


def before(name: str) -> bytes:
    """The archive of the tensors with a program as its first entry."""
    archive = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(TENSORS)) as old, zipfile.ZipFile(archive, "w") as new, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the same name twice
        new.writestr(name, HARMFUL)
        for each in old.namelist():
            new.writestr(each, old.read(each))
    return archive.getvalue()


def damaged() -> bytes:
    """The archive whose pickle's bytes are not what its checksum says: the scanner skips it, another reader may not."""
    raw = bytearray(added(("archive/x.pkl", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n.")))
    at = raw.index(b"ctorch._utils\n_rebuild_tensor_v2\n(")
    raw[at + 1 : at + 6] = b"tarch"
    return bytes(raw)


HARMFUL = pickle.dumps(_Runs(), protocol=2)
UNSAFE: dict[str, tuple[bytes, str]] = {
    "a program": (HARMFUL, "system"),
    "a program in the archive's pickle": (added(("archive/data.pkl", HARMFUL), instead=True), "system"),
    "a program beside the tensors": (added(("archive/other.pkl", HARMFUL)), "system"),
    "a program in a file of another name": (added(("archive/data/9", HARMFUL)), "system"),
    "something that is on nobody's list of dangers": (
        added(("archive/data.pkl", b"\x80\x02cmylib.things\nBuild\n)R."), instead=True),
        "mylib.things.Build",
    ),
    "a torch function that builds no tensor": (
        added(("archive/data.pkl", b"\x80\x02ctorch.hub\nload\n)R."), instead=True),
        "torch.hub.load",
    ),
    "an archive without tensors": (added(instead=True), "no tensors"),
    "a program before the tensors, under the same name": (before("archive/data.pkl"), "has archive/data.pkl twice"),
    "a program before the tensors, under a name that torch takes for the same": (
        before("archive/DATA.PKL"),
        "has archive/data.pkl twice",
    ),
    "two data.pkl, whatever they hold": (
        added(("other/data.pkl", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n.")),
        "has more than one data.pkl (archive/data.pkl, other/data.pkl)",
    ),
    "no pickle at all": (b"hello", "can't be scanned"),
    "nothing": (b"", "can't be scanned"),
    "an archive that is cut off": (TENSORS[: len(TENSORS) // 2], "scan"),
    "an entry that only some readers can read": (damaged(), "scan"),
}


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
@pytest.mark.parametrize("sentence", UNSAFE)
def test_what_is_not_clean_is_refused(sentence: str, name: str, tmp_path: Path) -> None:
    data, words = UNSAFE[sentence]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ReasonError) as caught:
        require_clean(path)
    assert caught.value.reason is Reason.UNSAFE_FORMAT
    assert words in caught.value.message
    assert name in caught.value.message


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_tensors_as_torch_saves_them_are_clean(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / name).write_bytes(TENSORS)
    with caplog.at_level(logging.DEBUG):
        require_clean(tmp_path / name)
    assert caplog.records == []


def test_engines_take_a_pickle_only_where_the_folders_manifest_says_that_it_was_scanned(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}')
    (tmp_path / "adapter_model.bin").write_bytes(TENSORS)
    manifest = tmp_path / ".lora-operator.json"
    for text in (None, "{}", "[]", "nonsense", '{"pickles": "adapter_model.bin"}', '{"pickles": ["adapter_model.pt"]}'):
        if text is not None:
            manifest.write_text(text)
        with pytest.raises(AdapterProblem, match="pickle"):
            check_adapter(tmp_path)
    manifest.write_text('{"pickles": ["adapter_model.bin"]}')
    assert check_adapter(tmp_path, max_rank=8).rank == 8
    with pytest.raises(AdapterProblem, match="maxLoraRank"):
        check_adapter(tmp_path, max_rank=4)


@pytest.mark.parametrize(
    ("source", "in_place"),
    [
        ({"source": {"kind": "local", "path": "sql"}}, True),
        ({"source": {"kind": "huggingFace", "repo": "org/sql"}, "offline": True}, True),
        ({"source": {"kind": "huggingFace", "repo": "org/sql"}}, False),
        (
            {"source": {"kind": "persistentVolumeClaim", "claimName": "trained", "mount": "/source"}, "offline": True},
            False,
        ),
    ],
)
def test_what_may_change_after_its_scan_is_known(source: dict[str, object], in_place: bool) -> None:
    request = FetchRequest.model_validate({"artifact": "a-1", "type": "Adapter", "cacheRoot": "/cache", **source})
    assert request.is_in_place == in_place
