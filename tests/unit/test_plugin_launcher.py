"""The launcher: what it passes to the engine and what not, whatever state its files are in."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_operator.engine_plugin.launcher import (
    build_arguments,
    build_environment,
    engine_version,
    plan_start,
    prepare,
    split_modules,
    without_newer_flags,
)
from lora_operator.engine_plugin.list_file import newest_list
from lora_operator.engine_plugin.plugin_settings import PluginSettings
from lora_operator.engine_plugin.state_files import read_refused, write_refused
from tests.unit.adapter_files import HIDDEN, PREFIX, Q, pair, safetensors
from tests.unit.plugin_support import good_adapter, settings_env

ROOT = Path(__file__).resolve().parents[2]


class Pod:
    """A pod's folders, and the launcher's settings for them."""

    def __init__(self, root: Path) -> None:
        self.env = settings_env(root)
        self.root = root
        self.cache = root / "model-cache"
        self.state = root / "state"
        self.mounted = root / "modules.json.gz"

    @property
    def settings(self) -> PluginSettings:
        return PluginSettings.read(self.env)

    def adapter(self, name: str) -> str:
        return good_adapter(self.cache / name)

    def list(self, generation: int, modules: dict[str, str], *, mounted: bool = False) -> None:
        entries = [{"name": n, "path": p, "baseModelName": "tiny/alias", "revision": "aa"} for n, p in modules.items()]
        raw = json.dumps({"version": 1, "generation": generation, "modules": entries}).encode()
        if mounted:
            self.mounted.write_bytes(gzip.compress(raw))
        else:
            (self.state / "modules.json").write_bytes(raw)

    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.state / "launcher.json").read_text())
        return report


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    return Pod(tmp_path)


def names(arguments: list[str]) -> list[str]:
    return [json.loads(argument)["name"] for argument in arguments[1:]]


def test_each_entry_is_one_json_argument_of_one_flag(pod: Pod) -> None:
    path = pod.adapter("a")
    pod.list(3, {"sql": path, "chat": path})
    arguments = prepare(pod.settings)
    assert arguments[0] == "--lora-modules"
    assert json.loads(arguments[1]) == {"name": "sql", "path": path, "base_model_name": "tiny/alias"}
    assert len(arguments) == 3
    assert pod.report()["listGeneration"] == 3
    assert json.loads((pod.state / "starting.json").read_text())["static"] == 2


@pytest.mark.parametrize("mounted", [5, 4, 3])
def test_the_newest_list_wins_and_the_acknowledged_one_among_equals(pod: Pod, mounted: int) -> None:
    path = pod.adapter("a")
    pod.list(4, {"acknowledged": path})
    pod.list(mounted, {"mounted": path}, mounted=True)
    assert names(prepare(pod.settings)) == (["mounted"] if mounted > 4 else ["acknowledged"])


def test_bad_entries_are_dropped_and_reported(pod: Pod) -> None:
    good, outside = pod.adapter("good"), good_adapter(pod.root / "outside")
    (pod.cache / "link").symlink_to(outside)
    pod.list(
        1,
        {
            "good": good,
            "tiny/base": good,
            "a,b": good,
            "-x": good,
            "x@y": good,
            "missing": str(pod.cache / "none"),
            "outside": outside,
            "linked": str(pod.cache / "link"),
            "dotted": f"{pod.cache}/good/../../outside",
            "relative": "good",
        },
    )
    assert names(prepare(pod.settings)) == ["good"]
    dropped = {one["name"]: one["message"] for one in pod.report()["dropped"]}
    assert set(dropped) == {
        "tiny/base", "a,b", "-x", "x@y", "missing", "outside", "linked", "dotted", "relative"
    }  # fmt: skip
    assert all(dropped.values())


def test_a_name_that_is_there_twice_is_passed_once(pod: Pod) -> None:
    path = pod.adapter("a")
    entry = {"name": "sql", "path": path}
    (pod.state / "modules.json").write_text(json.dumps({"version": 1, "generation": 1, "modules": [entry, entry]}))
    assert names(prepare(pod.settings)) == ["sql"]


def test_no_more_than_the_engine_keeps_in_memory(pod: Pod) -> None:
    path = pod.adapter("a")
    pod.list(1, {f"m{number}": path for number in range(9)})
    pod.env["LORA_OPERATOR_MAX_CPU_LORAS"] = "4"
    assert names(prepare(pod.settings)) == ["m0", "m1", "m2", "m3"]
    assert pod.report()["later"] == 5


def test_the_command_line_stays_below_the_kernels_limit(pod: Pod) -> None:
    path = pod.adapter("a")
    pod.list(1, {f"{'m' * 400}{number}": path for number in range(5000)})
    pod.env["LORA_OPERATOR_MAX_CPU_LORAS"] = "10000"
    arguments = prepare(pod.settings)
    assert len(arguments) > 100
    assert sum(map(len, arguments)) < 1 << 20


def test_after_a_start_that_did_not_get_up_nothing_is_passed_until_the_plugin_was_up(pod: Pod) -> None:
    pod.list(1, {"sql": pod.adapter("a")})
    assert prepare(pod.settings)
    assert prepare(pod.settings) == []
    assert prepare(pod.settings) == []
    (pod.state / "starting.json").unlink()
    assert prepare(pod.settings)


def test_what_the_engine_refused_is_not_passed_again_under_the_same_path(pod: Pod) -> None:
    first, second = pod.adapter("a"), pod.adapter("b")
    refused = {("sql", first): "the engine's words\n\x1b"}
    write_refused(pod.state / "refused.json", refused)
    assert read_refused(pod.state / "refused.json") == refused
    pod.list(1, {"sql": first, "chat": first})
    assert [module.name for module in plan_start(pod.settings).static] == ["chat"]
    pod.list(2, {"sql": second})
    assert [module.name for module in plan_start(pod.settings).static] == ["sql"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\x1f\x8b\0\0",
        b"[" * 100_000,
        b'{"version": 1, "generation": "4", "modules": []}',
        b'{"version": 2, "generation": 4, "modules": []}',
        b'{"version": 1, "generation": 4, "modules": {"a": 1}}',
    ],
    ids=lambda content: repr(content[:50]),
)
def test_a_damaged_list_is_as_if_it_were_not_there(pod: Pod, content: bytes) -> None:
    pod.list(1, {"sql": pod.adapter("a")}, mounted=True)
    for name in ("modules.json", "refused.json", "launcher.json"):
        (pod.state / name).write_bytes(content)
    assert names(prepare(pod.settings)) == ["sql"]


@pytest.mark.parametrize(
    "entry", [None, 3, [], {}, {"name": 3}, {"name": "x", "path": None}, {"name": "\u202e", "path": "/x"}]
)
def test_a_damaged_entry_takes_no_other_with_it(pod: Pod, entry: object) -> None:
    good = {"name": "sql", "path": pod.adapter("a")}
    (pod.state / "modules.json").write_text(json.dumps({"version": 1, "generation": 1, "modules": [entry, good]}))
    assert names(prepare(pod.settings)) == ["sql"]
    assert len(pod.report()["dropped"]) == 1


def test_without_a_state_folder_nothing_is_passed_for_nothing_could_be_marked(pod: Pod) -> None:
    pod.list(1, {"sql": pod.adapter("a")}, mounted=True)
    pod.env["LORA_OPERATOR_STATE"] = "/proc/nonexistent"
    assert prepare(pod.settings) == []


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"LORA_OPERATOR_SERVED_NAMES": "{", "LORA_OPERATOR_MAX_LORA_RANK": "x", "LORA_OPERATOR_MAX_CPU_LORAS": "-1"},
        {"LORA_OPERATOR_SERVED_NAMES": "3", "LORA_OPERATOR_MAX_LORA_RANK": "", "LORA_OPERATOR_MODEL_PATH": "/none"},
    ],
    ids=str,
)
def test_missing_and_malformed_settings_are_survived(env: dict[str, str]) -> None:
    assert prepare(PluginSettings.read(env)) == []


def test_a_base_model_that_cannot_be_read_is_the_engines_to_judge(pod: Pod) -> None:
    pod.list(1, {"sql": pod.adapter("a")})
    model = pod.root / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"broken")
    pod.env["LORA_OPERATOR_MODEL_PATH"] = str(model)
    assert names(build_arguments(plan_start(pod.settings))) == ["sql"]


def test_a_failure_while_planning_starts_the_engine_without_adapters(
    pod: Pod, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(_: PluginSettings) -> Any:
        raise MemoryError("no\x1bmore")

    monkeypatch.setattr("lora_operator.engine_plugin.launcher.plan_start", fail)
    assert prepare(pod.settings) == []
    assert "MemoryError: no more" in capfd.readouterr().err


def test_the_package_can_be_imported_by_the_engine_whatever_its_path_was() -> None:
    root = str(ROOT / "operator")
    assert build_environment({})["PYTHONPATH"] == root
    assert build_environment({"PYTHONPATH": "/user"})["PYTHONPATH"] == f"{root}:/user"
    assert build_environment({"PYTHONPATH": f"/user:{root}"})["PYTHONPATH"] == f"/user:{root}"


def test_a_mounted_config_map_makes_only_the_package_importable(tmp_path: Path) -> None:
    """Its files are links into another folder, whose modules have names like `engine` and `text`."""
    root, env = mounted(tmp_path), settings_env(tmp_path)
    engine = "import os; print(os.environ['PYTHONPATH']); import lora_operator_plugin.checks"
    command = [sys.executable, str(root), sys.executable, "-c", engine]
    for path, expected in ({}, str(root)), ({"PYTHONPATH": "/image/its/own"}, f"{root}:/image/its/own"):
        found = subprocess.run(command, env=env | path, check=True, capture_output=True, text=True, timeout=60)
        assert found.stdout.strip() == expected


def mounted(folder: Path) -> Path:
    """The plugin as the kubelet mounts it."""
    data, root = folder / "opt" / "..data", folder / "opt"
    shutil.copytree(ROOT / "operator" / "lora_operator" / "engine_plugin", data / "lora_operator_plugin")
    (data / "lora_operator_plugin" / "__main__.py").rename(data / "__main__.py")
    for name in ("lora_operator_plugin", "__main__.py"):
        (root / name).symlink_to(f"..data/{name}")
    return root


UNDOING = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_SKIP_MODEL_NAME_VALIDATION": "1",
    "VLLM_USE_RUST_FRONTEND": "1",
    "VLLM_RUST_FRONTEND_PATH": "/x",
    "VLLM_LORA_RESOLVER_CACHE_DIR": "/model-cache",
    "VLLM_LORA_RESOLVER_HF_REPO_LIST": "org/x",
    "CUSTOM_FASTAPI_MIDDLEWARE_THROTTLE": "x.py:f",
}


def test_what_would_undo_the_plugin_reaches_no_engine_wherever_it_comes_from(capfd: pytest.CaptureFixture[str]) -> None:
    """A ConfigMap of the pod's envFrom, or the image: nobody checks these before."""
    harmless = {"OMP_NUM_THREADS": "2", "VLLM_PLUGINS": "mine", "CUSTOM_FASTAPI_PING_HANDLER": "x", "VLLM_API_KEY": "k"}
    found = build_environment(UNDOING | harmless)
    assert {name: value for name, value in found.items() if name != "PYTHONPATH"} == harmless
    said = capfd.readouterr().err
    assert all(name in said for name in UNDOING)
    build_environment(harmless)
    assert capfd.readouterr().err == ""


