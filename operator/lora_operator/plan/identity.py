"""Whether a source is read as the cache's service account: only where its owner allowed that source, and never beside a Secret."""

from __future__ import annotations

from fnmatch import fnmatchcase

from lora_operator.api.cache import ModelCache
from lora_operator.api.source import Source


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


def _address(source: Source) -> str | None:
    """What allowedSources are compared with: another endpoint is another address, so nothing of AWS goes there unasked."""
    if source.s3 is None:
        return None
    s3 = source.s3
    bucket = f"{s3.endpoint.rstrip('/')}/{s3.bucket}" if s3.endpoint else f"s3://{s3.bucket}"
    return f"{bucket}/{s3.prefix.strip('/')}".rstrip("/")
