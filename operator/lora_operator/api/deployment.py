"""VLLMDeployment: a fleet of vLLM pods for one base model. Written by the platform team."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, WithJsonSchema

from lora_operator.api.common import (
    AGE,
    ApiModel,
    Conditions,
    FreeForm,
    LabelSelector,
    LocalRef,
    PrinterColumn,
    Resource,
    ResourceInfo,
    SecretKeyRef,
    cel,
    reason_column,
)
from lora_operator.api.model import ModelSpec
from lora_operator.api.storage import Quantity
from lora_operator.constants import DEFAULT_ENGINE_PORT
from lora_operator.engine_plugin.ignored_env import IGNORED_ENV, IGNORED_ENV_PREFIXES

DEFAULT_REQUEST_SIZE = "64Mi"
# Flags that follow from other fields of the spec, or that would open or break what the operator runs (probes and the operator speak
# plain HTTP). vLLM takes _ for -, any unambiguous beginning of a flag, and --flag.key for a part of a JSON value
# (vllm/utils/argparse_utils.py), so the rules refuse those as well, and -qawq for -q awq.
OPERATORS_FLAGS = (
    "--model",
    "--served-model-name",
    "--host",
    "--port",
    "--uds",
    "--config",
    "--dtype",
    "--max-model-len",
    "--load-format",
    "--quantization",
    "-q",
    "--trust-remote-code",
    "--no-trust-remote-code",
    "--chat-template",
    "--tokenizer",
    "--enable-lora",
    "--no-enable-lora",
    "--max-loras",
    "--max-cpu-loras",
    "--max-lora-rank",
    "--lora-modules",
    "--middleware",
    "--api-server-count",
    "-asc",
    "--headless",
    "--ssl-keyfile",
    "--ssl-certfile",
    "--api-key",
    "--root-path",
    "--shutdown-timeout",
)
# API servers of one pod on more ports than one, all with the same state files, of which the operator asks one; or pods that are parts
# of one engine. --data-parallel-size (-dp) alone is fine: one API server.
PARTS_FLAGS = (
    "--data-parallel-rank",
    "-dpn",
    "--data-parallel-start-rank",
    "-dpr",
    "--data-parallel-external-lb",
    "-dpe",
    "--data-parallel-hybrid-lb",
    "-dph",
    "--data-parallel-multi-port-external-lb",
    "-dpm",
    "--nnodes",
    "-n",
    "--node-rank",
    "-r",
    "--master-addr",
    "--master-port",
)
# Adapters beside the list, whose entries the plugin would unload; a format that no request of the plugin names; modules that are left out
# silently, so that a Ready adapter may do nothing.
ADAPTERS_FLAGS = (
    "--default-mm-loras",
    "--enable-mixed-moe-lora-format",
    "--enable-moe-shared-loras",
    "--lora-target-modules",
)
# Servers that the plugin, which is a middleware of vLLM's own, is no part of: nothing is loaded there, and there is no gate.
SERVERS_FLAGS = ("--grpc", "--grpc-port", "--omni")
RESERVED_ENV = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
    "VLLM_API_KEY",
    "HF_HUB_OFFLINE",
    "HF_HUB_CACHE",
)
RESERVED_ENV_PREFIXES = ("LORA_OPERATOR_", *IGNORED_ENV_PREFIXES)


def _no_flag(flags: tuple[str, ...], *, letters: tuple[str, ...] = (), but: tuple[str, ...] = ()) -> str:
    """The rule that an argument is none of the flags, nor a beginning of one, but for flags of their own.

    `letters` are flags of one letter, whose value may follow without a space. The list of one element binds the flag's name to f:
    said twice it would cost too much for the API server's budget.
    """
    listed = ", ".join(f"'{flag}'" for flag in flags)
    short = "".join(f"!self.startsWith('{letter}') && " for letter in letters)
    own = "".join(f" && f != '{flag}'" for flag in but)
    return (
        f"!self.startsWith('-') || {short}![self.split('=')[0].split('.')[0].replace('_', '-')]"
        f".exists(f, size(f) > 2{own} && [{listed}].exists(r, r.startsWith(f)))"
    )


# Reserved only while the operator sets --speculative-config: without a draft model vLLM can speculate by other ways (ngram, MTP).
_SPECULATIVE_RULE = (
    "!has(self.model.draftModel) || !has(self.engine.args) || !self.engine.args.exists(a, a.startsWith('-s') || "
    "['--specu', '--spec-', '--spec_'].exists(s, a.startsWith(s)))"
)
_ENV_RULE = (
    " && ".join(f"!self.startsWith('{prefix}')" for prefix in RESERVED_ENV_PREFIXES)
    + " && !(self in ["
    + ", ".join(f"'{name}'" for name in (*RESERVED_ENV, *IGNORED_ENV))
    + "])"
)

Argument = Annotated[
    str,
    Field(
        max_length=4096,
        json_schema_extra=cel(
            (
                _no_flag(OPERATORS_FLAGS, letters=("-q",)),
                "this is a flag that the operator sets, or the beginning of one: use the fields of the spec instead "
                "(kubectl explain vllm.spec.engine.args lists them)",
            ),
            (
                _no_flag(PARTS_FLAGS, letters=("-n", "-r"), but=("-dp",)),
                "each pod is a whole engine with one API server, which is all that the operator asks: leave out the flags of "
                "ranks, nodes and load balancers; --data-parallel-size, --tensor-parallel-size and spec.replicas are fine",
            ),
            (
                _no_flag(ADAPTERS_FLAGS),
                "adapters are what LoRAAdapters say, whole: --default-mm-loras has others, which would be unloaded, "
                "--enable-mixed-moe-lora-format and --enable-moe-shared-loras take other forms of them, and --lora-target-modules leaves modules of them out silently",
            ),
            (
                _no_flag(SERVERS_FLAGS),
                "this starts another server than vLLM's OpenAI API over HTTP: it has no gate, and no adapters are loaded there",
            ),
        ),
    ),
]
LoraRank = Annotated[
    Literal[1, 8, 16, 32, 64, 128, 256, 320, 512],
    WithJsonSchema({"type": "integer", "enum": [1, 8, 16, 32, 64, 128, 256, 320, 512]}),
]


class LoraSpec(ApiModel):
    """How adapters are held by each engine."""

    update_strategy: Literal["HotLoad", "Rollout"] = Field(
        default="HotLoad",
        description="HotLoad: adapters are loaded into and unloaded from running pods (vLLM 0.26 or newer). "
        "Rollout: adapters are arguments of the pods, which are replaced when the adapters change (vLLM 0.10 or newer); "
        "changes are put together: pods roll 5 s after the last one, and wait up to 60 s for adapters that are downloading.",
    )
    max_loras: int = Field(
        default=8, ge=1, le=1024, description="Adapters in one batch (GPU slots): vLLM's --max-loras."
    )
    max_cpu_loras: int = Field(
        default=64, ge=1, le=65536, description="Adapters held in CPU memory: vLLM's --max-cpu-loras."
    )
    max_lora_rank: LoraRank = Field(default=64, description="Largest rank that is accepted: vLLM's --max-lora-rank.")


class NamespacePolicy(ApiModel):
    """Namespaces whose LoRAAdapters may name this deployment."""

    from_: Literal["Same", "All", "Selector"] = Field(
        default="Same",
        alias="from",
        description="Same: the deployment's own namespace; All; or Selector, by labels of the namespace.",
    )
    selector: LabelSelector | None = Field(default=None, description="Labels of the namespaces, with from: Selector.")


class AdapterPolicy(ApiModel):
    """Who may have adapters served here."""

    namespaces: NamespacePolicy = Field(
        default=NamespacePolicy(),
        description="Namespaces whose LoRAAdapters may name this deployment.",
        json_schema_extra=cel(
            (
                "has(self.selector) == (has(self.from) && self.from == 'Selector')",
                "selector is required with from: Selector, and not allowed otherwise",
            )
        ),
    )
    pickled_weights: Literal["Refuse", "AllowScanned"] = Field(
        default="Refuse",
        description="Adapters whose weights exist only as pickle (adapter_model.bin or adapter_model.pt), which can run code when "
        "read. AllowScanned: downloaded and scanned, and served where the scan finds nothing but tensors; their shapes are "
        "not checked against the base model. From local, and in an offline cache, they are refused all the same: what lies there may "
        "change after a scan. Refuse: UnsafeFormat.",
    )
    served_names: Literal["Plain", "NamespaceQualified"] = Field(
        default="Plain",
        description='What clients write into "model". Plain: the adapter\'s servedName, first come, first served among all '
        "namespaces; NamespaceQualified: <namespace>/<servedName>.",
    )


class EnvVar(ApiModel):
    """core/v1 EnvVar."""

    name: str = Field(
        description="Name of the variable; not one that the operator sets.",
        min_length=1,
        max_length=256,
        json_schema_extra=cel(
            (
                _ENV_RULE,
                f"env must not set LORA_OPERATOR_* nor {', '.join(RESERVED_ENV)}, which the operator sets, nor what would take the "
                f"engine's gate or adapters out of its hands: {', '.join((*IGNORED_ENV, *(f'{p}*' for p in IGNORED_ENV_PREFIXES)))}",
            )
        ),
    )
    value: str | None = Field(default=None, description="Value.", max_length=32768)
    value_from: FreeForm | None = Field(default=None, description="Source of the value, as in a pod.")


class EngineSpec(ApiModel):
    """The engine's container."""

    image: str = Field(description="Image with vLLM.", min_length=1, max_length=1024)
    command: tuple[Annotated[str, Field(min_length=1, max_length=1024)], ...] = Field(
        default=("vllm", "serve"),
        description="Command that starts vLLM's API server; ends in serve, or runs vllm.entrypoints.openai.api_server.",
        min_length=1,
        max_length=16,
    )
    args: tuple[Argument, ...] = Field(
        default=(),
        description="Further flags for vLLM. Not those that the operator sets: "
        + ", ".join(OPERATORS_FLAGS)
        + "; that make a pod a part of an engine, or several API servers: "
        + ", ".join(PARTS_FLAGS)
        + "; that bring other adapters than the list, or parts of them: "
        + ", ".join(ADAPTERS_FLAGS)
        + "; that start a server without a gate: "
        + ", ".join(SERVERS_FLAGS)
        + ".",
        max_length=64,
    )
    env: tuple[EnvVar, ...] = Field(
        default=(),
        description="Environment of the engine.",
        max_length=64,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    resources: FreeForm | None = Field(default=None, description="Resources of the container, as in a pod.")
    port: int = Field(default=DEFAULT_ENGINE_PORT, ge=1, le=65535, description="Port of the engine and of the Service.")
    api_key_secret_ref: SecretKeyRef | None = Field(
        default=None,
        description="API key that clients must send as `Authorization: Bearer <key>` with every request for inference; the operator never reads it.",
    )
    max_request_size: Quantity = Field(
        default=DEFAULT_REQUEST_SIZE,
        description="Largest body of a client's request; larger ones get 413. The engine's one API server holds a body in memory, and "
        "answers nobody else while it parses it: raise this for large images or audio only.",
    )


class VLLMDeploymentSpec(ApiModel):
    """A fleet of vLLM pods."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                _SPECULATIVE_RULE,
                "model.draftModel sets --speculative-config: take the flags of speculative decoding out of engine.args, "
                "or leave out draftModel",
            )
        )
    )

    replicas: int | None = Field(
        default=None,
        ge=0,
        description="Engine pods. Leave it out under an autoscaler: the operator then writes 1, once, and keeps off.",
    )
    model: ModelSpec = Field(description="The base model.")
    cache_ref: LocalRef | None = Field(
        default=None,
        description='The ModelCache; default: the namespace\'s one annotated lora-operator.dev/is-default-cache: "true".',
    )
    lora: LoraSpec = Field(
        default=LoraSpec(),
        description="How adapters are held by each engine.",
        json_schema_extra=cel(
            (
                # has(): the API server tries the rule on the default {} too, before it fills that in
                "!has(self.maxCpuLoras) || !has(self.maxLoras) || self.maxCpuLoras >= self.maxLoras",
                "maxCpuLoras must be at least maxLoras",
            )
        ),
    )
    adapter_policy: AdapterPolicy = Field(default=AdapterPolicy(), description="Who may have adapters served here.")
    engine: EngineSpec = Field(description="The engine's container.")
    disruption_budget: Literal["OneAtATime", "None"] = Field(
        default="OneAtATime",
        description="OneAtATime: a PodDisruptionBudget lets a node drain take one engine pod, and the next once another is Ready. "
        "None: no budget is made; choose it where pods have one already, since nothing can evict a pod with two.",
    )
    pod_template: FreeForm | None = Field(
        default=None,
        description="Merged over the pods that the operator makes: containers, env, volumes and mounts by name; tolerations append.",
    )


class PodState(ApiModel):
    """One engine pod."""

    name: str = Field(description="Name of the pod.")
    ready: bool = Field(description="Whether the pod is Ready.")
    list_generation: int | None = Field(
        default=None, description="Generation of the module list that its plugin acknowledged."
    )
    loaded: int = Field(default=0, description="Wanted adapters that it serves.")
    missing: tuple[str, ...] | None = Field(
        default=None, description="Wanted adapters that it does not serve; at most 10."
    )
    version: str | None = Field(default=None, description="Its vLLM version.")


class VLLMDeploymentStatus(ApiModel):
    """What is true of the fleet now."""

    conditions: Conditions = ()
    observed_generation: int | None = Field(default=None, description="The generation that this status speaks of.")
    replicas: int | None = Field(default=None, description="Engine pods that exist.")
    ready_replicas: int | None = Field(default=None, description="Engine pods that are Ready.")
    ready_pods: str | None = Field(default=None, description="ready/wanted for kubectl get.")
    selector: str | None = Field(default=None, description="Label selector of the pods, for the scale subresource.")
    url: str | None = Field(default=None, description="Where the fleet is served, inside the cluster.")
    model_path: str | None = Field(default=None, description="Path of the base model in the pods: root in /v1/models.")
    model_artifact: str | None = Field(default=None, description="The ModelArtifact of the base model.")
    tokenizer_artifact: str | None = Field(default=None, description="The ModelArtifact of model.tokenizer.")
    draft_model_artifact: str | None = Field(default=None, description="The ModelArtifact of model.draftModel.")
    refresh: str | None = Field(
        default=None,
        max_length=64,
        description="Value of the annotation lora-operator.dev/refresh that these artifacts are from.",
    )
    list_generation: int | None = Field(
        default=None, description="Generation of the module list that pods should hold."
    )
    adapters: int | None = Field(default=None, description="Adapters in the module list.")
    pods: tuple[PodState, ...] | None = Field(
        default=None,
        description="The engine pods.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    orphans: tuple[str, ...] | None = Field(
        default=None, description="Served names that pods answer and no object wants, as <pod>/<name>; at most 20."
    )


class VLLMDeployment(Resource):
    """A fleet as read from the API server."""

    kind: Literal["VLLMDeployment"] = "VLLMDeployment"
    spec: VLLMDeploymentSpec
    status: VLLMDeploymentStatus = VLLMDeploymentStatus()


def _model_column() -> PrinterColumn:
    return PrinterColumn(
        "Model",
        '.status.conditions[?(@.type=="ModelReady")].message',
        description="What the base model's download does.",
    )


RESOURCE = ResourceInfo(
    kind="VLLMDeployment",
    plural="vllmdeployments",
    singular="vllmdeployment",
    short_names=("vllm",),
    spec=VLLMDeploymentSpec,
    status=VLLMDeploymentStatus,
    description="A fleet of vLLM pods for one base model, with the LoRA adapters that name it.",
    columns=(
        PrinterColumn("Ready", ".status.readyPods", description="Ready engine pods / wanted."),
        PrinterColumn("Adapters", ".status.adapters", "integer"),
        reason_column(),
        _model_column(),
        AGE,
        PrinterColumn("URL", ".status.url", priority=1),
    ),
    rules=(
        (
            "size(self.metadata.name) <= 63 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
            "metadata.name is the name of a Service too: at most 63 of a-z, 0-9 and '-', beginning with a letter",
        ),
    ),
    scale=True,
)
