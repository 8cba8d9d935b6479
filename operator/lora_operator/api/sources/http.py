"""Files and archives from HTTP servers as a source."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final

from pydantic import ConfigDict, Field

from lora_operator.api.common import ApiModel, LocalRef, asked_of_new, cel
from lora_operator.api.sources.base import HOST, HOSTS, AllowPatterns, IgnorePatterns, KeyedMember
from lora_operator.api.storage import Quantity
from lora_operator.names import parse_size

_HOST: Final = r"([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?"
_REST: Final = r"/[A-Za-z0-9._~!'()*+,;:@%&=/-]*(\?[A-Za-z0-9._~!'()*+,;:@%&=/?-]*)?"
_PART: Final = "[A-Za-z0-9_][A-Za-z0-9._ @+=-]*"
DEFAULT_MAX_SIZE: Final = "16Gi"

# The whole list has to fit one environment variable of the Job: 128 KiB.
MAX_FILES: Final = 64
Url = Annotated[
    str,
    Field(
        min_length=1,
        max_length=768,
        pattern=f"^https?://{_HOST}{_REST}$",
        json_schema_extra=asked_of_new(
            f"^https?://{HOST}{_REST}$", f"a url is http:// or https://, a host and a path; a host is {HOSTS}"
        ),
    ),
]
Sha256 = Annotated[str, Field(max_length=64, pattern=r"^[0-9a-f]{64}$")]
Origin = Annotated[
    str,
    Field(
        max_length=300,
        pattern=f"^https?://{_HOST}$",
        json_schema_extra=asked_of_new(f"^https?://{HOST}$", f"a server is http:// or https:// and a host: {HOSTS}"),
    ),
]


class HttpFile(ApiModel):
    """One file on an HTTP server."""

    path: str = Field(
        description="Its name in the source, for instance adapter_config.json.",
        max_length=256,
        pattern=f"^{_PART}(/{_PART})*$",
    )
    url: Url = Field(description="Where it is.")
    sha256: Sha256 = Field(description="The sha256 of its content, in lower-case hex.")


class HttpSource(KeyedMember):
    """Files of HTTP servers that the cache allows, or one archive of files; every byte is pinned by a sha256."""

    kind: ClassVar = "http"

    model_config = ConfigDict(
        json_schema_extra=cel(
            ("has(self.url) != has(self.files)", "http must have exactly one of: url (of an archive), files"),
            ("has(self.url) == has(self.sha256)", "http.sha256 is required with url, and each of files has its own"),
            ("!has(self.maxSize) || has(self.url)", "http.maxSize is for an archive's content: only with url"),
        )
    )

    url: Url | None = Field(default=None, description="Where a tar, tar.gz or zip archive is.")
    sha256: Sha256 | None = Field(default=None, description="The sha256 of the archive, in lower-case hex.")
    max_size: Quantity | None = Field(
        default=None,
        description=f"What the archive, and what is in it, may have at most; default: {DEFAULT_MAX_SIZE}. A larger one is refused.",
    )
    files: tuple[HttpFile, ...] | None = Field(
        default=None,
        description="Files, each with its name, address and sha256.",
        min_length=1,
        max_length=MAX_FILES,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["path"]},
    )
    allow_patterns: AllowPatterns = ()
    ignore_patterns: IgnorePatterns = ()
    credentials_secret_ref: LocalRef | None = Field(
        default=None,
        description="Secret with token (a bearer token), or username and password, in the same namespace as this object. They are "
        "sent to the servers that are named here, and not to where these redirect. Without it access is anonymous.",
    )

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses of the archive or of all files."""
        return (self.url,) if self.url is not None else tuple(file.url for file in self.files or ())

    @property
    def title(self) -> str:
        if self.url is not None:
            return self.url.partition("?")[0]
        first = next(iter(self.urls), "").partition("?")[0]
        return first.rpartition("/")[0]

    @property
    def requested(self) -> str:
        return "sha256"

    @property
    def pinned(self) -> bool:
        return True

    @property
    def endpoints(self) -> tuple[str, ...]:
        # What the pattern has before the path; nothing is parsed, for some hosts that it takes no parser does.
        return tuple(sorted({"/".join(url.split("/", 3)[:3]) for url in self.urls}))

    @property
    def max_bytes(self) -> int:
        """The bound on the archive and its content, in bytes."""
        return parse_size(self.max_size if self.max_size is not None else DEFAULT_MAX_SIZE) or 0

    def to_request(self) -> dict[str, Any]:
        return self.to_wire() | {"maxBytes": self.max_bytes}


class HttpCacheSpec(ApiModel):
    """Which HTTP servers sources of this cache may name."""

    allowed_endpoints: tuple[Origin, ...] = Field(
        default=(),
        description="Servers, for instance https://models.example.com, character by character; those that they redirect to have to "
        "be here too. What the cluster's own network serves is reachable from Jobs: name no server of it that tenants must not read.",
        max_length=32,
    )
