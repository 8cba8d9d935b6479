"""The engine container's entry point: chooses the adapters that the engine starts with, and becomes the engine.

    python3 /opt/lora-operator vllm serve /model-cache/… --enable-lora …

One bad `--lora-modules` entry ends the whole engine, so this passes what the checks accept and the engine has not refused before.
When a start with entries did not get up all the same, the next one passes none, and the plugin loads them afterwards. Nothing that
goes wrong here may keep the engine from starting: it starts with less, and says so.

With updateStrategy Rollout the list is in the container's own arguments, behind --lora-modules. It is taken out, put where the
plugin finds it, and from there on treated like any other.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

from .checks import AdapterProblem, BaseModel, check_adapter, read_base_model
from .clean_text import clean
from .ignored_env import ignored
from .list_file import ListedAdapter, newest_list
from .loads import BLAME, read_suspects
from .plugin_settings import PluginSettings
from .state_files import MARKER_FILE, REFUSED_FILE, REPORT_FILE, read_refused, write_file, write_report
from .tensors import is_inside, kind_of
from .versions import Version, parse_version

FLAG: Final = "--lora-modules"
# Flags that the operator sets and older engines don't know, with the first version that does.
_NEWER_FLAGS: Final = {"--shutdown-timeout": (0, 18)}
# Flags by which another class may serve the base model than its config.json names, with other modules and a head.
_RECASTING: Final = ("--hf-overrides", "--convert", "--runner", "--task", "--model-impl", "--config")
_VERSION: Final = re.compile(r"""^__version__\b[^'"\n]*['"]([^'"\n]{1,80})""", re.MULTILINE)
_ARGUMENT_BYTES: Final = 1 << 19  # of all entries; the kernel's limit is about 2 MiB with the environment


@dataclass
class StartPlan:
    """What an engine is started with, and why not with the rest."""

    generation: int | None = None
    static: list[ListedAdapter] = field(default_factory=list)
    dropped: list[tuple[ListedAdapter, str]] = field(default_factory=list)
    later: int = 0  # good entries beyond what the engine keeps in memory; the plugin loads them
    note: str = ""

    def report(self) -> dict[str, Any]:
        """The plan as launcher.json holds it."""
        return {
            "version": 1,
            "listGeneration": self.generation,
            "static": [{"name": entry.name, "path": entry.path} for entry in self.static],
            "dropped": [
                {"name": clean(entry.name), "path": clean(entry.path), "stage": "checks", "message": message}
                for entry, message in self.dropped
            ],
            "later": self.later,
            "note": self.note,
        }


def plan_start(settings: PluginSettings) -> StartPlan:
    """Choose the static entries; reads files only."""
    received = newest_list(*settings.list_files, served_names=settings.served_names)
    if received is None:
        return StartPlan(note="there is no module list yet")
    plan = StartPlan(generation=received.generation, dropped=list(received.problems))
    if kind_of(settings.state_dir / MARKER_FILE):
        plan.note = "the last start with static entries did not get up: none this time, the plugin loads them"
        return plan
    refused = read_refused(settings.state_dir / REFUSED_FILE)
    suspects = read_suspects(settings.state_dir)
    base, engine = read_base(settings), engine_version()
    room = _ARGUMENT_BYTES
    for entry in received.entries:
        if entry.lazy:
            continue
        problem = BLAME if entry.path in suspects else refused.get((entry.name, entry.path))
        problem = problem or check_listed(entry, settings=settings, base=base, engine=engine)
        if problem is not None:
            plan.dropped.append((entry, clean(problem)))
        elif len(plan.static) < settings.max_cpu_loras and len(argument := build_argument(entry)) < room:
            room -= len(argument)
            plan.static.append(entry)
        else:
            plan.later += 1
    return plan


def check_listed(
    entry: ListedAdapter, *, settings: PluginSettings, base: BaseModel | None, engine: Version | None
) -> str | None:
    """Why an entry of the list can't be served; None when nothing speaks against it."""
    if not is_inside(Path(os.path.realpath(entry.path)), settings.cache_root):
        return "the path leads out of the cache"
    try:
        check_adapter(
            entry.path,
            base=base,
            max_rank=settings.max_lora_rank,
            root=settings.cache_root,
            engine=engine,
            recast=may_recast(sys.argv),
        )
    except AdapterProblem as problem:
        return problem.message
    except OSError as error:
        return clean(f"the files can't be read: {error.strerror}")
    return None


def may_recast(command: Sequence[str]) -> bool:
    """Whether the engine's command line, which is the launcher's and the engine's own, may choose a class for the base model.

    Flags may be shortened, have _ for -, and a value or a field of theirs behind them.
    """
    flags = {re.split("[=.]", word, maxsplit=1)[0].replace("_", "-") for word in command if word.startswith("--")}
    flags -= {"--", "--model"}  # the latter is a flag of its own, and only names the folder
    return any(one.startswith(flag) for flag in flags for one in _RECASTING)


def read_base(settings: PluginSettings) -> BaseModel | None:
    """The base model's modules; None when they can't be read, which is the engine's to judge."""
    if settings.model_path is None:
        return None
    try:
        return read_base_model(settings.model_path)
    except (AdapterProblem, OSError, ValueError):
        return None


