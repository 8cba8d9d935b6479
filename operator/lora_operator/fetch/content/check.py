"""Judges a staged snapshot by the checks that the engine's launcher makes too, so that nothing is published that no engine would take.

The rank is reported, not judged: which rank is too big is the deployment's business, and one artifact may serve several.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_operator.constants import Reason
from lora_operator.engine_plugin import checks
from lora_operator.errors import ReasonError
from lora_operator.fetch import text
from lora_operator.fetch.content import pickles
from lora_operator.fetch.content.select import ADAPTER_PICKLES
from lora_operator.fetch.volume import layout, snapshots
from lora_operator.wire.jobs import FetchRequest


@dataclass(frozen=True)
class AdapterFindings:
    """What the checks found out about an adapter; empty for other content."""

    rank: int | None = None
    target_modules: tuple[str, ...] = ()
    pickles: tuple[str, ...] = ()  # files that were scanned


def inspect(request: FetchRequest, *, root: Path, snapshot: Path) -> AdapterFindings:
    """Raises ReasonError when `snapshot`, a directory of the cache at `root`, can't be served.

    InvalidAdapter, UnsafeFormat, IncompatibleBaseModel, IncompleteModel; JobFailed when the base model to compare with is not there.
    All weights of an adapter are read once more, to find NaN and infinity (about a second per GiB).
    """
    if request.type == "Tokenizer":
        return AdapterFindings()
    if request.type == "BaseModel":
        _read_base(snapshot, root=root, reason=Reason.INCOMPLETE_MODEL, what="the model")
        return AdapterFindings()
    scanned = tuple(name for name in ADAPTER_PICKLES if (snapshot / name).exists())
    for name in scanned:
        pickles.require_clean(snapshot / name)
    base = None if request.base_model_path is None else _published_base(request.base_model_path, root=root)
    try:
        info = checks.check_adapter(snapshot, base=base, root=root, scan_values=True, scanned=scanned)
    except checks.AdapterProblem as problem:
        raise ReasonError(Reason(problem.kind), text.clean(problem.message)) from problem
    return AdapterFindings(rank=info.rank, target_modules=info.target_modules, pickles=scanned)


def _published_base(relative: str, *, root: Path) -> checks.BaseModel:
    folder = layout.inside(root, relative)
    manifest = snapshots.read_manifest(folder)
    if manifest is None or manifest.type != "BaseModel":
        raise ReasonError(
            Reason.JOB_FAILED,
            f"the base model to compare with is not in the cache at {text.clean(relative, limit=300)!r}",
        )
    return _read_base(folder, root=root, reason=Reason.JOB_FAILED, what="the base model")


def _read_base(folder: Path, *, root: Path, reason: Reason, what: str) -> checks.BaseModel:
    try:
        return checks.read_base_model(folder, root=root)
    except checks.AdapterProblem as problem:
        raise ReasonError(reason, text.clean(f"{what}'s {problem.message}")) from problem
