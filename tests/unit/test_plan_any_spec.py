"""Whatever the patterns of the API let a tenant write: what plans ask of it is answered, and raises nothing."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lora_operator.api.cache import ModelCache, ModelCacheSpec
from lora_operator.api.sources.base import HOST, NAME, PORT
from lora_operator.api.sources.source import Source
from lora_operator.desired.job import build_request
from lora_operator.plan.preconditions import too_large
from lora_operator.plan.source_policy import refused_by_pin, source_refused, workload_identity
from lora_operator.plan.wants import build_artifact
from lora_operator.source_kinds import SCHEMES
from tests.unit.builders import make_artifact, make_cache

Json = dict[str, Any]
# What was stored before the CRD asked for more is read all the same.
ONCE = r"([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]|\[\[?)(:[0-9]{1,5})?"


def values(node: Json, defs: Json) -> st.SearchStrategy[Any]:
    """What a schema takes."""
    node = {**defs.get(node.get("$ref", "").rpartition("/")[2], {}), **node}
    kind, least = node.get("type"), int(node.get("minLength") or node.get("minItems") or 0)
    if "anyOf" in node:
        return st.one_of([values(one, defs) for one in node["anyOf"]])
    if "enum" in node or "const" in node:
        return st.sampled_from(node.get("enum") or [node["const"]])
    if kind == "string" and "pattern" in node:
        pattern = node["pattern"].replace(HOST, ONCE).replace(f"{NAME}{PORT}", "[A-Za-z0-9.-]+(:[0-9]{1,5})?")
        most, whole = int(node.get("maxLength", 1000)), st.from_regex(pattern.removesuffix("$") + r"\Z")
        return whole.filter(lambda text: bool(least <= len(text) <= most))
    if kind == "string":
        return st.text(min_size=least, max_size=least + 8)
    if kind == "array":
        return st.lists(values(node["items"], defs), min_size=least, max_size=least + 2)
    if kind == "object" and "properties" in node:
        fields = {name: values(value, defs) for name, value in node["properties"].items()}
        asked = {name: fields.pop(name) for name in node.get("required", ())}
        return st.fixed_dictionaries(asked, optional=fields)
    plain = {"boolean": st.booleans(), "null": st.none(), "integer": st.integers(0, 2**31)}
    return plain.get(str(kind), st.just({}))


@lru_cache
def any_of(model: type[Source] | type[ModelCacheSpec], *names: str) -> st.SearchStrategy[Json]:
    """Some fields of a spec, with anything that their schemas take."""
    schema = model.model_json_schema(by_alias=True)
    fields = {name: values(schema["properties"][name], schema["$defs"]) for name in names}
    return st.fixed_dictionaries({}, optional=fields)


def with_allowed(source: Source, spec: Json) -> Json:
    """The cache's spec, which allows all that the source names: so that what follows is asked as well."""
    member = source.scheme.member
    own = {**(spec.get(member) or {}), "allowedEndpoints": list(source.member.endpoints)}
    return {**spec, member: own} if member in ("s3", "http", "gcs", "azure") else spec


def ask(source: Source, cache: ModelCache) -> None:
    """All that passes of the operator ask of a source and the cache that it is for."""
    member = source.member
    asked = [member.title, member.asked, member.requested, member.pinned, member.endpoints, member.secret]
    json.dumps([*asked, member.to_request(), source.anonymous().to_wire()])
    source_refused(source, cache, namespace="team-a")
    source_refused(source, cache, namespace=cache.metadata.namespace)
    refused_by_pin(source, "sha256:" + "0" * 64)
    too_large(source, cache)
    identity = workload_identity(source, cache, with_credentials=False)
    made = build_artifact(cache=cache, source=source, base_artifact=None, credentials=None)
    assert len(made["metadata"]["name"]) <= 51
    artifact = make_artifact()
    artifact = artifact.model_copy(update={"spec": artifact.spec.model_copy(update={"source": source})})
    build_request(
        artifact, cache, base_model_path=None, with_credentials=False, workload_identity=identity, claim_uid=""
    )


@lru_cache
def any_member(member: str) -> st.SearchStrategy[Json]:
    """What one member of a source may be."""
    schema = Source.model_json_schema(by_alias=True)
    return values(schema["properties"][member]["anyOf"][0], schema["$defs"])


CACHES = any_of(ModelCacheSpec, "huggingFace", "s3", "http", "gcs", "azure", "oci", "capacity", "minFree")
QUICKLY = settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("member", [scheme.member for scheme in SCHEMES])
@QUICKLY
@given(data=st.data())
def test_nothing_that_a_source_may_be_raises(member: str, data: st.DataObject) -> None:
    body = data.draw(any_of(Source, "path", "digest", "sizeHint"))
    body[member] = data.draw(any_member(member))
    try:
        source = Source.model_validate(body)
        spec = make_cache(claim="models").to_wire()["spec"] | data.draw(CACHES)
        body = make_cache(claim="models").to_wire()
        caches = [ModelCache.model_validate({**body, "spec": one}) for one in (spec, with_allowed(source, spec))]
    except ValidationError:
        assume(False)
    for cache in caches:
        ask(source, cache)


@pytest.mark.parametrize("host", ["[::::]", "[.]", "[1.2.3.4]", "[:::1]", "a.test:99999"])
@pytest.mark.parametrize("shape", ["url", "files"])
def test_a_host_that_nothing_can_read_is_refused_and_not_raised(host: str, shape: str) -> None:
    address, digest = f"http://{host}/a.zip", "0" * 64
    http: Json = {"url": address, "sha256": digest}
    if shape == "files":
        http = {"files": [{"path": "a", "url": address, "sha256": digest}]}
    source = Source.model_validate({"http": http})
    assert source.member.endpoints == (f"http://{host}",)
    body = make_cache(claim="models").to_wire()
    body["spec"]["http"] = {"allowedEndpoints": [f"http://{host}"]}
    refused = source_refused(source, ModelCache.model_validate(body), namespace="team-a")
    assert refused is not None
    assert refused.reason == "SourceNotAllowed"
    assert "which no client can read" in refused.message
