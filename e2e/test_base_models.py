"""What a base model may say beside its source: another tokenizer, a draft model, a chat template, a format, quantised weights.

Before any fleet is up: what the operator makes of it is seen without pods, and what vLLM makes of it in one local engine process.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster import paths
from e2e.engine_client import Json, request, token_ids
from e2e.engine_process import SERVED, EngineProcess, engine_python
from e2e.fixtures.hub import HubServer
from e2e.fixtures.xet import XetServer
from e2e.stack import Stack, lora_adapter, tiny_fixtures, vllm_deployment
from lora_operator.api import VLLMDeployment
from lora_operator.constants import CHAT_MOUNT
from lora_operator.desired.command_line import Auxiliary, build_argv
from lora_operator.engine_plugin.checks import AdapterProblem, ProblemKind, check_adapter, read_base_model

NAMESPACE = "models"
TEMPLATE = "{% for message in messages %}<|user|>{{ message['content'] }} grüßt\n{% endfor %}<|assistant|>"
DRAFT_TOKENS = 3
SURE = 2  # tokens that rounding in bfloat16 does not change, whatever the processor; 3 to 16 were seen


def source(repo: str) -> Json:
    return {"source": {"huggingFace": {"repo": repo}}}


def deployment(**model: Any) -> Json:
    """One named as it should not be: a Service of that name sets VLLM_PORT in pods with service links."""
    manifest = vllm_deployment("vllm", NAMESPACE, repo="tiny/bare", replicas=0)
    manifest["spec"]["model"] |= model
    return manifest


@pytest.fixture(scope="module")
def xet(stack: Stack) -> Iterator[XetServer]:
    """The store of the draft model."""
    with XetServer(host=stack.cluster.node_ip) as server:
        yield server


def test_pods_are_made_once_all_that_engines_read_is_there(
    stack: Stack, hub: HubServer, xet: XetServer, tiny: Path
) -> None:
    files = {path.name: path.read_bytes() for path in (tiny / "base").iterdir()}
    tokenizer = {name: content for name, content in files.items() if "token" in name}
    for repo, content in {
        "tiny/bare": {name: content for name, content in files.items() if name not in tokenizer},
        "tiny/tokenizer": {"model.safetensors": b"never downloaded", **tokenizer},
        "tiny/draft": {"modeling_draft.py": b"raise SystemExit", **files},
    }.items():
        hub.create_repo(repo, xet=xet if repo == "tiny/draft" else None)
        hub.commit(repo, content)
    stack.make_serving_namespace(NAMESPACE)
    manifest = deployment(
        tokenizer={"source": {"huggingFace": {"repo": "tiny/tokenizer", "revision": "not-yet"}}},
        draftModel={**source("tiny/draft"), "numSpeculativeTokens": DRAFT_TOKENS},
        chatTemplate=TEMPLATE,
    )
    stack.apply(manifest, lora_adapter("one", NAMESPACE, repo="tiny/one", deployment=(NAMESPACE, "vllm")))
    waiting = stack.wait_condition(
        "vllm", "vllm", NAMESPACE, type_="ModelReady", status="False", reason="RevisionNotFound"
    )
    condition = next(c for c in waiting["status"]["conditions"] if c["type"] == "ModelReady")
    assert condition["message"].startswith("tokenizer: ")
    assert "'not-yet'" in condition["message"]
    assert stack.get("deployment", "vllm", NAMESPACE) is None

    manifest["spec"]["model"]["tokenizer"] = source("tiny/tokenizer")
    stack.apply(manifest)
    found = stack.wait_condition("vllm", "vllm", NAMESPACE, type_="ModelReady")
    condition = next(c for c in found["status"]["conditions"] if c["type"] == "ModelReady")
    assert [part.split("@")[0] for part in condition["message"].split("; ")] == [
        "tiny/bare",
        "tokenizer: tiny/tokenizer",
        "draft model: tiny/draft",
    ]
    artifacts = {item["metadata"]["name"]: item for item in stack.items("mart", NAMESPACE)}
    status = found["status"]
    roles = [artifacts[status[field]] for field in ("modelArtifact", "tokenizerArtifact", "draftModelArtifact")]
    assert [artifact["spec"]["type"] for artifact in roles] == ["BaseModel", "Tokenizer", "BaseModel"]
    model_path, tokenizer_path, draft_path = (f"/model-cache/{artifact['status']['path']}" for artifact in roles)
    assert not hub.downloads("tiny/tokenizer").get("model.safetensors")
    assert not hub.downloads("tiny/draft").get("modeling_draft.py")
    # What the Hub offers by Xet, a Job brings by it.
    assert not hub.downloads("tiny/draft").get("model.safetensors")
    assert xet.sent > len(files["model.safetensors"]) / 2

    workload = stack.get("deployment", "vllm", NAMESPACE)
    assert workload is not None
    pod = workload["spec"]["template"]["spec"]
    argv = pod["containers"][0]["args"]
    assert argv[argv.index("--model") + 1] == model_path
    assert argv[argv.index("--tokenizer") + 1] == tokenizer_path
    speculative = json.loads(argv[argv.index("--speculative-config") + 1])
    assert speculative == {"model": draft_path, "num_speculative_tokens": DRAFT_TOKENS}
    assert argv[argv.index("--chat-template") + 1] == f"{CHAT_MOUNT}/template.jinja"
    assert "--trust-remote-code" not in argv
    volume = next(volume for volume in pod["volumes"] if volume["name"] == "chat-template")
    chat = stack.get("configmap", volume["configMap"]["name"], NAMESPACE)
    assert chat is not None
    assert chat["data"] == {"template.jinja": TEMPLATE}
    # The tenant's adapter is checked against the base model, whatever tokenizer goes with it.
    stack.wait_condition("lora", "one", NAMESPACE, type_="Downloaded")
    stack.delete("lora", "one", NAMESPACE)


def quantise(layout: str, folder: Path) -> Path:
    """The tiny base model in another layout."""
    base = tiny_fixtures() / "base"
    command: list[Any] = [
        engine_python(),
        "-m",
        "e2e.fixtures.quantised",
        "--base",
        base,
        "--layout",
        layout,
        "--out",
        folder,
    ]
    subprocess.run(command, cwd=paths.REPO, check=True, capture_output=True, timeout=120)
    return folder


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_the_widths_of_quantised_models_are_read_from_their_headers(layout: str, tiny: Path, tmp_path: Path) -> None:
    plain, packed = read_base_model(tiny / "base"), read_base_model(quantise(layout, tmp_path / layout))
    assert dict(packed.modules) == dict(plain.modules)
    check_adapter(tiny / "adapters" / "one", base=packed)
    modules = dict(packed.modules)
    name = "model.layers.1.mlp.down_proj"
    modules[name] = (256, 1024)
    with pytest.raises(AdapterProblem) as caught:
        check_adapter(tiny / "adapters" / "one", base=type(packed).of(modules))
    assert (caught.value.kind, name in caught.value.message) == (ProblemKind.INCOMPATIBLE, True)


@dataclass
class Quantised:
    """An engine with a quantised base model and all that goes with it, and what it must answer."""

    engine: EngineProcess
    reference: Json


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Quantised]:
    """GPTQ weights without a tokenizer, the tiny model's tokenizer beside them, and the tiny model as draft."""
    tiny, root = tiny_fixtures(), tmp_path_factory.mktemp("quantised")
    bare, plain = quantise("gptq", root / "gptq"), quantise("plain", root / "plain")
    command: list[Any] = [engine_python(), "-m", "e2e.fixtures.tiny", "reference", "--base", plain]
    command += ["--adapter", tiny / "adapters" / "one", "--prompts", tiny / "prompts.json"]
    done = subprocess.run(command, cwd=paths.REPO, check=True, capture_output=True, text=True, timeout=300)
    answers = json.loads(done.stdout)
    for file in bare.glob("*token*"):
        file.unlink()
    (root / "template.jinja").write_text(TEMPLATE)
    spec = deployment(
        quantization="gptq",
        loadFormat="safetensors",
        dtype="bfloat16",
        trustRemoteCode=True,
        chatTemplate=TEMPLATE,
        tokenizer=source("x/y"),
        draftModel={**source("x/y"), "numSpeculativeTokens": DRAFT_TOKENS},
    )
    auxiliary = Auxiliary(tokenizer=str(tiny / "base"), draft_model=str(tiny / "base"))
    argv = build_argv(VLLMDeployment.model_validate(spec), model_path="unused", auxiliary=auxiliary)
    flags = argv[argv.index("--dtype") : argv.index("--enable-lora")]
    engine = EngineProcess(root / "engine", bare, args=[flag.replace(CHAT_MOUNT, str(root)) for flag in flags])
    try:
        engine.start()
        engine.wait_up()
        engine.put({"one": engine.publish(tiny / "adapters" / "one", "one")})
        yield Quantised(engine, {SERVED[0]: answers["base"], "one": next(iter(answers["adapters"].values()))})
    finally:
        engine.kill()


