"""Every CEL rule of the CRDs, on a real API server: a manifest that it accepts, one that it refuses, and the message read.

The table is compared with the generated CRDs, so a rule without both fails the test.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import pytest

from lora_operator.api import RESOURCES
from lora_operator.api.deployment import ADAPTERS_FLAGS, OPERATORS_FLAGS, PARTS_FLAGS, RESERVED_ENV, SERVERS_FLAGS
from lora_operator.engine_plugin.ignored_env import IGNORED_ENV, IGNORED_ENV_PREFIXES
from lora_operator.gen.crds import build_crd
from lora_operator.source_kinds import BY_MEMBER, MEMBERS, RESERVED_FOLDERS
from tests.component.conftest import Kubectl
from tests.component.manifests import DELETE, manifest, rules_of


@dataclass(frozen=True)
class Case:
    """A manifest for one rule; `refused_at` is the field that the message must name, None where it is accepted."""

    kind: str
    rule_path: str
    message: str
    changes: dict[str, Any]
    refused_at: str | None = None
    name: str = "example"
    update: bool = False  # the unchanged manifest is there before
    before: dict[str, Any] | None = None  # the manifest with these changes is there before

    def __str__(self) -> str:
        verb = "refuses" if self.refused_at is not None else "accepts"
        what = ", ".join(
            f"{path}={'(none)' if value is DELETE else value!r:.40}" for path, value in self.changes.items()
        )
        return f"{self.kind} {verb} {what or 'name of ' + str(len(self.name)) + ' characters'}"


def both(
    kind: str,
    path: str,
    message: str,
    *,
    accepted: list[dict[str, Any]],
    refused: list[dict[str, Any]],
    at: str = "",
    beside: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[Case]:
    """Cases of one rule; `at` is where the refusal is reported, when that is not the rule's own path."""
    for changes in accepted:
        yield Case(kind, path, message, {**beside, **changes})
    for changes in refused:
        yield Case(kind, path, message, {**beside, **changes}, refused_at=at or path)


def both_of(kind: str, path: str, message: str, **cases: Any) -> Iterator[Case]:
    """As `both`, of a rule that several kinds share: all cases of the first kind, one and one of the others."""
    if kind != "LoRAAdapter":
        cases |= {name: cases[name][:1] for name in ("accepted", "refused")}
    yield from both(kind, path, message, **cases)


def values(path: str, items: list[Any]) -> list[dict[str, Any]]:
    """One change per value of a field."""
    return [{path: item} for item in items]


def source_cases() -> Iterator[Case]:
    for kind, at in (
        ("LoRAAdapter", "spec.source"),
        ("VLLMDeployment", "spec.model.source"),
        ("VLLMDeployment", "spec.model.tokenizer.source"),
        ("VLLMDeployment", "spec.model.draftModel.source"),
        ("ModelArtifact", "spec.source"),
    ):
        hub = f"{at}.huggingFace"
        # What has to stand beside a change where the smallest manifest has no such source.
        beside: dict[str, Any] = {f"{hub}.repo": "org/other"} if at.count(".") > 2 else {}
        if "draftModel" in at:
            beside["spec.model.draftModel.numSpeculativeTokens"] = 3
        yield from both(
            kind,
            at,
            f"source must have exactly one of: {MEMBERS}",
            accepted=[{f"{at}.path": "checkpoint-500"}, {at: {"s3": {"bucket": "models"}}}],
            refused=[{at: {}}, {at: {"path": "checkpoint-500"}}, {f"{at}.s3": {"bucket": "models"}}],
            beside=beside,
        )
        yield from s3_cases(
            kind, at, beside={path: value for path, value in beside.items() if not path.startswith(hub)}
        )
        plain = {path: value for path, value in beside.items() if not path.startswith(hub)}
        yield from http_cases(kind, at, beside=plain)
        yield from folder_cases(kind, at, beside=plain)
        yield from both(
            kind,
            f"{at}.path",
            "path must be a folder inside the source: relative, without '.' and '..' parts",
            accepted=values(f"{at}.path", ["", "checkpoint-500", "a/b", "a/b/", "..a", "a b"]),
            refused=values(f"{at}.path", ["/etc", "..", "a/../../b", "./a", "a/."]),
            beside=beside,
        )
        yield from both(
            kind,
            f"{hub}.repo",
            "repo must be a repository id like organisation/name",
            accepted=values(f"{hub}.repo", ["org/name", "gpt2", "Org_1/na.me-1"]),
            refused=values(f"{hub}.repo", ["/name", "org/", "a/b/c", "https://hub.example/org/name", "org/na me"]),
            beside=beside,
        )
        yield from both(
            kind,
            f"{hub}.repo",
            "repo must be a repository id without '--', '..' or a trailing '.git'",
            accepted=values(f"{hub}.repo", ["org/a-b.c"]),
            refused=values(f"{hub}.repo", ["org/a--b", "org/a..b", "org/a.git"]),
            beside=beside,
        )
        yield from both(
            kind,
            f"{hub}.revision",
            "revision must be a branch, tag or commit",
            accepted=values(f"{hub}.revision", ["v1.0", "refs/pr/1", "0123456789abcdef0123456789abcdef01234567"]),
            refused=values(f"{hub}.revision", ["-x", "a b", "/main", "a@{1}", "a?b"]),
            beside=beside,
        )
        yield from both(
            kind,
            f"{hub}.revision",
            "revision must be a branch, tag or commit, without '..'",
            accepted=values(f"{hub}.revision", ["release.1"]),
            refused=values(f"{hub}.revision", ["a/../b"]),
            beside=beside,
        )


