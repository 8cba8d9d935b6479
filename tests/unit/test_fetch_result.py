"""Texts that leave a Job are bounded and harmless; the result fits the termination log."""

from __future__ import annotations

import json

import pytest

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text
from lora_operator.fetch.result import encode, failure
from lora_operator.wire.jobs import TERMINATION_LOG_BYTES, FetchResult


@pytest.fixture(autouse=True)
def _no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_secrets", set())


CLEANED = {
    "line breaks and control characters become spaces": ("a\r\nb\x1b[31mc\0d", "a b [31mc d"),
    "bidirectional overrides are taken out": ("a\u202eb", "a b"),
    "signed addresses lose their query": ("see https://cdn.test/x?X-Sig=abc&y=1 now", "see https://cdn.test/x?*** now"),
    "addresses lose user names and passwords": ("https://me:pw@hub.test/x", "https://***@hub.test/x"),
    "secrets are replaced wherever they stand": ("Bearer hf_secret!hf_secret", "Bearer ***!***"),
    "half surrogates are taken out": ("a\ud800b", "a b"),
}


@pytest.mark.parametrize("sentence", CLEANED)
def test_clean(sentence: str) -> None:
    text.protect("hf_secret")
    dirty, expected = CLEANED[sentence]
    assert text.clean(dirty) == expected


@pytest.mark.parametrize("limit", [8, 100, 1024])
def test_clean_is_bounded_in_bytes(limit: int) -> None:
    assert len(text.clean("ü😀" * 2000, limit=limit).encode()) <= limit
    assert text.clean("short") == "short"


def test_an_empty_secret_does_not_make_texts_unreadable() -> None:
    text.protect("")
    text.protect("a")
    assert text.clean("abracadabra") == "abracadabra"


@pytest.mark.parametrize(("count", "shown"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 40, "5.0 TiB")])
def test_size(count: int, shown: str) -> None:
    assert text.size(count) == shown


def test_a_result_that_fits_is_whole() -> None:
    result = FetchResult(ok=True, path="artifacts/a-b", rank=8, target_modules=("q_proj", "v_proj"), size_bytes=5)
    assert FetchResult.model_validate_json(encode(result)) == result


def test_target_modules_go_first_when_a_result_is_too_long() -> None:
    result = FetchResult(
        ok=True, path="artifacts/a-b", rank=8, target_modules=tuple(f"layers.{n}.q_proj" for n in range(5000))
    )
    data = encode(result)
    assert len(data) <= TERMINATION_LOG_BYTES
    found = FetchResult.model_validate_json(data)
    assert found.path == result.path
    assert found.target_modules == result.target_modules[:32]


def test_a_message_full_of_escapes_still_fits() -> None:
    data = encode(FetchResult(ok=False, reason=Reason.JOB_FAILED, message='"\\' * 2000))
    assert len(data) <= TERMINATION_LOG_BYTES
    assert json.loads(data)["reason"] == "JobFailed"


def test_failures_keep_their_reason_and_others_become_job_failed() -> None:
    known = failure(ReasonError(Reason.RATE_LIMITED, "later\nplease"))
    assert (known.reason, known.message) == (Reason.RATE_LIMITED, "later please")
    unknown = failure(RuntimeError("x" * 5000))
    assert unknown.reason is Reason.JOB_FAILED
    assert unknown.message.startswith("RuntimeError: xxx")
    assert len(unknown.message.encode()) <= text.MESSAGE_BYTES