def build_argument(entry: ListedAdapter) -> str:
    """One adapter as vLLM takes it, in ASCII."""
    argument = {"name": entry.name, "path": entry.path}
    if entry.base_model_name is not None:
        argument["base_model_name"] = entry.base_model_name
    return json.dumps(argument)


def build_arguments(plan: StartPlan) -> list[str]:
    """The flag that is added to the engine's command line: one JSON object per argument, for of repeated flags the last wins alone."""
    return [FLAG, *map(build_argument, plan.static)] if plan.static else []


def split_modules(command: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command without --lora-modules, and that flag's values."""
    if FLAG not in command:
        return list(command), []
    at = command.index(FLAG)
    end = next((i for i in range(at + 1, len(command)) if command[i].startswith("-")), len(command))
    return [*command[:at], *command[end:]], list(command[at + 1 : end])


def keep_given(settings: PluginSettings, given: Sequence[str]) -> None:
    """Put the list of the arguments where the plugin finds it; raises OSError. Damaged entries stay, for both to report."""
    entries = []
    for text in given:
        try:
            entry = json.loads(text)
        except (ValueError, RecursionError):
            entry = None
        entry = entry if isinstance(entry, dict) else {}
        entries.append(
            {"name": entry.get("name"), "path": entry.get("path"), "baseModelName": entry.get("base_model_name")}
        )
    body = {"version": 1, "generation": settings.list_generation, "modules": entries}
    write_file(settings.list_file, json.dumps(body).encode())


def without_newer_flags(command: Sequence[str], version: Version | None) -> list[str]:
    """The command without flags (of one value each) that an engine of this version would refuse to start with."""
    kept = list(command)
    for flag, since in _NEWER_FLAGS.items():
        if version is not None and version < since and flag in kept:
            at = kept.index(flag)
            del kept[at : at + 2]
    return kept


def engine_version() -> Version | None:
    """The version of the vLLM that this Python would import, without importing it; None where it can't be told."""
    try:
        spec = importlib.util.find_spec("vllm")
        if spec is None or spec.origin is None:
            return None
        found = _VERSION.search(Path(spec.origin).with_name("_version.py").read_text())
    except (ImportError, OSError, ValueError):
        return None
    return None if found is None else parse_version(found[1])


def prepare(settings: PluginSettings, given: Sequence[str] = ()) -> list[str]:
    """Plan, leave the marker and the report, and return the arguments to add. Entries without a marker are never passed.

    `given` are the values of --lora-modules in the container's arguments, which count with updateStrategy Rollout only.
    """
    try:
        if settings.rolls:
            keep_given(settings, given)
        plan = plan_start(settings)
    except Exception as error:
        plan = StartPlan(note=f"planning failed: {clean(f'{type(error).__name__}: {error}')}")
    if plan.static:
        marker = {"version": 1, "listGeneration": plan.generation, "static": len(plan.static)}
        try:
            write_file(settings.state_dir / MARKER_FILE, json.dumps(marker).encode())
        except OSError as error:
            plan = StartPlan(
                plan.generation, [], plan.dropped, note=f"the state folder can't be written: {error.strerror}"
            )
    write_report(settings.state_dir / REPORT_FILE, plan.report())
    _say(plan)
    return build_arguments(plan)


def _say(plan: StartPlan) -> None:
    for entry, message in plan.dropped:
        _log(f"not passed to the engine: {clean(entry.name, limit=120)}: {message}")
    note = f" ({plan.note})" if plan.note else ""
    _log(
        f"list generation {plan.generation}: {len(plan.static)} static adapters, {plan.later} to be loaded later{note}"
    )


def _log(text: str) -> None:
    print(f"lora-operator launcher: {text}", file=sys.stderr, flush=True)


def build_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The engine's environment: the plugin's package can be imported by it, and nothing in it undoes the plugin."""
    # Not resolved: a mounted ConfigMap's files are links, and the folder behind them must not become importable.
    root = str(Path(__file__).absolute().parents[(__package__ or "").count(".") + 1])
    paths = env.get("PYTHONPATH", "").split(os.pathsep) if env.get("PYTHONPATH") else []
    if root not in paths:
        paths.insert(0, root)
    left_out = ignored(env)
    if left_out:
        _log(f"not passed to the engine, for the plugin would not work with them: {clean(', '.join(left_out))}")
    kept = {name: value for name, value in env.items() if name not in left_out}
    return {**kept, "PYTHONPATH": os.pathsep.join(paths)}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Become the engine; ends with status 2 without a command, 127 when it can't be run."""
    command = list(sys.argv[1:] if argv is None else argv)
    if not command:
        _log("no command was given")
        raise SystemExit(2)
    command, given = split_modules(without_newer_flags(command, engine_version()))
    command += prepare(PluginSettings.read(os.environ), given)
    try:
        os.execvpe(command[0], command, build_environment(os.environ))  # noqa: S606 - becoming another program is the purpose
    except OSError as error:
        _log(f"{clean(command[0])} can't be run: {error.strerror}")
        raise SystemExit(127) from None


if __name__ == "__main__":
    main()