def s3_cases(kind: str, at: str, *, beside: dict[str, Any]) -> Iterator[Case]:
    def s3(**members: Any) -> dict[str, Any]:
        return {at: {"s3": {"bucket": "models", **members}}}

    yield from both(
        kind,
        f"{at}.s3.bucket",
        "bucket must be a bucket's name alone: letters, digits, '.', '_' and '-'",
        accepted=[s3(bucket=bucket) for bucket in ("abc", "my.models-1", "Old_Bucket")],
        refused=[s3(bucket=bucket) for bucket in ("s3://models", "models/sql", "-models", "mod els")],
        beside=beside,
    )
    yield from both(
        kind,
        f"{at}.s3.prefix",
        "prefix must be a folder inside the bucket: without a leading '/', empty parts, '.' and '..'",
        accepted=[s3(prefix=prefix) for prefix in ("", "sql", "team-a/sql/", "a b", "..a")],
        refused=[s3(prefix=prefix) for prefix in ("/sql", "a//b", "a/../b", "./a")],
        beside=beside,
    )
    yield from both(
        kind,
        f"{at}.s3",
        "addressingStyle is for a service with an endpoint: AWS is asked as the bucket's name allows",
        accepted=[s3(addressingStyle=style, endpoint="https://s3.test") for style in ("Path", "VirtualHost")],
        refused=[s3(addressingStyle="Path")],
        beside=beside,
    )
    yield from role_cases(kind, f"{at}.s3.assumeRole", lambda role: s3(assumeRole=role), beside=beside)


ROLE = "arn:aws:iam::123456789012:role/team-a/models"
ROLE_ARN = "arn must be a role's: arn:aws:iam::<account>:role/<name>"
ROLES = (
    ROLE,
    "arn:aws-cn:iam::123456789012:role/m+=,.@_-",
    "arn:aws:iam:::role/models",
    "arn:aws:iam::RGW1:role/models",
)
NO_ROLES = (
    "arn:aws:iam::123456789012:user/models",
    "arn:aws:sts::123456789012:assumed-role/models/me",
    "team-a-models-of-the-account",
    "arn:aws:iam::123456789012:role/",
    "arn:aws:iam::123456789012:role/a b",
)


def role_cases(
    kind: str, at: str, of: Callable[[dict[str, Any]], dict[str, Any]], *, beside: Mapping[str, Any]
) -> Iterator[Case]:
    yield from both_of(
        kind,
        f"{at}.arn",
        ROLE_ARN,
        accepted=[of({"arn": arn}) for arn in ROLES],
        refused=[of({"arn": arn}) for arn in NO_ROLES],
        beside=beside,
    )
    yield from both_of(
        kind,
        f"{at}.externalId",
        "externalId must be letters, digits and '_', '+', '=', ',', '.', '@', ':', '/', '-'",
        accepted=[of({"arn": ROLE, "externalId": given}) for given in ("42", "a_B+=,.@:/-9")],
        refused=[of({"arn": ROLE, "externalId": given}) for given in ("a b", "naïve", "a?b")],
        beside=beside,
    )


IN_VOLUME = "relative, without empty parts, '.' and '..'"
IN_BUCKET = "prefix must be a folder inside the bucket: without a leading '/', empty parts, '.' and '..'"
OWN_FOLDER = (
    f"path must not be in a folder of the operator's own: one that begins with '.', {', '.join(RESERVED_FOLDERS)}"
)
NO_FOLDERS = ("/sql", "a//b", "a/../b", "./a")
FOLDERS = ("sql", "team-a/sql/", "a b")


