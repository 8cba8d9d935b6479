"""OCI artifacts and images as a source."""

from __future__ import annotations

from typing import Any, ClassVar, Final

from pydantic import Field

from lora_operator.api.common import ApiModel, LocalRef, asked_of_new
from lora_operator.api.sources.base import NAME, PORT, AllowPatterns, IgnorePatterns, KeyedMember
from lora_operator.api.sources.http import DEFAULT_MAX_SIZE, Origin
from lora_operator.api.storage import Quantity
from lora_operator.names import parse_size

_PATH: Final = "[a-z0-9]+([._-]+[a-z0-9]+)*"
_REST: Final = rf"/{_PATH}(/{_PATH})*(:[A-Za-z0-9_][A-Za-z0-9._-]{{0,127}})?(@sha256:[0-9a-f]{{64}})?"
_REFERENCE: Final = f"^[A-Za-z0-9.-]+(:[0-9]{{1,5}})?{_REST}$"
_NEW_REFERENCE: Final = f"^{NAME}{PORT}{_REST}$"


class OciSource(KeyedMember):
    """An OCI artifact or image of a registry that the cache allows."""

    kind: ClassVar = "oci"

    reference: str = Field(
        description="<registry>/<repository>:<tag>, or with @sha256:<digest>, which can't change; default tag: latest.",
        min_length=3,
        max_length=512,
        pattern=_REFERENCE,
        json_schema_extra=asked_of_new(
            _NEW_REFERENCE,
            "reference must be <registry>/<repository>, with :<tag> or @sha256:<digest>, without a scheme",
        ),
    )
    max_size: Quantity | None = Field(
        default=None,
        description=f"What the layers that are archives may hold at most; default: {DEFAULT_MAX_SIZE}. More is refused.",
    )
    allow_patterns: AllowPatterns = ()
    ignore_patterns: IgnorePatterns = ()
    credentials_secret_ref: LocalRef | None = Field(
        default=None,
        description="Secret of type kubernetes.io/dockerconfigjson with the registry's login, in the same namespace as this object. "
        "Without it access is anonymous.",
    )

    @property
    def registry(self) -> str:
        """Host, and port where there is one."""
        return self.reference.partition("/")[0]

    @property
    def title(self) -> str:
        repository = self.reference.partition("@")[0]
        host, _, rest = repository.partition("/")
        return f"oci://{host}/{rest.partition(':')[0]}"

    @property
    def asked(self) -> str:
        return f"oci://{self.reference}"

    @property
    def requested(self) -> str:
        rest = self.reference.partition("/")[2]
        digest = rest.partition("@")[2]
        return digest or rest.partition(":")[2] or "latest"

    @property
    def pinned(self) -> bool:
        return "@" in self.reference

    def to_request(self) -> dict[str, Any]:
        size = self.max_size if self.max_size is not None else DEFAULT_MAX_SIZE
        return self.to_wire() | {"maxBytes": parse_size(size) or 0}


class OciCacheSpec(ApiModel):
    """Which registries sources of this cache may name."""

    allowed_endpoints: tuple[Origin, ...] = Field(
        default=(),
        description="Registries, for instance https://registry.example.com, with the servers that they send clients to: for tokens, and "
        "for the content of blobs.",
        max_length=32,
    )
