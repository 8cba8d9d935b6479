"""The cache's directories, which the volume's group shares, and paths that can't leave the cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch.volume import layout


def test_prepare_makes_directories_that_the_volumes_group_shares(tmp_path: Path) -> None:
    layout.prepare(tmp_path, "hub")
    layout.prepare(tmp_path, "hub")
    for name in ("hub", "artifacts"):
        found = (tmp_path / name).stat()
        assert found.st_mode & 0o7777 == 0o2775
        assert found.st_gid == tmp_path.stat().st_gid
        assert list((tmp_path / name).iterdir()) == []


def test_a_cache_that_is_not_mounted(tmp_path: Path) -> None:
    with pytest.raises(ReasonError) as caught:
        layout.prepare(tmp_path / "nope", "hub")
    assert caught.value.reason is Reason.CACHE_NOT_READY


@pytest.mark.parametrize("path", ["../x", "/etc", "link", ".", "a/../../b"])
def test_a_path_can_not_leave_the_cache(path: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to("/etc")
    with pytest.raises(ReasonError, match="leads out"):
        layout.inside(root, path)
