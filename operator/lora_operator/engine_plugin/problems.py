"""Why files can't be served: the one exception that the checks raise."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from .clean_text import clean

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"


class ProblemKind(StrEnum):
    """What sort of problem it is; the values are reasons of the operator's conditions."""

    INVALID = "InvalidAdapter"
    INCOMPATIBLE = "IncompatibleBaseModel"
    RANK = "RankTooLarge"
    UNSAFE = "UnsafeFormat"


class AdapterProblem(Exception):  # noqa: N818 - it is a finding, not an error of ours
    """Why files can't be served; the message is one bounded, printable line that says what to do."""

    def __init__(self, kind: ProblemKind, message: str) -> None:
        self.kind = kind
        self.message = clean(message)
        super().__init__(self.message)
