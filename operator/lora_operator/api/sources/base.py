"""What the members of a source have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Self
from urllib.parse import urlsplit

from pydantic import Field

from lora_operator.api.common import ApiModel, LocalRef, asked_of_new, cel
from lora_operator.source_kinds import KEYS_BY_MEMBER

# Hosts and ports that every parser of addresses takes: DNS names, IPv4, IPv6 in brackets.
_LABEL: Final = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_GROUP: Final = "[0-9A-Fa-f]{1,4}"
_SHORTENED: Final = "|".join(f"({_GROUP}:){{1,{7 - n}}}(:{_GROUP}){{1,{n}}}" for n in range(1, 7))
_IPV6: Final = f"({_GROUP}:){{7}}{_GROUP}|({_GROUP}:){{1,7}}:|{_SHORTENED}|:((:{_GROUP}){{1,7}}|:)"
_PORT_NUMBER: Final = "[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"
PORT: Final = f"(:({_PORT_NUMBER}))?"
NAME: Final = rf"{_LABEL}(\.{_LABEL})*\.?"  # a dot at the end: no search domain is tried
HOSTS: Final = "a DNS name, an IPv4 address or an IPv6 address in brackets, with a port where one is needed"
HOST: Final = rf"({NAME}|\[({_IPV6})\]){PORT}"

# An address without user, query and trailing slash.
_PATH: Final = "(/[A-Za-z0-9._/-]*[A-Za-z0-9._-])?"
Endpoint = Annotated[
    str,
    Field(
        max_length=512,
        pattern=rf"^https?://[A-Za-z0-9.\[\]:-]+{_PATH}$",
        json_schema_extra=asked_of_new(
            f"^https?://{HOST}{_PATH}$",
            f"an endpoint is http:// or https:// and a host: {HOSTS}; without user, query and trailing '/'",
        ),
    ),
]


def is_address(endpoint: str) -> bool:
    """Whether clients can make out a host and port in it; one that was stored before its pattern was as strict need have none."""
    try:
        parts = urlsplit(endpoint)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


Prefix = Annotated[
    str,
    Field(
        description="The folder inside the bucket; default: the whole bucket. All of it counts for the revision.",
        max_length=512,
        json_schema_extra=cel(
            (
                "!self.startsWith('/') && !self.contains('//') && !self.split('/').exists(p, p == '..' || p == '.')",
                "prefix must be a folder inside the bucket: without a leading '/', empty parts, '.' and '..'",
            )
        ),
    ),
]

Pattern = Annotated[str, Field(min_length=1, max_length=256)]
AllowPatterns = Annotated[
    tuple[Pattern, ...],
    Field(
        description="Only files that match one of these (as fnmatch does, * crosses folders); default: what vLLM needs.",
        max_length=64,
    ),
]
IgnorePatterns = Annotated[tuple[Pattern, ...], Field(description="No file that matches one of these.", max_length=64)]


class SourceMember(ApiModel):
    """One kind of source: what the operator asks of each, whatever it is."""

    @property
    def title(self) -> str:
        """What it is, for people; never with credentials."""
        raise NotImplementedError

    @property
    def asked(self) -> str:
        """The title, with the requested revision where the user can name one."""
        return self.title

    @property
    def requested(self) -> str:
        """What the user asked for: a branch, a tag or a digest; "listing" for a source that has no names for its versions."""
        return "listing"

    @property
    def pinned(self) -> bool:
        """Whether `requested` can only ever resolve to one content, so that there is nothing to refresh."""
        return False

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Addresses that the source names, which its ModelCache has to allow."""
        return ()

    @property
    def secret(self) -> tuple[str, str] | None:
        """Name of the Secret beside it, and its key or what stands for several; None for anonymous access."""
        return None

    def to_request(self) -> dict[str, Any]:
        """The members of the Job's request that the user chose; the cache adds others."""
        return self.to_wire()

    def anonymous(self) -> Self:
        """The same source without its credentials and in one spelling: what two users want is the same content where these are equal."""
        return self


class KeyedMember(SourceMember):
    """One whose Secret has keys with names of their own, which the table of sources knows.

    What is declared here are fields of every such source: each declares them itself, so that they stand in the order of its page.
    """

    kind: ClassVar[str]  # its row in the table
    if TYPE_CHECKING:
        credentials_secret_ref: LocalRef | None

    @property
    def secret(self) -> tuple[str, str] | None:
        ref = self.credentials_secret_ref
        return (ref.name, KEYS_BY_MEMBER[self.kind].stands_for) if ref is not None else None

    def anonymous(self) -> Self:
        return self.model_copy(update={"credentials_secret_ref": None})


class BucketMember(KeyedMember):
    """A folder of a bucket or container, at its cloud or at an endpoint."""

    if TYPE_CHECKING:
        prefix: str
        endpoint: Endpoint | None

    @property
    def bucket_title(self) -> str:
        """The whole bucket's address, for people."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        return f"{self.bucket_title}/{self.prefix}".rstrip("/")

    @property
    def endpoints(self) -> tuple[str, ...]:
        return () if self.endpoint is None else (self.endpoint,)

    def anonymous(self) -> Self:
        return super().anonymous().model_copy(update={"prefix": self.prefix.strip("/")})
