"""The base model of a fleet, and what its engines read beside it: a part of VLLMDeployment's spec."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lora_operator.api.common import ApiModel, ServedName
from lora_operator.api.sources.source import SOURCE_RULES, Source

# Of vLLM's formats those that read a checkpoint's own files from a read-only folder: not those that make weights up (dummy), want
# files of another kind (tensorizer, sharded_state), fetch by themselves, or write beside the files (npcache).
LoadFormat = Literal["auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer", "mistral", "pt"]


class TokenizerSpec(ApiModel):
    """Another tokenizer than the base model's own."""

    source: Source = Field(
        description="Where the tokenizer comes from; only its small files are downloaded.",
        json_schema_extra=SOURCE_RULES,
    )


class DraftModelSpec(ApiModel):
    """A small model that proposes tokens, which the base model accepts or not: speculative decoding."""

    source: Source = Field(description="Where the draft model comes from.", json_schema_extra=SOURCE_RULES)
    num_speculative_tokens: int = Field(ge=1, le=64, description="Tokens that are proposed at a time.")
    method: Literal["draft_model", "eagle", "eagle3", "medusa", "mlp_speculator"] | None = Field(
        default=None, description="What kind of draft model it is; default: what vLLM takes it for."
    )


class ModelSpec(ApiModel):
    """The base model."""

    source: Source = Field(description="Where the base model comes from.", json_schema_extra=SOURCE_RULES)
    served_names: tuple[ServedName, ...] = Field(
        description='Names that clients write into "model" for the base model; the first is the default lineage.',
        min_length=1,
        max_length=16,
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    load_format: LoadFormat = Field(
        default="auto",
        description="vLLM's --load-format, and so which weights are downloaded. auto: safetensors, else Mistral's "
        "consolidated ones, else *.bin, else *.pt; pt: *.pt alone; mistral: consolidated*.safetensors; hf: auto without those.",
    )
    quantization: str | None = Field(
        default=None,
        min_length=1,
        max_length=63,
        pattern=r"^[a-z0-9][a-z0-9_-]*$",
        description="vLLM's --quantization, for instance awq or bitsandbytes; default: what the model's config.json says.",
    )
    dtype: Literal["auto", "half", "float16", "bfloat16", "float", "float32"] = Field(
        default="auto", description="vLLM's --dtype."
    )
    max_model_len: int | None = Field(
        default=None, ge=1, description="vLLM's --max-model-len; default: the model's own."
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Download the model's, tokenizer's and draft model's own Python files, and let the engine run them "
        "(--trust-remote-code). Without it they are not even downloaded. Pin source.huggingFace.revision with it.",
    )
    chat_template: str | None = Field(
        default=None,
        min_length=1,
        max_length=65536,
        description="Text of a Jinja chat template in the place of the tokenizer's own: vLLM's --chat-template.",
    )
    tokenizer: TokenizerSpec | None = Field(
        default=None,
        description="Another tokenizer: vLLM's --tokenizer. The base model then needs none of its own.",
    )
    draft_model: DraftModelSpec | None = Field(
        default=None, description="Draft model for speculative decoding: vLLM's --speculative-config."
    )