def folder_cases(kind: str, at: str, *, beside: dict[str, Any]) -> Iterator[Case]:
    """Folders of buckets and volumes, and the names of buckets."""

    def rule(
        member: str, field: str, message: str, good: tuple[str, ...], bad: tuple[str, ...], **more: str
    ) -> Iterator[Case]:
        return both_of(
            kind,
            f"{at}.{member}.{field}",
            message,
            accepted=[{at: {member: {**more, field: value}}} for value in good],
            refused=[{at: {member: {**more, field: value}}} for value in bad],
            beside=beside,
        )

    claim = {"claimName": "trained"}
    inside = f"path must be a folder inside the volume: {IN_VOLUME}"
    yield from rule("persistentVolumeClaim", "path", inside, ("", *FOLDERS, "hub"), NO_FOLDERS, **claim)
    inside = f"path must be a folder inside the cache's volume: {IN_VOLUME}"
    yield from rule("local", "path", inside, FOLDERS, NO_FOLDERS)
    yield from rule("local", "path", OWN_FOLDER, ("hubs", "a/hub"), ("hub", "Hub/x", "artifacts/a", "s3", ".locks"))
    names = "bucket must be a bucket's name alone: small letters, digits, '.', '_' and '-'"
    yield from rule("gcs", "bucket", names, ("abc", "my.models-1"), ("gs://abc", "a/b", "-abc", "Abc"))
    yield from rule("gcs", "prefix", IN_BUCKET, ("", *FOLDERS), NO_FOLDERS, bucket="models")
    azure = {"account": "models", "container": "adapters"}
    names = "account must be a storage account's name: small letters and digits"
    yield from rule("azure", "account", names, ("models1",), ("my-models", "a.b", "Abc"), container="adapters")
    names = "container must be a container's name alone: small letters, digits and single '-'"
    yield from rule("azure", "container", names, ("ada-pters", "$web"), ("a--b", "a/b", "Abc"), account="models")
    yield from rule("azure", "prefix", IN_BUCKET, ("", *FOLDERS), NO_FOLDERS, **azure)
    yield from rule(
        "oci",
        "reference",
        "reference must be <registry>/<repository>, with :<tag> or @sha256:<digest>, without a scheme",
        ("r.example/sql", "r.example:5000/team-a/sql:v1.0", f"r.example/a/b_c@sha256:{'0' * 64}"),
        (
            "oci://r.example/sql",
            "sql",
            "r.example/SQL",
            "r.example/a//b",
            "r.example/a:v1:v2",
            "u@r.example/a",
            "r.example/../a",
            "r..example/a",
            "r.example:99999/a",
        ),
    )


HOSTS = "a DNS name, an IPv4 address or an IPv6 address in brackets, with a port where one is needed"
AN_ENDPOINT = f"an endpoint is http:// or https:// and a host: {HOSTS}; without user, query and trailing '/'"
A_URL = f"a url is http:// or https://, a host and a path; a host is {HOSTS}"
A_SERVER = f"a server is http:// or https:// and a host: {HOSTS}"
GOOD_HOSTS = ("a.test", "localhost:5000", "10.0.0.1", "[::1]:9000", "[2001:db8::1]", "[1:2:3:4:5:6:7:8]")
# The first two are what Python's own parser refuses, the others what clients do.
BAD_HOSTS = ("[::::]", "[1.2.3.4]", "[[", "a..b", "-a", "x" * 64, "a.test:65536", "a.test:0")


def _one_server(at: str, host: str) -> dict[str, Any]:
    return {at: [f"https://{host}"]}


