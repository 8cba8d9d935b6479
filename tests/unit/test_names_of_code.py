"""What the code calls its things: one name for one thing, nothing declared that nobody reads, nothing too long to be read at once.

Where a rule has exceptions, they stand here with their reasons, and an exception that is no longer needed is a failure too: who
mends the last case takes the entry out.
"""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "operator" / "lora_operator"
TREES = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}

OURS = ("operator", "tests", "e2e")

LINES_OF_A_FILE = 350
LINES_OF_A_FUNCTION = 40
FILES_OF_A_FOLDER = 22

# One file per kind, or per library, in each of several floors: the folder says which of them.
SHARED_FILE_NAMES = {
    "__init__": "Python's",
    "adapter": "the kind: its API, its plan, its reconcile",
    "artifact": "the kind",
    "cache": "the kind",
    "deployment": "the kind",
    "eviction": "the plan and the reconcile of one thing",
    "base": "what the kinds of source have in common, as spec and as program",
    "checksums": "what several sources share; and per library, which sums it has",
    "client": "the API server's; the Hub's",
    "http": "the source",
    "oci": "the source",
    "volumes": "the source",
    "source": "the union of all sources' specs; the program of the source that its package is named for",
    "errors": "the product's; and per library, what its errors mean",
    "common": "what a floor's modules have in common",
    "progress": "of a download: as its Job logs it, as a plan reads it, as a status has it",
    "plugin": "the engine plugin, and what the operator and it say to each other",
}
# Each is a source's spec in api and its program in fetch, and neither imports the other.
SHARED_CLASS_NAMES = {
    "AzureSource",
    "ClaimSource",
    "GcsSource",
    "HttpSource",
    "LocalSource",
    "OciSource",
    "S3Source",
    "Source",
}
# One table each: a reader looks one row up.
LONG_FILES = {"constants.py": "every condition and reason with its meaning, which docs are made from"}
# A manifest in one piece, in the order in which one reads it.
LONG_FUNCTIONS = {
    "desired/deployment.py:_template",
    "desired/deployment.py:build_deployment",
    "desired/job.py:build_job",
    "desired/job_pod.py:build_template",
}
# Declared and never read by its name, each for its reason.
READ_OTHERWISE: dict[str, str] = {}

# What is not mended yet. Who mends a case takes its entry out: an entry that nothing needs is a failure.
OPEN_FILE_NAMES: set[str] = set()
OPEN_CLASS_NAMES: set[str] = set()
OPEN_FIELDS: set[str] = {
    "engine_plugin/checks.py:AdapterInfo.tensors",
}
OPEN_FUNCTIONS: set[str] = {
    "plan/adapter_status.py:adapter_status",
    "plan/admission.py:admit",
    "plan/fair_share.py:order",
}
OPEN_FILES: set[str] = {
    "api/deployment.py",
    "kube/client.py",
}
OPEN_FOLDERS: set[str] = {
    "engine_plugin",
    "plan",
    "reconcile",
}
OPEN_DOCSTRINGS: set[str] = set()


def modules_of_the_same_name() -> Iterator[str]:
    """Names of files that stand in more than one folder."""
    count = Counter(Path(name).stem for name in TREES)
    return (name for name, number in count.items() if number > 1)


def classes_of_the_same_name() -> Iterator[str]:
    """Names of public classes that more than one module has."""
    count = Counter(
        node.name
        for tree in TREES.values()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    return (name for name, number in count.items() if number > 1)


def fields() -> Iterator[tuple[str, str, str]]:
    """(module, class, field) of every dataclass, and of every pydantic model that is no part of a kind.

    What a user may write in a spec is held by test_layout; what a status has is written for him.
    """
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef) or module.startswith("api/"):
                continue
            if not (_is_dataclass(node) or module.startswith("wire/")):
                continue
            for entry in node.body:
                if not isinstance(entry, ast.AnnAssign) or "ClassVar" in ast.unparse(entry.annotation):
                    continue
                if isinstance(entry.target, ast.Name):
                    yield module, node.name, entry.target.id


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def fields_read() -> set[str]:
    """Attributes that something takes, by name or in a pattern."""
    order: dict[str, list[str]] = defaultdict(list)
    for _, owner, field in fields():
        order[owner].append(field)
    read: set[str] = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
            elif isinstance(node, ast.MatchClass):
                read.update(node.kwd_attrs)
                read.update(order[ast.unparse(node.cls).rpartition(".")[2]][: len(node.patterns)])
    return read


Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, Function]]:
    """Every function with the names that lead to it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function | ast.ClassDef):
            name = f"{owner}{node.name}"
            if not isinstance(node, ast.ClassDef):
                yield name, node
            yield from functions(node, f"{name}.")
        elif not isinstance(node, ast.expr):
            yield from functions(node, owner)


def long_functions() -> Iterator[str]:
    """Functions that don't fit on a screen, from their name to their last line."""
    for module, tree in TREES.items():
        for name, node in functions(tree):
            if node.end_lineno and node.end_lineno - node.lineno + 1 > LINES_OF_A_FUNCTION:
                yield f"{module}:{name}"


