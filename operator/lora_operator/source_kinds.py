"""Every scheme of sources by name: the one table that the API, its rules, the Jobs, the messages and the docs are made from.

A scheme is a member of `source`. Its model for the API, its request to a Job and the part of a ModelCache's spec that allows it have
the member's name too. Pure, and free of both pydantic and the libraries of sources: the Job's program reads it as well.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from lora_operator.constants import CREDENTIALS_KEY

OFFLINE_FETCHER: Final = "offline:OfflineSource"  # of all that are remote
_CAPITAL: Final = re.compile(r"(?=[A-Z])")


@dataclass(frozen=True)
class Keys:
    """The keys of a Secret that a source's Job gets a copy of, and no others.

    `stands_for` is what a credentials identity has in the place of one key; no key of a Secret can have such a name.
    """

    stands_for: str
    choices: tuple[tuple[str, ...], ...]  # all keys of one of these; the first that is complete
    optional: tuple[str, ...] = ()
    documents: tuple[str, ...] = ()  # those whose values are longer texts

    def choose(self, present: Collection[str]) -> tuple[str, ...]:
        """Which of the keys that a Secret has are taken; those of the first choice where it lacks some of every one."""
        required = next((choice for choice in self.choices if set(choice) <= set(present)), self.choices[0])
        return (*required, *(key for key in self.optional if key in present))


@dataclass(frozen=True)
class Secrets:
    """How a source is given credentials; without a Secret access is anonymous, never by an ambient identity."""

    field: str  # of the source, in the manifest
    keys: Keys | None  # None: the one key that the field names


@dataclass(frozen=True)
class Scheme:
    """One row of the table: everything that differs from kind to kind but the code."""

    member: str  # of `source`, in the manifest
    title: str  # for people
    description: str  # of the member, in the CRD
    model: str  # <class> of lora_operator.api.sources.source
    fetcher: str  # <module>:<class> below lora_operator.fetch.sources
    revision: str  # what the resolved revision is
    verified: str  # what every blob is compared with
    allowed_by: str  # the field of a ModelCache's spec that says what sources may name
    offline: str  # where an offline cache has it, in Markdown; empty where it serves none
    secrets: Secrets | None = None  # None where no credentials are asked for
    is_remote: bool = True  # whether it is read over a network
    is_in_place: bool = (
        False  # whether its files are used where they lie, so that removing a view of them frees nothing
    )

    @property
    def field(self) -> str:
        """The member's name in Python."""
        return _CAPITAL.sub("_", self.member).lower()


SCHEMES: Final = (
    Scheme(
        member="huggingFace",
        title="Hugging Face Hub",
        description="A repository on the Hugging Face Hub.",
        model="HuggingFaceSource",
        fetcher="huggingface.source:HubSource",
        revision="the commit that the revision named",
        verified="the sha256 of files in LFS, the git blob id of the others",
        allowed_by="huggingFace.endpoint",
        offline="`hub/models--<organisation>--<name>`, `models--<organisation>--<name>` or `<organisation>/<name>`",
        secrets=Secrets("tokenSecretRef", keys=None),
    ),
    Scheme(
        member="s3",
        title="S3",
        description="A folder of an S3 bucket.",
        model="S3Source",
        fetcher="s3.source:S3Source",
        revision="a hash of the listing",
        verified="the size, the ETag where it is an MD5, and the service's own checksums",
        allowed_by="s3.allowedEndpoints",
        offline="`<bucket>/<prefix>`",
        secrets=Secrets(
            "credentialsSecretRef",
            Keys("AWS_*", (("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),), optional=("AWS_SESSION_TOKEN",)),
        ),
    ),
    Scheme(
        member="http",
        title="HTTP",
        description="Files of HTTP servers, or a tar or zip archive.",
        model="HttpSource",
        fetcher="http:HttpSource",
        revision="a hash of the paths and sha256 sums; an archive's own sha256",
        verified="the sha256 that the source has for each file, or for the archive",
        allowed_by="http.allowedEndpoints",
        offline="",
        secrets=Secrets("credentialsSecretRef", Keys("HTTP_*", (("token",), ("username", "password")))),
    ),
    Scheme(
        member="persistentVolumeClaim",
        title="PersistentVolumeClaim",
        description="A folder of a claim in the cache's namespace, which is copied.",
        model="ClaimSource",
        fetcher="volumes:ClaimSource",
        revision="a hash of the listing",
        verified="the size and the times of change that were listed; from its arrival on, the sha256 of what arrived",
        allowed_by="persistentVolumeClaim.allowedClaims",
        offline="the claim, as ever",
        is_remote=False,
    ),
    Scheme(
        member="local",
        title="local path",
        description="A folder of the cache's own volume, which is used in place.",
        model="LocalSource",
        fetcher="volumes:LocalSource",
        revision="a hash of the listing",
        verified="the size and time of change that were listed; its sha256 stands in the view's manifest",
        allowed_by="local.allowedPaths",
        offline="the folder, as ever",
        is_remote=False,
        is_in_place=True,
    ),
    Scheme(
        member="gcs",
        title="GCS",
        description="A folder of a bucket of Google Cloud Storage.",
        model="GcsSource",
        fetcher="buckets.source:GcsSource",
        revision="a hash of the listing",
        verified="the size, the ETag that was listed, and the MD5 or CRC32C that Google keeps",
        allowed_by="gcs.allowedEndpoints",
        offline="`<bucket>/<prefix>`",
        secrets=Secrets("credentialsSecretRef", Keys("GCS_*", (("key.json",),), documents=("key.json",))),
    ),
    Scheme(
        member="azure",
        title="Azure",
        description="A folder of a container of Azure Blob Storage.",
        model="AzureSource",
        fetcher="buckets.source:AzureSource",
        revision="a hash of the listing",
        verified="the size, the ETag that was listed, and the MD5 where Azure keeps one",
        allowed_by="azure.allowedEndpoints",
        offline="`<account>/<container>/<prefix>`",
        secrets=Secrets(
            "credentialsSecretRef", Keys("AZURE_*", (("AZURE_STORAGE_ACCOUNT_KEY",), ("AZURE_STORAGE_SAS_TOKEN",)))
        ),
    ),
    Scheme(
        member="oci",
        title="OCI",
        description="An OCI artifact or image of a registry.",
        model="OciSource",
        fetcher="oci:OciSource",
        revision="the digest of the manifest",
        verified="the digest of the manifest, and of each blob",
        allowed_by="oci.allowedEndpoints",
        offline="",
        secrets=Secrets(
            "credentialsSecretRef", Keys("OCI_*", ((".dockerconfigjson",),), documents=(".dockerconfigjson",))
        ),
    ),
)

BY_MEMBER: Final = {scheme.member: scheme for scheme in SCHEMES}
# Folders of the volume that are the operator's own: what sources brought, and what engines are given.
RESERVED_FOLDERS: Final = ("hub", "artifacts", *BY_MEMBER)
MEMBERS: Final = ", ".join(BY_MEMBER)
# Of the sources that take several keys of a Secret.
KEYS_BY_MEMBER: Final = {
    scheme.member: scheme.secrets.keys
    for scheme in SCHEMES
    if scheme.secrets is not None and scheme.secrets.keys is not None
}
KEYS: Final = {keys.stands_for: keys for keys in KEYS_BY_MEMBER.values()}


def keys_of(identity: str, present: Collection[str]) -> dict[str, str]:
    """The key of a Secret by the name of the file that a Job reads it from; `identity` is the key of a credentials identity."""
    keys = KEYS.get(identity)
    return {CREDENTIALS_KEY: identity} if keys is None else {key: key for key in keys.choose(present)}