def address_cases() -> Iterator[Case]:
    """Every address that a spec may have: what no client could make out is refused before it is stored."""
    file = {"path": "a", "sha256": "0" * 64}
    sources = (
        ("LoRAAdapter", "spec.source"),
        ("VLLMDeployment", "spec.model.source"),
        ("VLLMDeployment", "spec.model.tokenizer.source"),
        ("VLLMDeployment", "spec.model.draftModel.source"),
        ("ModelArtifact", "spec.source"),
    )

    def some(kind: str, at: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (
            (GOOD_HOSTS, BAD_HOSTS)
            if (kind, at) == ("LoRAAdapter", "spec.source.http.url")
            else (GOOD_HOSTS[:1], BAD_HOSTS[:1])
        )

    def cases(kind: str, path: str, at: str, message: str, made: Callable[[str], dict[str, Any]]) -> Iterator[Case]:
        good, bad = some(kind, path)
        yield from both(
            kind, path, message, accepted=[made(host) for host in good], refused=[made(host) for host in bad], at=at
        )

    for kind, at in sources:
        more = {"spec.model.draftModel.numSpeculativeTokens": 3} if "draftModel" in at else {}
        for member, names in (
            ("s3", {"bucket": "models"}),
            ("gcs", {"bucket": "models"}),
            ("azure", {"account": "models", "container": "adapters"}),
        ):

            def in_bucket(host: str, member: str = member, names: Any = names, at: str = at, more: Any = more) -> Any:
                return {at: {member: {**names, "endpoint": f"http://{host}/x"}}, **more}

            path = f"{at}.{member}.endpoint"
            yield from cases(kind, path, path, AN_ENDPOINT, in_bucket)

        def archive(host: str, at: str = at, more: Any = more) -> Any:
            return {at: {"http": {"url": f"http://{host}/a.zip", "sha256": "0" * 64}}, **more}

        def files(host: str, at: str = at, more: Any = more) -> Any:
            return {at: {"http": {"files": [{**file, "url": f"http://{host}/a"}]}}, **more}

        yield from cases(kind, f"{at}.http.url", f"{at}.http.url", A_URL, archive)
        yield from cases(kind, f"{at}.http.files[].url", f"{at}.http.files[0].url", A_URL, files)
    kind, hub = "ModelCache", "spec.huggingFace.endpoint"
    message = f"endpoint must be http:// or https:// and a host: {HOSTS}"
    yield from cases(kind, hub, hub, message, lambda host: {hub: f"https://{host}/hub/"})
    for member, message in (
        ("s3", AN_ENDPOINT),
        ("gcs", AN_ENDPOINT),
        ("azure", AN_ENDPOINT),
        ("http", A_SERVER),
        ("oci", A_SERVER),
    ):
        at = f"spec.{member}.allowedEndpoints"
        yield from cases(kind, f"{at}[]", f"{at}[0]", message, partial(_one_server, at))
    for field in ("s3Endpoint", "address"):

        def sts(host: str, field: str = field) -> Any:
            entry = {"s3Endpoint": "https://s3.test", "address": "https://sts.test", field: f"https://{host}"}
            return {"spec.s3": {"allowedEndpoints": ["https://s3.test", f"https://{host}"], "stsEndpoints": [entry]}}

        path = f"spec.s3.stsEndpoints[].{field}"
        yield from cases(kind, path, path.replace("[]", "[0]"), AN_ENDPOINT, sts)


HTTP_FILE = {"path": "adapter_config.json", "url": "https://models.example/a.json", "sha256": "0" * 64}


def http_cases(kind: str, at: str, *, beside: dict[str, Any]) -> Iterator[Case]:
    def http(**members: Any) -> dict[str, Any]:
        return {at: {"http": members}}

    archive = {"url": "https://models.example/sql.tar.gz?download=1", "sha256": "0" * 64}
    yield from both_of(
        kind,
        f"{at}.http",
        "http must have exactly one of: url (of an archive), files",
        accepted=[http(**archive), http(files=[HTTP_FILE])],
        refused=[http(), http(**archive, files=[HTTP_FILE])],
        beside=beside,
    )
    yield from both_of(
        kind,
        f"{at}.http",
        "http.sha256 is required with url, and each of files has its own",
        accepted=[http(**archive)],
        refused=[http(url=archive["url"]), http(files=[HTTP_FILE], sha256="0" * 64)],
        beside=beside,
    )
    yield from both_of(
        kind,
        f"{at}.http",
        "http.maxSize is for an archive's content: only with url",
        accepted=[http(**archive, maxSize="2Gi"), http(**archive, maxSize=1000)],
        refused=[http(files=[HTTP_FILE], maxSize="2Gi")],
        beside=beside,
    )


def life_cases() -> Iterator[Case]:
    yield from both(
        "LoRAAdapter",
        "spec",
        "placement.preload is for loadPolicy: Eager; with Lazy no pod loads the adapter in advance",
        accepted=[
            {"spec.placement.preload": 2},
            {"spec.placement.preload": 2, "spec.loadPolicy": "Eager"},
            {"spec.placement": {}, "spec.loadPolicy": "Lazy"},
            {"spec.suspend": True},
        ],
        refused=[{"spec.placement.preload": 2, "spec.loadPolicy": "Lazy"}],
    )
    yield from both(
        "LoRAAdapter",
        "spec.refreshInterval",
        "refreshInterval must be a duration like 30m or 1h30m, of at least 1m",
        accepted=values("spec.refreshInterval", ["1m", "60s", "30m", "1h30m", "1.5h", "8760h"]),
        refused=values("spec.refreshInterval", ["59s", "0h", "30", "-1h", "1d", "", "1h ", "100ms", "h"]),
    )


SERVED_NAME = (
    "a served name begins with a letter, digit or '_' and holds only letters, digits and '.', '_', '-', ':', '/'"
)
GOOD_NAMES = ["sql", "team-a/sql:v1.2", "Org_1/X", "7b"]
BAD_NAMES = ["a,b", "sql@abc", "-sql", "a b", ".a", "a\n", "naïve"]


def adapter_cases() -> Iterator[Case]:
    for field in ("spec.servedName", "spec.baseModelName"):
        yield from both(
            "LoRAAdapter",
            field,
            SERVED_NAME,
            accepted=values(field, GOOD_NAMES),
            refused=values(field, BAD_NAMES),
        )
    message = "metadata.name is longer than the 128 characters of a served name: set spec.servedName"
    yield Case("LoRAAdapter", "", message, {}, name="a" * 128)
    yield Case("LoRAAdapter", "", message, {"spec.servedName": "sql"}, name="a" * 200)
    yield Case("LoRAAdapter", "", message, {}, refused_at="", name="a" * 129)


CREDENTIALS: dict[str, dict[str, Any]] = {
    "s3": {"bucket": "models"},
    "http": {"files": [HTTP_FILE]},
    "gcs": {"bucket": "models"},
    "azure": {"account": "models", "container": "adapters"},
    "oci": {"reference": "r.example/sql:v1"},
}


def artifact_cases() -> Iterator[Case]:
    kind = "ModelArtifact"
    immutable = "spec is immutable: another source or revision is another ModelArtifact"
    yield Case(kind, "spec", immutable, {"metadata.labels": {"a": "b"}}, update=True)
    yield Case(kind, "spec", immutable, {"spec.source.huggingFace.revision": "main"}, update=True)  # the default
    for change in (
        {"spec.source.huggingFace.revision": "v2"},
        {"spec.source.path": "a"},
        {"spec.type": "BaseModel"},
    ):
        yield Case(kind, "spec", immutable, change, refused_at="spec", update=True)
    yield from both(
        kind,
        "spec",
        "baseModelRef is only for type: Adapter",
        accepted=[{"spec.baseModelRef": {"name": "base"}}, {"spec.type": "BaseModel"}],
        refused=[{"spec.baseModelRef": {"name": "base"}, "spec.type": "BaseModel"}],
    )
    in_role = {"spec.assumeRole": {"arn": ROLE}}
    yield from both(
        kind,
        "spec",
        "assumeRole is for source.s3, and excludes source.s3.assumeRole",
        accepted=[
            {"spec.source": {"s3": {"bucket": "models"}}, **in_role},
            {"spec.source": {"s3": {"bucket": "models", "assumeRole": {"arn": ROLE}}}},
        ],
        refused=[
            in_role,
            {"spec.source": {"s3": {"bucket": "models", "assumeRole": {"arn": ROLE}}}, **in_role},
        ],
    )
    yield from role_cases(
        kind,
        "spec.assumeRole",
        lambda role: {"spec.assumeRole": role},
        beside={"spec.source": {"s3": {"bucket": "models"}}},
    )
    yield from both(
        kind,
        "spec",
        "pickledWeights is only for type: Adapter",
        accepted=[{"spec.pickledWeights": "AllowScanned"}, {"spec.type": "BaseModel"}],
        refused=[{"spec.pickledWeights": "AllowScanned", "spec.type": "BaseModel"}],
    )
    credentials = {"namespace": "team-a", "name": "hf", "key": "token", "uid": "1"}
    base = {"spec.type": "BaseModel"}
    yield from both(
        kind,
        "spec",
        "loadFormat and withoutTokenizer are only for type: BaseModel, trustRemoteCode for it and for type: Tokenizer",
        accepted=[
            base | {"spec.loadFormat": "pt", "spec.withoutTokenizer": True, "spec.trustRemoteCode": True},
            {"spec.type": "Tokenizer", "spec.trustRemoteCode": True},
            {"spec.type": "Tokenizer"},
        ],
        refused=[
            {"spec.loadFormat": "pt"},
            {"spec.trustRemoteCode": True},
            {"spec.type": "Tokenizer", "spec.withoutTokenizer": True},
            {"spec.type": "Tokenizer", "spec.loadFormat": "pt"},
        ],
    )
    token = "spec.source.huggingFace.tokenSecretRef"
    yield from both(
        kind,
        "spec",
        "credentials and source.huggingFace.tokenSecretRef exclude each other",
        accepted=[{"spec.credentials": credentials}, {token: {"name": "hf"}}],
        refused=[{"spec.credentials": credentials, token: {"name": "hf"}}],
    )
    for member, plain in CREDENTIALS.items():
        scheme = BY_MEMBER[member]
        assert scheme.secrets is not None
        field = scheme.secrets.field
        open_, named = {member: plain}, {member: {**plain, field: {"name": "keys"}}}
        yield from both(
            kind,
            "spec",
            f"credentials and source.{member}.{field} exclude each other",
            accepted=[{"spec.credentials": credentials, "spec.source": open_}, {"spec.source": named}],
            refused=[{"spec.credentials": credentials, "spec.source": named}],
        )


GOOD_ARGS = [
    "--enforce-eager",
    "--max-num-seqs 4",
    "--max-num-seqs=4",
    "--tensor-parallel-size=2",
    "-tp",
    "-O3",
    "-1",
    "-",
    "--",
    "4",
    "",
    "model",
    "--gpu-memory-utilization=0.9",
    "--lora-dtype=auto",
    "--hf-overrides.rope_theta=1",
    "--enable-prefix-caching",
    "--root-paths",
    "--tokenizer-mode=mistral",
    "--tokenizer-revision",
    "--chat-template-content-format",
    "--default-chat-template-kwargs",
    "--quantization-config",
    "--speculative-config",
    "-sc",
    "--spec-method=ngram",
    "--specialize-active-lora",
    "-dp",
    "-dp=2",
    "--data-parallel-size=2",
    "--data_parallel_size_local",
    "-dpl",
    "--enable-tower-connector-lora",
    "--no-enable-prefix-caching",
    "--default-mm-lorasx",
]
BAD_ARGS = [
    *OPERATORS_FLAGS,
    "--lora_modules=x",
    "--lora-modules=a=/b",
    "--max-lora",
    "--max_cpu_lor",
    "--ho",
    "--dt=float16",
    "--lora-modules.a=1",
    "--model=/x",
    "--served_model_name",
    "--api",
    "--middle=x.Y",
    "--no-enable-lo",
    "-as",
    "-qawq",
    "-q=awq",
    "--quant",
    "--load_format=pt",
    "--trust",
    "--trust-remote-code=true",
    "--chat-templ",
    "--tok",
]
BAD_PARTS = [
    *PARTS_FLAGS,
    "--data-parallel-ext",
    "--data_parallel_rank=1",
    "--data_parallel-start",
    "--data-parallel-multi",
    "--data-parallel-hyb",
    "--data-parallel-rank.x=1",
    "-dpn=1",
    "--nn",
    "--node_rank",
    "--master",
    "-n2",
    "-r=1",
]
BAD_ADAPTERS = [
    *ADAPTERS_FLAGS,
    "--default_mm_loras={}",
    "--default-mm",
    "--enable-mixed",
    "--lora-target=q_proj",
    "--lora_tar",
]
BAD_SERVERS = [*SERVERS_FLAGS, "--grpc_port=1", "--gr", "--omn"]


def deployment_cases() -> Iterator[Case]:
    kind = "VLLMDeployment"
    message = "metadata.name is the name of a Service too: at most 63 of a-z, 0-9 and '-', beginning with a letter"
    for name in ("llama-3", "a" * 63):
        yield Case(kind, "", message, {}, name=name)
    for name in ("3-llama", "llama.3", "a" * 64):
        yield Case(kind, "", message, {}, name=name, refused_at="")
    yield from both(
        kind,
        "spec.model.servedNames[]",
        SERVED_NAME,
        accepted=[{"spec.model.servedNames": GOOD_NAMES}],
        refused=values("spec.model.servedNames", [["good", name] for name in BAD_NAMES]),
        at="spec.model.servedNames[1]",
    )
    yield from both(
        kind,
        "spec.lora",
        "maxCpuLoras must be at least maxLoras",
        accepted=[{"spec.lora": {"maxLoras": 4, "maxCpuLoras": 4}}, {"spec.lora": {"maxLoras": 64}}],
        refused=[{"spec.lora": {"maxLoras": 5, "maxCpuLoras": 4}}, {"spec.lora": {"maxLoras": 65}}],
    )
    yield from policy_cases(kind)
    draft = {"source": {"huggingFace": {"repo": "org/draft"}}, "numSpeculativeTokens": 3}
    flags = ["--speculative-config", "--speculative_config={}", "--specu", "-sc", "-sc.method=ngram", "--spec-model=x"]
    yield from both(
        kind,
        "spec",
        "model.draftModel sets --speculative-config: take the flags of speculative decoding out of engine.args, "
        "or leave out draftModel",
        accepted=[
            {"spec.engine.args": flags},
            {"spec.model.draftModel": draft},
            {
                "spec.model.draftModel": draft,
                "spec.engine.args": ["--enforce-eager", "--specialize-active-lora", "-tp"],
            },
        ],
        refused=[{"spec.model.draftModel": draft, "spec.engine.args": ["--enforce-eager", flag]} for flag in flags],
    )
    yield from both(
        kind,
        "spec.engine.args[]",
        "this is a flag that the operator sets, or the beginning of one: use the fields of the spec instead "
        "(kubectl explain vllm.spec.engine.args lists them)",
        accepted=[{"spec.engine.args": GOOD_ARGS}, {"spec.engine.args": ["--enforce-eager"] * 64}],
        refused=values("spec.engine.args", [["--enforce-eager", flag] for flag in BAD_ARGS]),
        at="spec.engine.args[1]",
    )
    for message, flags in (
        (
            "each pod is a whole engine with one API server, which is all that the operator asks: leave out the flags of "
            "ranks, nodes and load balancers; --data-parallel-size, --tensor-parallel-size and spec.replicas are fine",
            BAD_PARTS,
        ),
        (
            "adapters are what LoRAAdapters say, whole: --default-mm-loras has others, which would be unloaded, "
            "--enable-mixed-moe-lora-format and --enable-moe-shared-loras take other forms of them, and --lora-target-modules leaves modules of them out silently",
            BAD_ADAPTERS,
        ),
        (
            "this starts another server than vLLM's OpenAI API over HTTP: it has no gate, and no adapters are loaded there",
            BAD_SERVERS,
        ),
    ):
        yield from both(
            kind,
            "spec.engine.args[]",
            message,
            accepted=[{"spec.engine.args": GOOD_ARGS}],
            refused=values("spec.engine.args", [["--enforce-eager", flag] for flag in flags]),
            at="spec.engine.args[1]",
        )
    variables = ["LORA_OPERATOR_STATE", "LORA_OPERATOR_", *RESERVED_ENV, *IGNORED_ENV]
    variables += [f"{prefix}THROTTLE" for prefix in IGNORED_ENV_PREFIXES]
    harmless = [{"name": name, "value": "2"} for name in ("OMP_NUM_THREADS", "PYTHONPATH", "VLLM_PLUGINS")]
    yield from both(
        kind,
        "spec.engine.env[].name",
        f"env must not set LORA_OPERATOR_* nor {', '.join(RESERVED_ENV)}, which the operator sets, nor what would take the "
        f"engine's gate or adapters out of its hands: {', '.join(IGNORED_ENV)}, CUSTOM_FASTAPI_MIDDLEWARE_*",
        accepted=[{"spec.engine.env": harmless}],
        refused=values("spec.engine.env", [[{"name": name, "value": "x"}] for name in variables]),
        at="spec.engine.env[0].name",
    )


def policy_cases(kind: str) -> Iterator[Case]:
    at = "spec.adapterPolicy.namespaces"
    yield from both(
        kind,
        at,
        "selector is required with from: Selector, and not allowed otherwise",
        accepted=[
            *values(at, [{}, {"from": "All"}, {"from": "Selector", "selector": {}}]),
            {at: {"from": "Selector", "selector": {"matchLabels": {"team": "a"}}}},
        ],
        refused=values(at, [{"from": "Selector"}, {"selector": {}}, {"from": "All", "selector": {}}]),
    )

    def select(operator: str, items: list[str] | None) -> dict[str, Any]:
        requirement: dict[str, Any] = {"key": "team", "operator": operator}
        if items is not None:
            requirement["values"] = items
        return {at: {"from": "Selector", "selector": {"matchExpressions": [requirement]}}}

    yield from both(
        kind,
        f"{at}.selector.matchExpressions[]",
        "values are required with operator In or NotIn, and not allowed with Exists or DoesNotExist",
        accepted=[select("In", ["a"]), select("NotIn", ["a", "b"]), select("Exists", None), select("DoesNotExist", [])],
        refused=[select("In", None), select("NotIn", []), select("Exists", ["a"])],
        at=f"{at}.selector.matchExpressions[0]",
    )


def claim_template(*modes: str, storage: str = "10Gi") -> dict[str, Any]:
    return {"spec": {"accessModes": list(modes or ["ReadWriteMany"]), "resources": {"requests": {"storage": storage}}}}


def made(template: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"spec.storage": {"volumeClaimTemplate": template, **more}}


def cache_cases() -> Iterator[Case]:
    kind, at = "ModelCache", "spec.storage"
    for message, bad in (
        (f"path must be a folder inside the cache's volume: {IN_VOLUME}", NO_FOLDERS),
        (OWN_FOLDER, ("hub", "ARTIFACTS/x", "http", ".locks")),
    ):
        yield from both(
            kind,
            "spec.local.allowedPaths[].path",
            message,
            accepted=[{"spec.local.allowedPaths": [{"path": "by-hand", "namespaces": ["*"]}]}],
            refused=[{"spec.local.allowedPaths": [{"path": path}]} for path in bad],
            at="spec.local.allowedPaths[0].path",
        )
    yield from both(
        kind,
        at,
        "storage must have exactly one of: existingClaim, volumeClaimTemplate",
        accepted=[{f"{at}.existingClaim": "models"}, made(claim_template())],
        refused=[{at: {}}, made(claim_template(), existingClaim="models")],
    )
    yield from both(
        kind,
        at,
        "reclaimPolicy is only for volumeClaimTemplate: a claim that exists already is never deleted",
        accepted=[made(claim_template(), reclaimPolicy=policy) for policy in ("Retain", "Delete")],
        refused=[{f"{at}.reclaimPolicy": policy} for policy in ("Retain", "Delete")],
    )
    modes = f"{at}.volumeClaimTemplate.spec.accessModes"
    yield from both(
        kind,
        modes,
        "accessModes must have ReadWriteMany, or ReadWriteOnce for one node: Jobs write to the volume while engines read",
        accepted=[made(claim_template("ReadWriteOnce")), made(claim_template("ReadOnlyMany", "ReadWriteMany"))],
        refused=[made(claim_template("ReadOnlyMany"))],
    )
    yield from both(
        kind,
        modes,
        "accessModes can't have ReadWriteOncePod: a Job and an engine could never mount the volume together",
        accepted=[made(claim_template("ReadWriteOnce", "ReadWriteMany"))],
        refused=[made(claim_template("ReadWriteOncePod")), made(claim_template("ReadWriteOnce", "ReadWriteOncePod"))],
    )
    yield from both(
        kind,
        "spec.download.timeout",
        "timeout must be a duration like 90m or 12h, from 10s to 720h",
        accepted=values("spec.download.timeout", ["10s", "90m", "1h30m", "720h"]),
        refused=values("spec.download.timeout", ["9s", "721h", "30", "1d", "", "-1h"]),
    )
    yield from both(
        kind,
        "spec.eviction.keepUnreferencedFor",
        "keepUnreferencedFor must be a duration like 30m or 72h",
        accepted=values("spec.eviction.keepUnreferencedFor", ["0s", "30m", "72h"]),
        refused=values("spec.eviction.keepUnreferencedFor", ["3d", "", "-1h", "72"]),
        beside={"spec.eviction.policy": "LeastRecentlyUsed"},
    )
    age, policy = "spec.eviction.keepUnreferencedFor", "spec.eviction.policy"
    yield from both(
        kind,
        "spec.eviction",
        "keepUnreferencedFor is only for policy LeastRecentlyUsed: by policy Never nothing is removed unless you ask",
        accepted=[{policy: "LeastRecentlyUsed", age: "72h"}, {policy: "LeastRecentlyUsed"}, {policy: "Never"}],
        refused=[{policy: "Never", age: "72h"}, {age: "72h"}],
    )
    message = (
        "volumeClaimTemplate is immutable: to grow the volume, raise spec.resources.requests.storage of the claim itself, "
        "which has this ModelCache's name"
    )
    first = made(claim_template())
    yield Case(kind, at, message, made(claim_template(), reclaimPolicy="Delete"), before=first)
    yield Case(kind, at, message, {f"{at}.existingClaim": "models"}, before=first)
    yield Case(kind, at, message, made(claim_template()))
    for change in (claim_template(storage="20Gi"), claim_template("ReadWriteOnce")):
        yield Case(kind, at, message, made(change), refused_at=at, before=first)


def access_cases() -> Iterator[Case]:
    kind = "ModelCache"
    for proxy in ("httpProxy", "httpsProxy"):
        at = f"spec.network.{proxy}"
        yield from both(
            kind,
            at,
            "a proxy is http://host:port or https://host:port, without user name and password",
            accepted=values(at, ["http://proxy.test:3128", "https://[2001:db8::1]:8080", "http://10.0.0.1/"]),
            refused=values(
                at,
                [
                    "proxy.test:3128",
                    "http://me:secret@proxy.test:3128",
                    "socks5://proxy.test",
                    "http://p.test/x",
                    "http://[::::]",
                ],
            ),
        )
    sts = [{"s3Endpoint": "https://s3.test", "address": "https://sts.test"}]
    yield from both(
        kind,
        "spec.s3",
        "s3Endpoint of stsEndpoints must be one of allowedEndpoints, character by character",
        accepted=[
            {"spec.s3": {"allowedEndpoints": ["https://a.test", "https://s3.test"], "stsEndpoints": sts}},
            {"spec.s3": {"allowedEndpoints": ["https://a.test"]}},
            {"spec.s3": {}},
        ],
        refused=[
            {"spec.s3": {"allowedEndpoints": allowed, "stsEndpoints": sts}} for allowed in ([], ["https://s3.test:443"])
        ]
        + [{"spec.s3": {"stsEndpoints": sts}}],
    )
    at = "spec.workloadIdentity"
    yield from both(
        kind,
        f"{at}.allowedSources[]",
        "an allowed source is like s3://bucket/folder/*, or like https://s3.example/bucket/folder/* for a source with an endpoint",
        accepted=[{f"{at}.allowedSources": ["s3://models/*", "https://s3.test/models/team-a/*"]}],
        refused=[{f"{at}.allowedSources": [pattern]} for pattern in ("models/*", "ftp://models/*", "*s3://models")],
        at=f"{at}.allowedSources[0]",
        beside={f"{at}.serviceAccountName": "reader"},
    )
    yield from both(
        kind,
        f"{at}.allowedRoles[].arn",
        ROLE_ARN,
        accepted=[{f"{at}.allowedRoles": [{"arn": arn, "namespaces": ["team-a", "*"]}]} for arn in ROLES[:2]],
        refused=[{f"{at}.allowedRoles": [{"arn": arn}]} for arn in NO_ROLES[:2]],
        at=f"{at}.allowedRoles[0].arn",
        beside={f"{at}.serviceAccountName": "reader", f"{at}.allowedSources": ["s3://models/*"]},
    )
    yield from both(
        kind,
        "spec.jobTemplate.labels",
        "labels of lora-operator.dev/ and app.kubernetes.io/ are the operator's",
        accepted=[{"spec.jobTemplate.labels": {"azure.workload.identity/use": "true"}}],
        refused=[
            {"spec.jobTemplate.labels": {label: "x"}}
            for label in ("lora-operator.dev/x", "app.kubernetes.io/component")
        ],
    )


CASES = [
    *source_cases(),
    *life_cases(),
    *adapter_cases(),
    *artifact_cases(),
    *deployment_cases(),
    *cache_cases(),
    *access_cases(),
    *address_cases(),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_api_server(case: Case, kubectl: Kubectl, request: pytest.FixtureRequest) -> None:
    updates = case.update or case.before is not None
    namespace = request.getfixturevalue("namespace") if updates else "default"
    if updates:
        assert kubectl.apply(manifest(case.kind, case.before, name=case.name, namespace=namespace)).ok

    asked = manifest(case.kind, case.changes, name=case.name, namespace=namespace)
    answer = kubectl.apply(asked, "--dry-run=server")

    assert answer.ok == (case.refused_at is None), answer.error
    if case.refused_at is not None:
        complaints = re.findall(r"(?:is invalid: |^\* )(.*?): Invalid value: .*?: (.*)$", answer.error, re.MULTILINE)
        assert (case.refused_at or "<nil>", case.message) in complaints, answer.error


@pytest.mark.parametrize(
    "path", ["ModelCache/spec.capacity", "ModelCache/spec.minFree", "LoRAAdapter/spec.source.sizeHint"]
)
def test_a_size_is_what_the_operator_can_reckon_with(path: str, kubectl: Kubectl) -> None:
    kind, _, field = path.partition("/")
    for good in (0, 2**62, "10Gi", "1.5e9", "1E99", "2E"):
        answer = kubectl.apply(manifest(kind, {field: good}, namespace="default"), "--dry-run=server")
        assert answer.ok, f"{good!r}: {answer.error}"
    for bad in (-1, "-1", "1e100", "1e9999999", "10GiB", "ten", ""):
        answer = kubectl.apply(manifest(kind, {field: bad}, namespace="default"), "--dry-run=server")
        assert not answer.ok, f"{bad!r} is accepted"
        assert f"{field}: Invalid value" in answer.error


def test_every_rule_of_the_crds_has_an_accepted_and_a_refused_manifest() -> None:
    rules = {
        (info.kind, path, message)
        for info in RESOURCES
        for path, message in rules_of(
            build_crd(info)["spec"]["versions"][0]["schema"]["openAPIV3Schema"],
        )
    }
    keys = [((case.kind, case.rule_path, case.message), case.refused_at is not None) for case in CASES]
    assert rules == {key for key, _ in keys}
    for rule in rules:
        assert (rule, True) in keys, f"no refused manifest for {rule}"
        assert (rule, False) in keys, f"no accepted manifest for {rule}"
