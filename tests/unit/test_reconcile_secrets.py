"""What of a Secret a Job may have: one key for the Hub, exactly the AWS ones for S3, and errors that name the key."""

from __future__ import annotations

import base64
from typing import cast

import pytest

from lora_operator.errors import ReasonError
from lora_operator.kube.client import Kube
from lora_operator.reconcile.services import SecretReader
from tests.unit.fake_kube import FakeKube

ALL = {"AWS_ACCESS_KEY_ID": "ak", "AWS_SECRET_ACCESS_KEY": "sk", "AWS_SESSION_TOKEN": "st", "token": "hf", "other": "x"}


async def values(key: str, data: dict[str, str], uid: str = "u") -> dict[str, bytes]:
    """What is read of a Secret with these values, for a Job that was made when it had this uid."""
    kube = FakeKube()
    encoded = {name: base64.b64encode(value.encode()).decode() for name, value in data.items()}
    kube.put({"metadata": {"name": "keys", "namespace": "team-a", "uid": "u"}, "data": encoded}, "Secret")
    return await SecretReader(cast(Kube, kube), "ops").values(("team-a", "keys", key, uid))


async def test_the_hub_gets_the_one_key_that_is_named() -> None:
    assert await values("token", ALL) == {"token": b"hf"}
    assert await values("other", ALL) == {"token": b"x"}


async def test_s3_gets_its_keys_and_no_others() -> None:
    keys = {"AWS_ACCESS_KEY_ID": b"ak", "AWS_SECRET_ACCESS_KEY": b"sk"}
    assert await values("AWS_*", ALL) == {**keys, "AWS_SESSION_TOKEN": b"st"}
    assert await values("AWS_*", {name: value for name, value in ALL.items() if "SESSION" not in name}) == keys
    assert await values("AWS_*", {**ALL, "AWS_SESSION_TOKEN": ""}) == keys


@pytest.mark.parametrize("missing", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
@pytest.mark.parametrize("change", [{}, {"empty": " \n"}], ids=["absent", "empty"])
async def test_a_missing_key_is_named(missing: str, change: dict[str, str]) -> None:
    data = {name: value for name, value in ALL.items() if name != missing}
    with pytest.raises(ReasonError) as caught:
        await values("AWS_*", data | ({missing: change["empty"]} if change else {}))
    assert (caught.value.reason, caught.value.message) == (
        "CredentialsKeyMissing",
        f"Secret team-a/keys has no key {missing}, or it is empty: add it",
    )


async def test_a_secret_that_was_made_anew_is_not_read() -> None:
    with pytest.raises(ReasonError, match="was replaced by another"):
        await values("AWS_*", ALL, uid="other")
