"""The engine container's entry point: chooses the adapters that the engine starts with, and becomes the engine.

    python3 /opt/lora-operator vllm serve /model-cache/… --enable-lora …

One bad `--lora-modules` entry ends the whole engine, so this passes what the checks accept and the engine has not refused before.
When a start with entries did not get up all the same, the next one passes none, and the kit loads them afterwards. Nothing that
goes wrong here may keep the engine from starting: it starts with less, and says so.

With updateStrategy Rollout the list is in the container's own arguments, behind --lora-modules. It is taken out, put where the kit
finds it, and from there on treated like any other.
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
from .environment import ignored
from .list_file import (
    MARKER_FILE,
    REFUSED_FILE,
    REPORT_FILE,
    Module,
    Settings,
    newest_list,
    read_refused,
    write_file,
    write_report,
)
from .loads import BLAME, read_suspects
from .tensors import is_inside, kind_of
from .text import clean
from .versions import Version, parse_version

FLAG: Final = "--lora-modules"
# Flags that the operator sets and older engines don't know, with the first version that does (engine-facts.md 13).
_NEWER_FLAGS: Final = {"--shutdown-timeout": (0, 18)}
# Flags by which another class may serve the base model than its config.json names, with other modules and a head.
_RECASTING: Final = ("--hf-overrides", "--convert", "--runner", "--task", "--model-impl", "--config")
_VERSION: Final = re.compile(r"""^__version__\b[^'"\n]*['"]([^'"\n]{1,80})""", re.MULTILINE)
_ARGUMENT_BYTES: Final = 1 << 19  # of all entries; the kernel's limit is about 2 MiB with the environment


@dataclass
class Plan:
    """What an engine is started with, and why not with the rest."""

    generation: int | None = None
    static: list[Module] = field(default_factory=list)
    dropped: list[tuple[Module, str]] = field(default_factory=list)
    later: int = 0  # good entries beyond what the engine keeps in memory; the kit loads them
    note: str = ""

    def report(self) -> dict[str, Any]:
        """The plan as launcher.json holds it."""
        return {
            "version": 1,
            "listGeneration": self.generation,
            "static": [{"name": module.name, "path": module.path} for module in self.static],
            "dropped": [
                {"name": clean(module.name), "path": clean(module.path), "stage": "checks", "message": message}
                for module, message in self.dropped
            ],
            "later": self.later,
            "note": self.note,
        }


def plan_start(settings: Settings) -> Plan:
    """Choose the static entries; reads files only."""
    modules = newest_list(*settings.list_files, served_names=settings.served_names)
    if modules is None:
        return Plan(note="there is no module list yet")
    plan = Plan(generation=modules.generation, dropped=list(modules.problems))
    if kind_of(settings.state_dir / MARKER_FILE):
        plan.note = "the last start with static entries did not get up: none this time, the kit loads them"
        return plan
    refused = read_refused(settings.state_dir / REFUSED_FILE)
    suspects = read_suspects(settings.state_dir)
    base, engine = read_base(settings), engine_version()
    room = _ARGUMENT_BYTES
    for module in modules.modules:
        if module.lazy:
            continue
        problem = BLAME if module.path in suspects else refused.get((module.name, module.path))
        problem = problem or check_module(module, settings=settings, base=base, engine=engine)
        if problem is not None:
            plan.dropped.append((module, clean(problem)))
        elif len(plan.static) < settings.max_cpu_loras and len(argument := build_argument(module)) < room:
            room -= len(argument)
            plan.static.append(module)
        else:
            plan.later += 1
    return plan


def check_module(module: Module, *, settings: Settings, base: BaseModel | None, engine: Version | None) -> str | None:
    """Why an entry of the list can't be served; None when nothing speaks against it."""
    if not is_inside(Path(os.path.realpath(module.path)), settings.cache_root):
        return "the path leads out of the cache"
    try:
        check_adapter(
            module.path,
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


def read_base(settings: Settings) -> BaseModel | None:
    """The base model's modules; None when they can't be read, which is the engine's to judge."""
    if settings.model_path is None:
        return None
    try:
        return read_base_model(settings.model_path)
    except (AdapterProblem, OSError, ValueError):
        return None


def build_argument(module: Module) -> str:
    """One adapter as vLLM takes it, in ASCII."""
    entry = {"name": module.name, "path": module.path}
    if module.base_model_name is not None:
        entry["base_model_name"] = module.base_model_name
    return json.dumps(entry)


def build_arguments(plan: Plan) -> list[str]:
    """The flag that is added to the engine's command line: one JSON object per argument, for of repeated flags the last wins alone."""
    return [FLAG, *map(build_argument, plan.static)] if plan.static else []


def split_modules(command: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command without --lora-modules, and that flag's values."""
    if FLAG not in command:
        return list(command), []
    at = command.index(FLAG)
    end = next((i for i in range(at + 1, len(command)) if command[i].startswith("-")), len(command))
    return [*command[:at], *command[end:]], list(command[at + 1 : end])


def keep_given(settings: Settings, given: Sequence[str]) -> None:
    """Put the list of the arguments where the kit finds it; raises OSError. Damaged entries stay, for both to report."""
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


def prepare(settings: Settings, given: Sequence[str] = ()) -> list[str]:
    """Plan, leave the marker and the report, and return the arguments to add. Entries without a marker are never passed.

    `given` are the values of --lora-modules in the container's arguments, which count with updateStrategy Rollout only.
    """
    try:
        if settings.rolls:
            keep_given(settings, given)
        plan = plan_start(settings)
    except Exception as error:
        plan = Plan(note=f"planning failed: {clean(f'{type(error).__name__}: {error}')}")
    if plan.static:
        marker = {"version": 1, "listGeneration": plan.generation, "static": len(plan.static)}
        try:
            write_file(settings.state_dir / MARKER_FILE, json.dumps(marker).encode())
        except OSError as error:
            plan = Plan(plan.generation, [], plan.dropped, note=f"the state folder can't be written: {error.strerror}")
    write_report(settings.state_dir / REPORT_FILE, plan.report())
    _say(plan)
    return build_arguments(plan)


def _say(plan: Plan) -> None:
    for module, message in plan.dropped:
        _log(f"not passed to the engine: {clean(module.name, limit=120)}: {message}")
    note = f" ({plan.note})" if plan.note else ""
    _log(
        f"list generation {plan.generation}: {len(plan.static)} static adapters, {plan.later} to be loaded later{note}"
    )


def _log(text: str) -> None:
    print(f"lora-operator launcher: {text}", file=sys.stderr, flush=True)


def build_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The engine's environment: the kit's package can be imported by it, and nothing in it undoes the kit."""
    # Not resolved: a mounted ConfigMap's files are links, and the folder behind them must not become importable.
    root = str(Path(__file__).absolute().parents[(__package__ or "").count(".") + 1])
    paths = env.get("PYTHONPATH", "").split(os.pathsep) if env.get("PYTHONPATH") else []
    if root not in paths:
        paths.insert(0, root)
    left_out = ignored(env)
    if left_out:
        _log(f"not passed to the engine, for the kit would not work with them: {clean(', '.join(left_out))}")
    kept = {name: value for name, value in env.items() if name not in left_out}
    return {**kept, "PYTHONPATH": os.pathsep.join(paths)}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Become the engine; ends with status 2 without a command, 127 when it can't be run."""
    command = list(sys.argv[1:] if argv is None else argv)
    if not command:
        _log("no command was given")
        raise SystemExit(2)
    command, given = split_modules(without_newer_flags(command, engine_version()))
    command += prepare(Settings.read(os.environ), given)
    try:
        os.execvpe(command[0], command, build_environment(os.environ))  # noqa: S606 - becoming another program is the purpose
    except OSError as error:
        _log(f"{clean(command[0])} can't be run: {error.strerror}")
        raise SystemExit(127) from None


if __name__ == "__main__":
    main()