def test_an_adapter_on_a_quantised_model_answers_as_it_must(quantised: Quantised) -> None:
    assert quantised.engine.starts == 1
    state = quantised.engine.state()
    assert ([one["name"] for one in state["loaded"]], state["failures"]) == (["one"], [])
    seen = {}
    for model, reference in quantised.reference.items():
        for case in reference["completions"]:
            ids = token_ids(quantised.engine.url, model, case["prompt"], tokens=8)
            assert ids[:SURE] == case["token_ids"][:SURE], (model, case["prompt"])
            seen[model, case["prompt"]] = ids
    for case in quantised.reference["one"]["completions"]:
        assert seen["one", case["prompt"]] != seen[SERVED[0], case["prompt"]]


def test_the_given_tokenizer_and_chat_template_are_used(quantised: Quantised) -> None:
    messages = [{"role": "user", "content": "Müller"}]
    status, answer = request("POST", f"{quantised.engine.url}/tokenize", {"model": SERVED[0], "messages": messages})
    assert status == 200, answer
    _, plain = request(
        "POST",
        f"{quantised.engine.url}/detokenize",
        {"model": SERVED[0], "tokens": answer["tokens"]},
    )
    assert plain["prompt"] == "<|user|>Müller grüßt\n<|assistant|>"


def test_the_draft_model_proposes_tokens(quantised: Quantised) -> None:
    token_ids(quantised.engine.url, SERVED[0], "Once upon a time", tokens=32)
    status, text = request("GET", f"{quantised.engine.url}/metrics")
    assert status == 200
    drafted = [line for line in text.splitlines() if line.startswith("vllm:spec_decode_num_draft_tokens_total")]
    assert drafted
    assert float(drafted[0].rpartition(" ")[2]) > 0
