"""What of a source is allowed: the address, claim or path that it names, as whom it is read, and the content that its digest pins.

A source is read as the cache's service account only where its owner allowed that source, and never beside a Secret. A role is assumed by
the source's Secret, and then it is the tenant's affair and the token service's. Where the service account assumes it, tenants could
have it assume any role that trusts it; so the cache's owner lists the roles, and for whom.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from lora_operator.api.cache import ModelCache
from lora_operator.api.sources.base import is_address
from lora_operator.api.sources.s3 import AssumeRole
from lora_operator.api.sources.source import Source
from lora_operator.constants import Reason
from lora_operator.errors import ReasonError


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


def workload_identity(source: Source, cache: ModelCache, *, with_credentials: bool) -> str | None:
    """The service account that a Job for the source runs as; None where access is by Secret, or anonymous."""
    identity = cache.spec.workload_identity
    address = _address(source)
    if identity is None or with_credentials or address is None or cache.spec.offline:
        return None
    # A source is a folder: s3://bucket/folder/* allows the folder itself, too.
    forms = (address, f"{address}/")
    allowed = any(fnmatchcase(form, pattern) for pattern in identity.allowed_sources for form in forms)
    return identity.service_account_name if allowed else None


def role_refused(
    role: AssumeRole | None, source: Source, cache: ModelCache, *, namespace: str, with_credentials: bool
) -> ReasonError | None:
    """SourceNotAllowed where nobody may assume the role for an object in `namespace`."""
    if role is None or with_credentials or cache.spec.offline:
        return None
    place = f"ModelCache {cache.metadata.namespace}/{cache.metadata.name}"
    identity = cache.spec.workload_identity
    if identity is None or workload_identity(source, cache, with_credentials=False) is None:
        return ReasonError(
            Reason.SOURCE_NOT_ALLOWED,
            f"nobody may assume role {role.arn}: {source.member.title} names no Secret, and {place} does not allow it to its "
            "spec.workloadIdentity; set source.s3.credentialsSecretRef, or ask its owner to add the source to allowedSources and the role "
            "to allowedRoles there",
        )
    asker = None if namespace == cache.metadata.namespace else namespace
    if any(entry.admits(role.arn, asker) for entry in identity.allowed_roles):
        return None
    return ReasonError(
        Reason.SOURCE_NOT_ALLOWED,
        f"{place} does not have its spec.workloadIdentity assume role {role.arn} for objects of namespace {namespace}: set "
        "source.s3.credentialsSecretRef, or ask its owner to add the role to allowedRoles there",
    )


def _address(source: Source) -> str | None:
    """What allowedSources are compared with: another endpoint is another address, so nothing of AWS goes there unasked."""
    if source.s3 is None:
        return None
    s3 = source.s3
    bucket = f"{s3.endpoint.rstrip('/')}/{s3.bucket}" if s3.endpoint else f"s3://{s3.bucket}"
    return f"{bucket}/{s3.prefix.strip('/')}".rstrip("/")


def refused_by_pin(source: Source, digest: str | None) -> ReasonError | None:
    """DigestMismatch where `digest`, that of content which is there, is not the one that the source pins.

    The pin says what is accepted, not what is downloaded: wants with and without share one.
    """
    if source.digest is None or digest == source.digest:
        return None
    return ReasonError(
        Reason.DIGEST_MISMATCH,
        f"the content of {source.member.title} has the digest {digest}, source.digest pins {source.digest}: "
        "correct the pin, or name the revision that it is the digest of",
    )