def inherited() -> dict[str, set[str]]:
    """What a class may override, by its name: the methods of all classes it is made from, theirs included."""
    bases: dict[str, set[str]] = defaultdict(set)
    methods: dict[str, set[str]] = defaultdict(set)
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                bases[node.name] |= {re.split(r"[.\[]", ast.unparse(base))[-1] for base in node.bases}
                methods[node.name] |= {entry.name for entry in node.body if isinstance(entry, Function)}

    def of(name: str, seen: frozenset[str]) -> set[str]:
        above = bases.get(name, set()) - seen
        return set().union(*(methods.get(base, set()) | of(base, seen | {name}) for base in above))

    return {name: of(name, frozenset()) for name in list(bases)}


def empty_docstrings() -> Iterator[str]:
    """Public functions, overrides apart, with a docstring of so few words that it says nothing."""
    above = inherited()
    for module, tree in TREES.items():
        for name, node in functions(tree):
            doc = ast.get_docstring(node)
            owner = name.split(".")[-2] if "." in name else ""
            private = any(part.startswith("_") for part in name.split("."))
            if doc is not None and len(doc.split()) <= 4 and not private and node.name not in above.get(owner, ()):
                yield f"{module}:{name}"


def long_files() -> Iterator[str]:
    """Files that nobody reads at once."""
    for name in TREES:
        if len((PACKAGE / name).read_text().splitlines()) > LINES_OF_A_FILE:
            yield name


def crowded_folders() -> Iterator[str]:
    """Folders with more files than one keeps in mind."""
    count = Counter(str(Path(name).parent) for name in TREES if Path(name).name != "__init__.py")
    return (name for name, number in count.items() if number > FILES_OF_A_FOLDER)


def unread_fields() -> Iterator[str]:
    """Fields that are given values for nobody."""
    read = fields_read()
    return (f"{module}:{owner}.{field}" for module, owner, field in fields() if field not in read)


RULES: dict[str, tuple[Callable[[], Iterable[str]], Collection[str], set[str]]] = {
    "a file's name stands once": (modules_of_the_same_name, SHARED_FILE_NAMES, OPEN_FILE_NAMES),
    "a public class's name stands once": (classes_of_the_same_name, SHARED_CLASS_NAMES, OPEN_CLASS_NAMES),
    "every field is read": (unread_fields, READ_OTHERWISE, OPEN_FIELDS),
    "a function fits on a screen": (long_functions, LONG_FUNCTIONS, OPEN_FUNCTIONS),
    "a file is read at once": (long_files, LONG_FILES, OPEN_FILES),
    "a folder is kept in mind": (crowded_folders, (), OPEN_FOLDERS),
    "a docstring says something": (empty_docstrings, (), OPEN_DOCSTRINGS),
}


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_is_kept_but_for_what_is_said_here(rule: str) -> None:
    look, excepted, still_open = RULES[rule]
    found = set(look())
    assert found - {*excepted, *still_open} == set(), "mend it, or say above why it is right"
    assert {*excepted, *still_open} - found == set(), "take out what nothing needs any more"


GLOSSARY = re.findall(r"^\| (.+?) \| (.+) \| `(.+)` \|$", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)


def test_every_term_of_the_glossary_stands_once_and_has_a_module_that_is_there() -> None:
    terms = [term for term, _, _ in GLOSSARY]
    assert len(terms) > 40
    assert len(terms) == len(set(terms))
    assert {module for _, _, module in GLOSSARY} <= TREES.keys()


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{name}.md" for name in ("concepts", "decisions", "development"))]
)
def test_a_page_names_only_files_that_are_there(page: str) -> None:
    """By their path, or by a name that one file has."""
    known = {str(path.relative_to(ROOT)) for part in OURS for path in (ROOT / part).rglob("*.py")}
    named = set(re.findall(r"`([\w/.]+\.py)`", (ROOT / page).read_text()))
    named.discard("operator/__init__.py")  # must never be there
    assert [name for name in sorted(named) if not any(f"/{path}".endswith(f"/{name}") for path in known)] == []
