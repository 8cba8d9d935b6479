"""Writes the table of values into the chart's README, from the values' schema and their defaults. Pure; gen.crds calls it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

CHART: Final = Path("charts/lora-operator")
README: Final = CHART / "README.md"
_BEGIN: Final = "<!-- values: "
_END: Final = "<!-- end of values -->"


def leaves(schema: Mapping[str, Any], values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, its schema, its default) of every value; a group that the schema gives properties is gone into.

    Raises KeyError for a value that only one of the two has; `global` is Helm's own, and has no default.
    """
    properties: Mapping[str, Any] = schema["properties"]
    if unknown := values.keys() - properties.keys():
        raise KeyError(f"values.schema.json does not know {path}{sorted(unknown)[0]}")
    for name, part in properties.items():
        if path + name == "global":
            continue
        if "properties" in part and values[name]:
            yield from leaves(part, values[name], f"{path}{name}.")
        else:
            yield path + name, part, values[name]


def build_readme(readme: str, schema: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """The README with its table made anew."""
    head, begin, rest = readme.partition(_BEGIN)
    note, _, rest = rest.partition("\n")
    _, end, tail = rest.partition(_END)
    lines = ["| value | type | default | meaning |", "| --- | --- | --- | --- |"]
    for key, part, default in leaves(schema, values):
        text = json.dumps(default, ensure_ascii=False)
        lines.append(f"| `{key}` | {_type(part)} | `{text}` | {part['description']} |")
    return "\n".join([head + begin + note, "", *lines, "", end + tail])


def _type(part: Mapping[str, Any]) -> str:
    if "enum" in part:
        return ", ".join(f"`{value}`" for value in part["enum"])
    return str(part.get("type", "object"))