def test_it_becomes_the_engine_under_its_own_process_id(pod: Pod) -> None:
    """And so gets the kubelet's signals."""
    pod.list(1, {"sql": pod.adapter("a")})
    engine = "import json, os, sys, time; print(json.dumps([os.getpid(), sys.argv[1:]]), flush=True); time.sleep(60)"
    command = [
        sys.executable,
        "-m",
        "lora_operator.engine_plugin.launcher",
        sys.executable,
        "-c",
        engine,
        "--enable-lora",
    ]
    env = {**os.environ, **pod.env, "PYTHONPATH": str(ROOT / "operator")}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        pid, arguments = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
        assert "1 static adapters" in process.stderr.read()
    assert pid == process.pid
    assert arguments[:2] == ["--enable-lora", "--lora-modules"]
    assert names(arguments[1:]) == ["sql"]


@pytest.mark.parametrize(("command", "status"), [([], 2), (["/nonexistent/engine"], 127)], ids=str)
def test_without_an_engine_it_ends_with_a_status(pod: Pod, command: list[str], status: int) -> None:
    env = {**os.environ, **pod.env, "PYTHONPATH": str(ROOT / "operator")}
    launcher = [sys.executable, "-m", "lora_operator.engine_plugin.launcher", *command]
    assert subprocess.run(launcher, env=env, capture_output=True, timeout=60).returncode == status


