"""The tree is what the design says: Python's own `operator` stays importable, and nothing is promised that nobody keeps."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from lora_operator.api import RESOURCES
from lora_operator.constants import CONDITION_DOCS, REASONS, Condition, Reason
from lora_operator.source_kinds import SCHEMES

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "operator" / "lora_operator"
# All that runs, without what only declares: constants has every reason, api every field.
SOURCES = {
    path.relative_to(PACKAGE): path.read_text()
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "constants.py" and path.parent.name != "gen"
}
CODE = "\n".join(SOURCES.values())
PLUGIN = "\n".join(text for path, text in SOURCES.items() if path.parts[0] == "engine_plugin")
# Of the models, only properties over their own spec or fields count as readers; CEL is in camelCase.
READERS = "\n".join(
    text if path.parts[0] != "api" else "\n".join(re.findall(r"self\.(?:spec\.\w+|\w+_\w+)", text))
    for path, text in SOURCES.items()
)
# Passed on with the object that holds it.
PASSED_ON = {"VLLMDeployment.engine.env.value_from"}
# Read by the table of sources: a source's one member, and what a cache allows of that kind.
KINDS_OF_SOURCE = tuple(f"{holder}.{scheme.field}" for scheme in SCHEMES for holder in ("source", "ModelCache"))


@pytest.mark.parametrize(
    "path", [str(path) for path in SOURCES if path.parts[0] == "reconcile" and path.stem != "clock"]
)
def test_no_reconciler_reads_a_clock_that_it_was_not_given(path: str) -> None:
    bare = re.compile(
        r"^(?:import|from) time\b|\bdatetime\.(?:now|utcnow|today)\(|\bget_(?:running|event)_loop\(\)\.time\(", re.M
    )
    assert bare.findall(SOURCES[Path(path)]) == []


@pytest.mark.parametrize("page", ["concepts.md", "development.md"])
def test_the_contents_of_a_page_have_all_its_sections_in_order(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    sections = re.findall(r"^(?<=\n\n)## (.+)$", text, re.MULTILINE)
    assert len(sections) == len(re.findall(r"^## ", text, re.MULTILINE)), "a blank line is before each"
    assert re.findall(r"^- \[(.+)\]\(#[a-z0-9-]+\)$", text, re.MULTILINE) == sections


def test_the_readme_and_the_examples_run_one_version_of_vllm() -> None:
    """The one that the docs call the first that Hopper GPUs should run."""
    pages = [ROOT / "README.md", *(ROOT / "examples").glob("*.yaml")]
    images = {image for page in pages for image in re.findall(r"image: vllm/vllm-openai:v(\S+)", page.read_text())}
    assert images == {"0.33.0"}
    assert "| vLLM on Hopper GPUs (H100, H200, H20) | 0.33 or newer." in (ROOT / "docs" / "concepts.md").read_text()


def spec_fields(model: type[BaseModel], path: str) -> Iterator[tuple[str, str]]:
    """(path, attribute) of every field of a spec, at any depth."""
    for name, field in model.model_fields.items():
        if get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1:
            continue  # says what is so in any case
        yield (f"{path}.{name}", name)
        for inner in _models(field.annotation):
            yield from spec_fields(inner, f"{path}.{name}")


def _models(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


FIELDS = sorted(
    {(path, name) for info in RESOURCES for path, name in spec_fields(info.spec, info.kind) if path not in PASSED_ON}
)


def test_operator_is_a_source_root_and_no_package() -> None:
    assert not (ROOT / "operator" / "__init__.py").exists()


@pytest.mark.parametrize("folder", [".", "operator"])
def test_pythons_own_operator_wins(folder: str) -> None:
    code = "import operator; print(operator.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT / folder, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).parent.resolve() == Path(sysconfig.get_path("stdlib")).resolve()


def test_every_reason_is_documented_and_nothing_else_is() -> None:
    assert set(REASONS) == set(Reason)
    assert all(info.doc.endswith(".") for info in REASONS.values())


def test_every_condition_is_documented_and_nothing_else_is() -> None:
    assert set(CONDITION_DOCS) == set(Condition)
    assert all(doc.endswith(".") for doc in CONDITION_DOCS.values())


@pytest.mark.parametrize("reason", Reason)
def test_something_sets_the_reason(reason: Reason) -> None:
    # The engine's plugin may import nothing of the operator, so its checks say the word.
    found = re.search(rf"\bReason\.{reason.name}\b", CODE) or f'"{reason}"' in PLUGIN
    assert found, f"no code sets {reason}"


@pytest.mark.parametrize("condition", Condition)
def test_something_sets_the_condition(condition: Condition) -> None:
    found = re.search(rf"\bCondition\.{condition.name}\b", CODE)
    assert found, f"no code sets {condition}"


@pytest.mark.parametrize(("path", "attribute"), FIELDS, ids=[path for path, _ in FIELDS])
def test_something_reads_the_field(path: str, attribute: str) -> None:
    found = path.endswith(KINDS_OF_SOURCE) or re.search(rf"\.{attribute}\b", READERS)
    assert found, f"{path} is accepted and nothing reads it"
