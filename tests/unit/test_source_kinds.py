"""The table of schemes: everything that has to know a source knows exactly those, under the table's names."""

from __future__ import annotations

import importlib
import typing
from pathlib import Path

import pytest

from lora_operator.api.cache import ModelCacheSpec
from lora_operator.api.common import ApiModel
from lora_operator.api.sources import source
from lora_operator.api.sources.base import SourceMember
from lora_operator.constants import CREDENTIALS_KEY
from lora_operator.source_kinds import KEYS, SCHEMES, Keys, Scheme, keys_of
from lora_operator.wire.jobs import FetchRequest

BY_NAME = pytest.mark.parametrize("scheme", SCHEMES, ids=[scheme.member for scheme in SCHEMES])
S3 = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}


def model_of(model: type[ApiModel], field: str) -> type[ApiModel]:
    """The type of an optional field."""
    (found,) = [kind for kind in typing.get_args(model.model_fields[field].annotation) if kind is not type(None)]
    assert isinstance(found, type)
    return found


def test_a_source_has_exactly_the_members_of_the_table() -> None:
    assert [*source.Source.model_fields] == [*(scheme.field for scheme in SCHEMES), "size_hint", "path", "digest"]


@BY_NAME
def test_every_scheme_has_its_model_its_request_its_program_and_its_page(scheme: Scheme) -> None:
    model = model_of(source.Source, scheme.field)
    assert model is getattr(source, scheme.model)
    assert issubclass(model, SourceMember)
    assert source.Source.model_fields[scheme.field].alias == scheme.member
    kinds = typing.get_args(FetchRequest.model_fields["source"].annotation)
    assert [kind for kind in kinds if kind.model_fields["kind"].default == scheme.member], "a Job can't be told of it"
    module, _, name = scheme.fetcher.partition(":")
    assert callable(getattr(importlib.import_module(f"lora_operator.fetch.sources.{module}"), name).open)
    page = Path(__file__).parents[2] / "docs" / "sources" / f"{scheme.member}.md"
    assert f"  {scheme.member}:" in page.read_text(), "the page has no manifest"


@BY_NAME
def test_what_allows_a_source_is_a_field_of_the_cache(scheme: Scheme) -> None:
    part: type[ApiModel] | None = ModelCacheSpec
    for name in scheme.allowed_by.split("."):
        assert part is not None
        fields = {field.alias: field.annotation for field in part.model_fields.values()}
        assert name in fields
        kind = fields[name]
        part = kind if isinstance(kind, type) and issubclass(kind, ApiModel) else None


@BY_NAME
def test_credentials_are_named_by_a_field_and_are_no_part_of_the_anonymous_content(scheme: Scheme) -> None:
    model = model_of(source.Source, scheme.field)
    secrets = {field.alias for field in model.model_fields.values() if str(field.alias).endswith("SecretRef")}
    assert secrets == ({scheme.secrets.field} if scheme.secrets else set())


def test_what_stands_for_several_keys_is_never_a_key() -> None:
    assert all("*" in name for name in KEYS)


@pytest.mark.parametrize(
    ("present", "taken"),
    [
        ({*S3}, S3),
        ({*S3, "AWS_SESSION_TOKEN", "AWS_REGION"}, {*S3, "AWS_SESSION_TOKEN"}),
        (set(), S3),
        ({"AWS_ACCESS_KEY_ID", "token"}, S3),
    ],
)
def test_exactly_the_keys_of_the_scheme_are_taken(present: set[str], taken: set[str]) -> None:
    assert keys_of("AWS_*", present) == {key: key for key in taken}


def test_one_named_key_is_given_under_the_name_that_jobs_read() -> None:
    assert keys_of("my-key", {"my-key", "other"}) == {CREDENTIALS_KEY: "my-key"}


def test_the_first_complete_choice_is_taken() -> None:
    keys = Keys("X_*", (("token",), ("username", "password")))
    assert keys.choose({"username", "password"}) == ("username", "password")
    assert keys.choose({"username", "password", "token"}) == ("token",)
    assert keys.choose({"username"}) == ("token",)