# updateStrategy: Rollout


@pytest.fixture
def rolling(pod: Pod) -> Pod:
    """A pod whose adapters are in its arguments; a list beside them must not count."""
    pod.env |= {"LORA_OPERATOR_UPDATE_STRATEGY": "Rollout", "LORA_OPERATOR_LIST_GENERATION": "7"}
    pod.list(9, {"mounted": pod.adapter("mounted")}, mounted=True)
    return pod


def given(modules: dict[str, str]) -> list[str]:
    return [json.dumps({"name": n, "path": p, "base_model_name": "tiny/alias"}) for n, p in modules.items()]


def test_arguments_of_the_container_are_the_list_and_the_plugin_finds_all_of_it(rolling: Pod) -> None:
    paths = {"sql": rolling.adapter("a"), "gone": str(rolling.cache / "gone"), "tiny/base": rolling.adapter("b")}
    arguments = prepare(rolling.settings, given(paths))
    assert arguments == ["--lora-modules", *given({"sql": paths["sql"]})]
    assert {one["name"] for one in rolling.report()["dropped"]} == {"gone", "tiny/base"}
    kept = newest_list(*rolling.settings.list_files, served_names=rolling.settings.served_names)
    assert kept is not None
    assert (kept.generation, sorted(kept.by_name)) == (7, ["gone", "sql"])
    assert kept.by_name["sql"].base_model_name == "tiny/alias"
    assert prepare(rolling.settings, given(paths)) == [], "that start did not get up"


