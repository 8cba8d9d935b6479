"""What tells new content of another claim from old: times that nobody sets back, and the claim itself."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from lora_operator.api.sources.source import Source
from lora_operator.fetch.content.select import RemoteFile
from lora_operator.fetch.sources.folder import Tree
from lora_operator.fetch.sources.volumes import ClaimSource, LocalSource
from lora_operator.reconcile import artifact as reconciled
from lora_operator.wire.jobs import ClaimRequest, FetchRequest, LocalRequest
from tests.unit.builders import make_artifact
from tests.unit.small_world import SmallWorld

WEIGHTS = "adapter_model.safetensors"
LONG_AGO = (315532800, 315532800)  # what reproducible archives give all their files


def content(root: Path, mount: Path, **claim: str) -> tuple[str, bytes]:
    """Revision and bytes of what a Job copies."""
    wanted = ClaimRequest.model_validate({"claimName": "models", "mount": str(mount), **claim})
    request = FetchRequest(artifact="a-1", type="Adapter", cache_root=str(root), source=wanted)
    source = ClaimSource.open(wanted, request)
    revision = source.authorise()
    blobs = source.open_store(root).download(source.listing(), moving=lambda: 0)
    source.confirm()
    return revision, blobs[WEIGHTS].read_bytes()


def put(folder: Path, data: bytes) -> None:
    folder.mkdir(exist_ok=True)
    (folder / WEIGHTS).unlink(missing_ok=True)
    (folder / WEIGHTS).write_bytes(data)
    os.utime(folder / WEIGHTS, LONG_AGO)


def test_new_weights_of_the_same_size_and_time_are_new_content(tmp_path: Path) -> None:
    put(tmp_path / "claim", b"old weights")
    first = content(tmp_path / "cache", tmp_path / "claim")
    assert content(tmp_path / "cache", tmp_path / "claim") == first, "and what is as it was, is not"
    put(tmp_path / "claim", b"new weights")
    second = content(tmp_path / "cache", tmp_path / "claim")
    assert (first[1], second[1]) == (b"old weights", b"new weights")
    assert first[0] != second[0]


@pytest.mark.parametrize("key", ["claimUid", "claimNamespace"])
def test_claims_of_one_name_share_nothing(tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their files' times are."""
    for name in ("one", "two"):
        put(tmp_path / name, f"of {name}".encode())
    monkeypatch.setattr(
        Tree, "_remote", lambda _, path, status: RemoteFile(path, status.st_size, version="v", stored_as=f"{path}-v")
    )
    for name in ("one", "two"):
        assert content(tmp_path / "cache", tmp_path / name, **{key: name})[1] == f"of {name}".encode()


def test_a_change_of_owners_changes_nothing_of_a_folder_in_the_caches_own_volume(tmp_path: Path) -> None:
    """Kubernetes sets the group of every file anew where a pod mounts the volume with an fsGroup."""
    put(tmp_path / "sql", b"weights")
    local = LocalRequest(path="sql")
    request = FetchRequest(artifact="a-1", type="Adapter", cache_root=str(tmp_path), source=local)
    source = LocalSource.open(local, request)
    source.authorise()
    (tmp_path / "sql" / WEIGHTS).chmod(0o664)
    source.open_store(tmp_path).confirm()


def test_a_job_is_told_which_claim_it_is() -> None:
    world, artifact = SmallWorld(), make_artifact()
    namespace = artifact.metadata.namespace
    world.kube.put(
        {"metadata": {"name": "trained", "namespace": namespace, "uid": "uid-of-it"}}, "PersistentVolumeClaim"
    )

    def uid(name: str) -> str:
        claim = Source.model_validate({"persistentVolumeClaim": {"claimName": name}})
        changed = artifact.model_copy(update={"spec": artifact.spec.model_copy(update={"source": claim})})
        return asyncio.run(reconciled._claim_uid(world.context, changed))

    assert (uid("trained"), uid("gone")) == ("uid-of-it", "")
    assert asyncio.run(reconciled._claim_uid(world.context, artifact)) == ""
    asked = world.kube.metadata_read
    assert asked == [("PersistentVolumeClaim", namespace, name) for name in ("trained", "gone")]
