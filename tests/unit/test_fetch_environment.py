"""Ambient identities and modes are removed; the only identity of a Job is in the files of its request's folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import environment, text
from lora_operator.fetch.sources.s3.source import S3Keys
from lora_operator.wire.jobs import FetchRequest, HuggingFaceRequest, S3Request


def request_for(root: Path, credentials: Path | None = None) -> FetchRequest:
    return FetchRequest(
        artifact="art",
        type="Adapter",
        source=HuggingFaceRequest(repo="org/name", endpoint="http://127.0.0.1:1/"),
        cache_root=str(root),
        credentials=None if credentials is None else str(credentials),
    )


def test_ambient_identities_and_modes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.update(
        HF_TOKEN="x", HUGGING_FACE_HUB_TOKEN="x", HF_HUB_OFFLINE="1", NETRC="/n", XDG_CACHE_HOME="/c", HTTP_PROXY="p"
    )
    before = os.umask(0o077)
    try:
        environment.prepare(request_for(tmp_path), home=tmp_path)
        assert os.umask(0o077) == 0o002
    finally:
        os.umask(before)
    left = {name for name in os.environ if "TOKEN" in name}
    assert left == {"HF_HUB_DISABLE_IMPLICIT_TOKEN"}
    assert "HF_HUB_OFFLINE" not in os.environ
    assert "XDG_CACHE_HOME" not in os.environ
    assert os.environ["HF_ENDPOINT"] == "http://127.0.0.1:1"
    assert os.environ["HOME"] == str(tmp_path)
    assert os.environ["HTTP_PROXY"] == "p"


def test_no_token_file_is_anonymous(tmp_path: Path) -> None:
    assert environment.read_token(request_for(tmp_path)) is False


def test_ambient_s3_identities_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.update(AWS_ACCESS_KEY_ID="x", AWS_PROFILE="x", AWS_ENDPOINT_URL="x", BOTO_CONFIG="x", AWS_ROLE_ARN="x")
    before = os.umask(0o022)
    try:
        environment.prepare(request_for(tmp_path), home=tmp_path)
    finally:
        os.umask(before)
    left = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "BOTO"))}
    assert left == {
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


def s3_request(root: Path, credentials: Path | None = None) -> FetchRequest:
    return request_for(root, credentials).model_copy(update={"source": S3Request(bucket="models")})


S3_FILES = {"AWS_ACCESS_KEY_ID": "AK", "AWS_SECRET_ACCESS_KEY": "secret-key", "AWS_SESSION_TOKEN": "session-token"}


@pytest.mark.parametrize("missing", [None, *S3_FILES])
def test_s3_keys(missing: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_secrets", set())
    assert S3Keys.read(s3_request(tmp_path)) is None
    for name, value in S3_FILES.items():
        if name != missing:
            (tmp_path / name).write_text(value + "\n")
    if missing in (None, "AWS_SESSION_TOKEN"):
        keys = S3Keys.read(s3_request(tmp_path, tmp_path))
        assert keys == S3Keys("AK", "secret-key", None if missing else "session-token")
        assert "secret-key" not in repr(keys)
        assert text.clean("secret-key") == "***"
        return
    with pytest.raises(ReasonError, match=f"{missing} could not be read") as caught:
        S3Keys.read(s3_request(tmp_path, tmp_path))
    assert caught.value.reason is Reason.CREDENTIALS_KEY_MISSING


TOKENS: dict[str, tuple[bytes | None, Reason]] = {
    "a missing file": (None, Reason.CREDENTIALS_KEY_MISSING),
    "an empty file": (b"", Reason.CREDENTIALS_KEY_MISSING),
    "only space": (b" \n", Reason.CREDENTIALS_KEY_MISSING),
    "a line break inside": (b"hf_a\r\nX-Evil: 1", Reason.UNAUTHORIZED),
    "no ASCII": ("hf_ü".encode(), Reason.UNAUTHORIZED),
    "far too long": (b"a" * 5000, Reason.UNAUTHORIZED),
}


@pytest.mark.parametrize("sentence", TOKENS)
def test_a_token_file_that_is_no_token(sentence: str, tmp_path: Path) -> None:
    content, reason = TOKENS[sentence]
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ReasonError) as caught:
        environment.read_token(request_for(tmp_path, tmp_path))
    assert caught.value.reason is reason
    assert "hf_" not in caught.value.message


def test_a_token_is_read_without_its_line_end_and_protected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_secrets", set())
    (tmp_path / "token").write_text("hf_abcdef\n")
    assert environment.read_token(request_for(tmp_path, tmp_path)) == "hf_abcdef"
    assert text.clean("it was hf_abcdef") == "it was ***"