def test_without_adapters_in_the_arguments_there_are_none(rolling: Pod) -> None:
    assert prepare(rolling.settings) == []
    kept = newest_list(*rolling.settings.list_files)
    assert kept is not None
    assert (kept.generation, kept.entries) == (7, ())


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 100_000, '{"name": 3}', "sql=/model-cache/a"])
def test_a_damaged_argument_takes_no_other_with_it(rolling: Pod, text: str) -> None:
    arguments = prepare(rolling.settings, [text, *given({"sql": rolling.adapter("a")})])
    assert names(arguments) == ["sql"]
    assert len(rolling.report()["dropped"]) == 1


def test_arguments_without_the_strategy_are_not_taken(pod: Pod) -> None:
    assert prepare(pod.settings, given({"sql": pod.adapter("a")})) == []


def test_a_state_folder_that_cannot_be_written_costs_the_adapters_and_not_the_engine(rolling: Pod) -> None:
    rolling.env["LORA_OPERATOR_STATE"] = "/proc/nonexistent"
    assert prepare(rolling.settings, given({"sql": rolling.adapter("a")})) == []


SPLITS = {
    "at the end": (["serve", "--a", "--lora-modules", "{1}", "{2}"], ["serve", "--a"], ["{1}", "{2}"]),
    "before another flag": (["serve", "--lora-modules", "{1}", "--a", "b"], ["serve", "--a", "b"], ["{1}"]),
    "not there": (["serve", "--a"], ["serve", "--a"], []),
    "with nothing": (["serve", "--lora-modules"], ["serve"], []),
}


@pytest.mark.parametrize("case", SPLITS)
def test_the_flag_is_taken_out_of_the_command(case: str) -> None:
    command, rest, values = SPLITS[case]
    assert split_modules(command) == (rest, values)


@pytest.mark.parametrize(("version", "kept"), [((0, 10), False), ((0, 17), False), ((0, 18), True), (None, True)])
def test_an_older_engine_is_not_given_a_flag_that_it_does_not_know(version: tuple[int, int] | None, kept: bool) -> None:
    command = ["vllm", "serve", "--shutdown-timeout", "120", "--enforce-eager"]
    expected = command if kept else ["vllm", "serve", "--enforce-eager"]
    assert without_newer_flags(command, version) == expected


