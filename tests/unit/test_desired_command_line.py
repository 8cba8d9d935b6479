"""The engine's command line and environment: what a spec means to vLLM."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

import pytest

from lora_operator.api import VLLMDeployment
from lora_operator.api.deployment import RESERVED_ENV
from lora_operator.desired.command_line import (
    GRACE_SECONDS,
    PRE_STOP_SECONDS,
    SHUTDOWN_SECONDS,
    Auxiliary,
    StaticModules,
    build_argv,
    build_env,
    build_launcher_command,
)
from lora_operator.engine_plugin.ignored_env import ignored
from lora_operator.engine_plugin.plugin_settings import PluginSettings
from tests.unit.builders import make_deployment

PATH = "/model-cache/artifacts/base-1-abc"
MODULE = ["/venv/bin/python", "-m", "vllm.entrypoints.openai.api_server"]


def argv(deployment: VLLMDeployment | None = None) -> list[str]:
    return build_argv(deployment or make_deployment(), model_path=PATH)


def values(argument_list: list[str], flag: str) -> list[str]:
    """What follows a flag, up to the next."""
    rest = argument_list[argument_list.index(flag) + 1 :]
    end = next((i for i, argument in enumerate(rest) if argument.startswith("-")), len(rest))
    return rest[:end]


def test_the_whole_command_line() -> None:
    deployment = make_deployment(
        model={"dtype": "float32", "maxModelLen": 8192},
        lora={"maxLoras": 2, "maxCpuLoras": 16, "maxLoraRank": 16},
        engine={"args": ["--enforce-eager"], "port": 9000},
    )
    assert argv(deployment) == [
        *("vllm", "serve", PATH),
        *("--served-model-name", "meta/Llama", "llama"),
        *("--port", "9000", "--dtype", "float32", "--max-model-len", "8192"),
        "--enable-lora",
        *("--max-loras", "2", "--max-cpu-loras", "16", "--max-lora-rank", "16"),
        *("--middleware", "lora_operator_plugin.plugin.Plugin"),
        *("--api-server-count", "1"),
        *("--shutdown-timeout", "120"),
        "--enforce-eager",
    ]


TOKENIZER, DRAFT = "/model-cache/artifacts/tok-1-abc", "/model-cache/artifacts/draft-1-abc"
SOURCE = {"source": {"huggingFace": {"repo": "org/other"}}}
MODEL_FLAGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a format": ({"loadFormat": "pt"}, ["--load-format", "pt"]),
    "the default format is left to vLLM": ({"loadFormat": "auto"}, []),
    "a quantisation": ({"quantization": "bitsandbytes"}, ["--quantization", "bitsandbytes"]),
    "code of the model's own": ({"trustRemoteCode": True}, ["--trust-remote-code"]),
    "code that is not trusted is not spoken of": ({"trustRemoteCode": False}, []),
    "a chat template by its file": (
        {"chatTemplate": "{{ x }}"},
        ["--chat-template", "/etc/lora-operator/chat/template.jinja"],
    ),
    "another tokenizer": ({"tokenizer": SOURCE}, ["--tokenizer", TOKENIZER]),
    "a draft model": (
        {"draftModel": {**SOURCE, "numSpeculativeTokens": 3}},
        ["--speculative-config", json.dumps({"model": DRAFT, "num_speculative_tokens": 3})],
    ),
    "a draft model of a kind": (
        {"draftModel": {**SOURCE, "numSpeculativeTokens": 1, "method": "eagle3"}},
        ["--speculative-config", json.dumps({"model": DRAFT, "num_speculative_tokens": 1, "method": "eagle3"})],
    ),
}


@pytest.mark.parametrize("case", MODEL_FLAGS)
def test_what_a_model_adds_to_the_command_line(case: str) -> None:
    model, expected = MODEL_FLAGS[case]
    plain, deployment = argv(), make_deployment(model=model)
    auxiliary = Auxiliary(
        tokenizer=TOKENIZER if deployment.spec.model.tokenizer else None,
        draft_model=DRAFT if deployment.spec.model.draft_model else None,
    )
    found = build_argv(deployment, model_path=PATH, auxiliary=auxiliary)
    place = plain.index("--enable-lora")
    assert found == [*plain[:place], *expected, *plain[place:]]


MODELS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "vllm serve takes the model by its place": (["vllm", "serve"], ["vllm", "serve", PATH], ["python3"]),
    "so it does by its path": (["/venv/bin/vllm", "serve"], ["/venv/bin/vllm", "serve", PATH], ["python3"]),
    "the module takes --model": (MODULE, [*MODULE, "--model", PATH], ["/venv/bin/python"]),
    "python3.11 is a Python too": (
        ["/usr/bin/python3.11", *MODULE[1:]],
        ["/usr/bin/python3.11", *MODULE[1:], "--model", PATH],
        ["/usr/bin/python3.11"],
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_the_model_and_the_launcher(case: str) -> None:
    command, beginning, python = MODELS[case]
    deployment = make_deployment(engine={"command": command})
    assert argv(deployment)[: len(beginning)] == beginning
    assert build_launcher_command(deployment.spec.engine.command) == [*python, "/opt/lora-operator"]


def test_no_ref_can_move_the_model() -> None:
    assert values(argv(), "--served-model-name") == ["meta/Llama", "llama"]
    assert PATH in argv()
    assert "meta/base" not in argv(), "the repository's name is nothing that the engine could look up"


def test_one_api_server() -> None:
    assert values(argv(), "--api-server-count") == ["1"]


def test_what_is_not_set_is_left_to_vllm() -> None:
    assert "--max-model-len" not in argv()
    assert values(argv(), "--dtype") == ["auto"]
    assert "--lora-modules" not in argv(), "the launcher adds them at every start"
    assert "--host" not in argv()


def test_requests_have_time_to_end() -> None:
    assert values(argv(), "--shutdown-timeout") == [str(SHUTDOWN_SECONDS)]
    assert PRE_STOP_SECONDS + SHUTDOWN_SECONDS < GRACE_SECONDS


def test_a_dollar_in_the_operators_arguments_is_one_and_a_users_is_the_users() -> None:
    deployment = make_deployment(
        engine={"command": ["/opt/$(X)/vllm", "serve"], "args": ["--chat-template", "$(TEMPLATE)"]}
    )
    assert argv(deployment)[0] == "/opt/$$(X)/vllm"
    assert argv(deployment)[-1] == "$(TEMPLATE)"


def env(deployment: VLLMDeployment | None = None) -> dict[str, dict[str, Any]]:
    entries = build_env(deployment or make_deployment(), model_path=PATH, plugin="0123456789")
    names = [entry["name"] for entry in entries]
    assert len(set(names)) == len(names)
    return {entry["name"]: entry for entry in entries}


def test_the_environment() -> None:
    home = "/var/lib/vllm"
    expected = {
        "HF_HUB_CACHE": "/model-cache/hub",
        "HF_HUB_OFFLINE": "1",
        "HOME": home,
        "HF_HOME": f"{home}/huggingface",
        "VLLM_CACHE_ROOT": f"{home}/vllm",
        "XDG_CACHE_HOME": f"{home}/cache",
        "TORCHINDUCTOR_CACHE_DIR": f"{home}/inductor",
        "TRITON_CACHE_DIR": f"{home}/triton",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "USER": "vllm",
        "LOGNAME": "vllm",
        "LORA_OPERATOR_CACHE_ROOT": "/model-cache",
        "LORA_OPERATOR_KIT": "0123456789",
        "LORA_OPERATOR_MAX_CPU_LORAS": "64",
        "LORA_OPERATOR_MAX_LORA_RANK": "64",
        "LORA_OPERATOR_MAX_REQUEST_BYTES": str(64 << 20),
        "LORA_OPERATOR_MODEL_PATH": PATH,
        "LORA_OPERATOR_MODULES": "/etc/lora-operator/modules/modules.json.gz",
        "LORA_OPERATOR_SERVED_NAMES": '["meta/Llama", "llama"]',
        "LORA_OPERATOR_STATE": "/var/lib/lora-operator",
        "LORA_OPERATOR_TOKEN_FILE": "/etc/lora-operator/gate/token",
        "LORA_OPERATOR_UPDATE_STRATEGY": "HotLoad",
        "LORA_OPERATOR_LIST_GENERATION": "",
    }
    assert {name: entry["value"] for name, entry in env().items()} == expected


def test_nothing_that_pods_write_is_in_the_cache() -> None:
    writable = {
        n: e["value"] for n, e in env().items() if n in ("HOME", "HF_HOME") or n.endswith(("_DIR", "CACHE_ROOT"))
    }
    writable.pop("LORA_OPERATOR_CACHE_ROOT")
    assert len(writable) == 5
    assert not any(value.startswith("/model-cache") for value in writable.values())


def test_the_api_key_goes_by_reference() -> None:
    entry = env(make_deployment(engine={"apiKeySecretRef": {"name": "key", "key": "api"}}))["VLLM_API_KEY"]
    assert entry == {"name": "VLLM_API_KEY", "valueFrom": {"secretKeyRef": {"name": "key", "key": "api"}}}
    assert "VLLM_API_KEY" not in env()


USER_ENV: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a further variable": ({"name": "OMP_NUM_THREADS", "value": "2"}, {"name": "OMP_NUM_THREADS", "value": "2"}),
    "from somewhere": (
        {"name": "X", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
        {"name": "X", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
    ),
    "a default that the user knows better": (
        {"name": "HOME", "value": "/scratch"},
        {"name": "HOME", "value": "/scratch"},
    ),
    "a Python path, which the launcher puts the plugin's before": (
        {"name": "PYTHONPATH", "value": "/plugins"},
        {"name": "PYTHONPATH", "value": "/plugins"},
    ),
    "a variable in a value is the kubelet's to expand": (
        {"name": "Y", "value": "$(X)/y"},
        {"name": "Y", "value": "$(X)/y"},
    ),
}


@pytest.mark.parametrize("case", USER_ENV)
def test_the_users_own_environment(case: str) -> None:
    variable, expected = USER_ENV[case]
    assert env(make_deployment(engine={"env": [variable]}))[variable["name"]] == expected


def test_an_images_own_python_path_stays() -> None:
    """The pod's would replace it, and ROCm's and Gaudi's images can't start without theirs."""
    assert "PYTHONPATH" not in env()


def test_an_env_from_can_take_no_settings_of_the_plugins_place() -> None:
    """A variable that the pod sets wins over one of a ConfigMap."""
    asked = set(re.findall(r'"(LORA_OPERATOR_[A-Z_]+)"', inspect.getsource(PluginSettings)))
    for static in (None, StaticModules(7, ENTRIES)):
        found = {entry["name"] for entry in build_env(make_deployment(), model_path=PATH, plugin="k", static=static)}
        assert len(asked) > 8
        assert asked <= found


def test_users_variables_keep_their_order_for_references() -> None:
    deployment = make_deployment(engine={"env": [{"name": "B", "value": "1"}, {"name": "A", "value": "$(B)"}]})
    names = list(env(deployment))
    assert names[-2:] == ["B", "A"]


def test_what_is_reserved_is_what_the_operator_sets() -> None:
    names = set(env(make_deployment(engine={"apiKeySecretRef": {"name": "key"}})))
    assert set(RESERVED_ENV) <= names
    assert not ignored(dict.fromkeys(names, "")), "the launcher would take it out"


def test_odd_names_come_through() -> None:
    assert json.loads(env()["LORA_OPERATOR_SERVED_NAMES"]["value"]) == ["meta/Llama", "llama"]


ENTRIES = ('{"name": "a$(HOME)", "path": "/model-cache/a", "base_model_name": "llama"}', '{"name": "b"}')


def test_adapters_in_the_arguments_come_last_and_no_variable_is_expanded_in_them() -> None:
    deployment = make_deployment(lora={"updateStrategy": "Rollout"}, engine={"args": ["--enforce-eager"]})
    arguments = build_argv(deployment, model_path=PATH, static=StaticModules(7, ENTRIES))
    assert arguments[: -len(ENTRIES) - 1] == argv(deployment)
    assert arguments[-3:] == ["--lora-modules", ENTRIES[0].replace("$", "$$"), ENTRIES[1]]
    assert build_argv(deployment, model_path=PATH, static=StaticModules(7, ())) == argv(deployment)


def test_a_pod_with_its_adapters_in_its_arguments_knows_it_and_has_no_other_list() -> None:
    entries = build_env(make_deployment(), model_path=PATH, plugin="k", static=StaticModules(7, ENTRIES))
    found = {entry["name"]: entry["value"] for entry in entries}
    assert found["LORA_OPERATOR_UPDATE_STRATEGY"] == "Rollout"
    assert found["LORA_OPERATOR_LIST_GENERATION"] == "7"
    assert found["LORA_OPERATOR_MODULES"] == ""
    of_lists = ("LORA_OPERATOR_UPDATE_STRATEGY", "LORA_OPERATOR_LIST_GENERATION", "LORA_OPERATOR_MODULES")
    assert {name: value for name, value in found.items() if name not in of_lists} == {
        name: entry["value"] for name, entry in env().items() if name not in of_lists
    } | {"LORA_OPERATOR_KIT": "k"}
