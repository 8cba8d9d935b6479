"""What sources may name: the address, claim or path that a ModelCache allows, and to whom. Pure."""

from __future__ import annotations

from lora_operator.api.cache import ModelCache
from lora_operator.api.sources.base import is_address
from lora_operator.api.sources.source import Source
from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.plan.identity import role_refused


def source_refused(source: Source, cache: ModelCache, *, namespace: str) -> ReasonError | None:
    """SourceNotAllowed where the source of an object in `namespace` names what the cache does not allow it."""
    place = f"ModelCache {cache.metadata.namespace}/{cache.metadata.name}"
    if cache.spec.offline and not source.scheme.offline:
        return ReasonError(
            Reason.SOURCE_NOT_ALLOWED,
            f"{place} is offline, and has no place for content of {source.scheme.title}: put the files into a folder of its volume, "
            "and name that by source.local",
        )
    why = (
        _endpoint_refused(source, cache)
        or _registry_refused(source, cache)
        or _claim_refused(source, cache, namespace)
        or _path_refused(source, cache, namespace)
    )
    if why is not None:
        return ReasonError(Reason.SOURCE_NOT_ALLOWED, f"{place} {why} to spec.{source.scheme.allowed_by}")
    return role_refused(source.role, source, cache, namespace=namespace, with_credentials=source.secret is not None)


def _endpoint_refused(source: Source, cache: ModelCache) -> str | None:
    scheme = source.scheme
    allowed = getattr(getattr(cache.spec, scheme.field), "allowed_endpoints", ())
    for endpoint in source.member.endpoints:
        if endpoint not in allowed:  # character by character
            return f"does not allow the {scheme.title} endpoint {endpoint}: use one that it allows, or ask its owner to add this one"
        if not is_address(endpoint):
            return f"can't allow {endpoint}, which no client can read: write https://host, or https://[address] of IPv6, and add it"
    return None


def _registry_refused(source: Source, cache: ModelCache) -> str | None:
    if source.oci is None:
        return None
    registry = source.oci.registry
    if any(endpoint.partition("://")[2] == registry for endpoint in cache.spec.oci.allowed_endpoints):
        return None
    return f"does not allow the registry {registry}: use one that it allows, or ask its owner to add https://{registry}"


def _claim_refused(source: Source, cache: ModelCache, namespace: str) -> str | None:
    claim = source.persistent_volume_claim
    if claim is None:
        return None
    if claim.claim_name == cache.claim_name:
        return (
            f"keeps its own content on the claim {claim.claim_name}, which no source may copy from: use source.local for a folder of "
            "it, and ask its owner to add that to spec.local.allowedPaths instead of adding the claim"
        )
    own = namespace == cache.metadata.namespace
    for entry in cache.spec.persistent_volume_claim.allowed_claims:
        if entry.claim_name == claim.claim_name and (own or entry.admits(namespace)):
            return None
    return (
        f"does not allow objects of namespace {namespace} the claim {claim.claim_name}: use one that it allows, or ask its owner to "
        "add this one"
    )


def _path_refused(source: Source, cache: ModelCache, namespace: str) -> str | None:
    if source.local is None:
        return None
    asker = None if namespace == cache.metadata.namespace else namespace
    if any(entry.admits(source.local.path, asker) for entry in cache.spec.local.allowed_paths):
        return None
    return (
        f"does not allow objects of namespace {namespace} the path {source.local.path}: use one that it allows, or ask its owner to "
        "add this one"
    )