VERSION_FILES = {
    "__version__ = version = '0.10.2'\n__version_tuple__ = (0, 10, 2)\n": (0, 10),
    'version: str\n__version__: str\n__version__ = "0.32.0+cpu"\n': (0, 32),
    "__version__ = 'dev'\n": None,
    "__version__ = version = '0.1.dev12+gabcdef'\n": None,  # a clone without tags
    "__version__ = version = '0.0.0'\n": None,
    "": None,
}


@pytest.mark.parametrize("text", VERSION_FILES)
def test_the_engines_version_is_read_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise AssertionError")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    assert engine_version() is None, "without the file"
    (tmp_path / "vllm" / "_version.py").write_text(text)
    assert engine_version() == VERSION_FILES[text]


def test_an_engine_that_ignores_patterns_is_not_started_with_adapters_that_need_them(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled = pod.adapter("scaled")
    config = json.loads((Path(scaled) / "adapter_config.json").read_text())
    (Path(scaled) / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {"q_proj": 8}}))
    pod.list(1, {"plain": pod.adapter("plain"), "scaled": scaled})
    for version, passed in (((0, 31), ["plain"]), ((0, 32), ["plain", "scaled"]), (None, ["plain", "scaled"])):
        monkeypatch.setattr("lora_operator.engine_plugin.launcher.engine_version", lambda found=version: found)
        assert names(prepare(pod.settings)) == passed
        dropped = {one["name"]: one["message"] for one in pod.report()["dropped"]}
        assert set(dropped) == {"plain", "scaled"} - set(passed)
        assert all("needs vLLM 0.32 or newer; this engine is 0.31" in message for message in dropped.values())
        (pod.state / "starting.json").unlink()


# Command lines after which another class may serve the base model than its config.json names: vLLM's parser takes shortened flags,
# _ for -, values behind =, and fields of an object behind a dot.
RECASTING = [
    ["--hf-overrides", '{"architectures": ["Qwen3ForSequenceClassification"]}'],
    ["--hf_overrides={}"],
    ["--hf-overrides.num_labels", "2"],
    ["--hf-over={}"],
    ["--convert", "classify"],
    ["--runner=pooling"],
    ["--task", "classify"],
    ["--model-impl", "transformers"],
    ["--config", "engine.yaml"],
]
PLAIN = [
    [],
    ["--model", "/base"],
    ["--model=/base"],
    ["--enable-lora", "--max-loras", "2"],
    ["--", "task", "-x"],
    ["--served-model-name", "hf-overrides"],
]


@pytest.mark.parametrize(("arguments", "may"), [*((one, True) for one in RECASTING), *((one, False) for one in PLAIN)])
def test_heads_are_dropped_where_no_argument_makes_another_model_of_the_base_model(
    pod: Pod, monkeypatch: pytest.MonkeyPatch, arguments: list[str], may: bool
) -> None:
    head = Path(pod.adapter("head"))
    config = json.loads((head / "adapter_config.json").read_text())
    (head / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["score"]}))
    shapes = {**pair(Q, rank=1), f"{PREFIX}score.weight": (2, HIDDEN)}
    (head / "adapter_model.safetensors").write_bytes(safetensors(shapes))
    base = pod.root / "base"
    base.mkdir()
    (base / "model.safetensors").write_bytes(safetensors({f"{Q}.weight": (HIDDEN, HIDDEN)}))
    (base / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"]}))
    pod.env["LORA_OPERATOR_MODEL_PATH"] = str(base)
    monkeypatch.setattr("lora_operator.engine_plugin.launcher.engine_version", lambda: (0, 32))
    monkeypatch.setattr(sys, "argv", ["launcher", "vllm", "serve", str(base), *arguments])
    pod.list(1, {"head": str(head)})
    assert names(prepare(pod.settings)) == (["head"] if may else [])
    assert may or "no model for classification" in pod.report()["dropped"][0]["message"]
