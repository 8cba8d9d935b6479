"""What of a Secret is handed to the library for Google's and Azure's services, and what becomes of its errors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from obstore import exceptions

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import environment, text
from lora_operator.fetch.sources.buckets.source import AzureSource, BucketSource, GcsSource
from lora_operator.wire.jobs import AzureRequest, FetchRequest, GcsRequest, SourceRequest

KEY = {"type": "service_account", "client_email": "a@b.test", "private_key": "the-private-key", "private_key_id": "1"}


@pytest.fixture(autouse=True)
def no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_secrets", set())


def request(root: Path, source: SourceRequest, values: dict[str, str] | None) -> FetchRequest:
    for name, value in (values or {}).items():
        (root / name).write_text(value)
    credentials = str(root) if values is not None else None
    return FetchRequest(artifact="a", type="Adapter", source=source, cache_root="/", credentials=credentials)


def gcs(root: Path, values: dict[str, str] | None = None, **more: Any) -> BucketSource:
    source = GcsRequest.model_validate({"bucket": "models", **more})
    return GcsSource.open(source, request(root, source, values))


def azure(root: Path, values: dict[str, str] | None = None, **more: Any) -> BucketSource:
    source = AzureRequest.model_validate({"account": "acc", "container": "models", **more})
    return AzureSource.open(source, request(root, source, values))


def test_without_a_secret_nothing_is_signed(tmp_path: Path) -> None:
    for source in (gcs(tmp_path), azure(tmp_path)):
        assert source.client.config.get("skip_signature") in (True, "true")
        assert not source.subject.authenticated


def test_addresses_are_the_clouds_own_or_the_allowed_one(tmp_path: Path) -> None:
    assert gcs(tmp_path).subject.endpoint == "https://storage.googleapis.com"
    assert azure(tmp_path).subject.endpoint == "https://acc.blob.core.windows.net"
    assert gcs(tmp_path, endpoint="http://other.test").client.config.get("base_url") == "http://other.test"
    assert azure(tmp_path, endpoint="http://other.test/acc").client.config.get("endpoint") == "http://other.test/acc"


def test_ambient_identities_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    names = (
        "GOOGLE_APPLICATION_CREDENTIALS",
        "GOOGLE_SERVICE_ACCOUNT_KEY",
        "AZURE_STORAGE_KEY",
        "AZURE_CLIENT_SECRET",
        "MSI_ENDPOINT",
    )
    os.environ.update(dict.fromkeys(names, "x"))
    before = os.umask(0o022)
    try:
        environment.prepare(request(tmp_path, GcsRequest(bucket="models"), None), home=tmp_path)
    finally:
        os.umask(before)
    assert not set(names) & set(os.environ)


BAD_KEYS = [
    "",
    "{",
    "[]",
    "{}",
    json.dumps({"client_email": "a@b.test"}),
    json.dumps({**KEY, "client_email": 1}),
    json.dumps(KEY),
]


@pytest.mark.parametrize("document", BAD_KEYS[1:])
def test_a_key_file_that_can_not_be_used_is_told(document: str, tmp_path: Path) -> None:
    with pytest.raises(ReasonError) as caught:
        gcs(tmp_path, {"key.json": document})
    assert caught.value.reason is Reason.UNAUTHORIZED
    assert "the-private-key" not in caught.value.message


ERRORS: list[tuple[Exception, Reason]] = [
    (exceptions.PermissionDeniedError("x"), Reason.UNAUTHORIZED),
    (exceptions.UnauthenticatedError("x"), Reason.UNAUTHORIZED),
    (exceptions.PreconditionError("x"), Reason.SOURCE_CHANGED),
    (FileNotFoundError("x"), Reason.SOURCE_CHANGED),
    (exceptions.GenericError("Server returned non-2xx status code: 403 Forbidden: x"), Reason.UNAUTHORIZED),
    (exceptions.GenericError("Server returned non-2xx status code: 429 Too Many Requests"), Reason.RATE_LIMITED),
    (exceptions.GenericError("Server returned non-2xx status code: 500 x status code: 403"), Reason.SOURCE_UNREACHABLE),
    (exceptions.GenericError("connection refused"), Reason.SOURCE_UNREACHABLE),
    (OSError(28, "No space left on device"), Reason.INSUFFICIENT_SPACE),
    (RuntimeError("odd"), Reason.JOB_FAILED),
]


@pytest.mark.parametrize(("error", "reason"), ERRORS, ids=[str(error) for error, _ in ERRORS])
def test_foreign_errors_have_reasons(error: Exception, reason: Reason, tmp_path: Path) -> None:
    assert gcs(tmp_path).translate(error).reason is reason
