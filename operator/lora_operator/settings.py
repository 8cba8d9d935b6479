"""The operator's settings: read once from the environment, which the chart writes. Nothing here can change while it runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast

from lora_operator.errors import SettingsError

DEFAULT_JOB_DEADLINE: Final = 6 * 3600
DEFAULT_JOB_RESOURCES: Final = '{"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "2Gi"}}'
LOG_LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR")

PullPolicy = Literal["Always", "IfNotPresent", "Never"]


@dataclass(frozen=True)
class Settings:
    """What the chart tells the operator."""

    operator_image: str  # image of the download Jobs: the operator's own
    operator_namespace: str
    operator_image_pull_policy: PullPolicy = "IfNotPresent"
    job_deadline_seconds: int = DEFAULT_JOB_DEADLINE
    job_resources: Mapping[str, Any] = field(default_factory=lambda: json.loads(DEFAULT_JOB_RESOURCES))
    log_level: str = "INFO"
    log_format: Literal["json", "plain"] = "json"
    health_port: int = 8080


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Settings from environment variables; raises SettingsError with the variable's name. An empty one counts as absent."""

    def value(name: str, default: str | None = None) -> str:
        found = environ.get(name, "").strip() or default
        if found is None:
            raise SettingsError(f"environment variable {name} is required")
        return found

    def number(name: str, default: int, *, most: int) -> int:
        text = value(name, str(default))
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise SettingsError(f"environment variable {name} must be a whole number from 1 to {most}, not {text!r}")
        return int(text)

    def choice(name: str, default: str, among: tuple[str, ...]) -> str:
        text = value(name, default)
        if text not in among:
            raise SettingsError(f"environment variable {name} must be one of {', '.join(among)}, not {text!r}")
        return text

    return Settings(
        operator_image=value("OPERATOR_IMAGE"),
        operator_namespace=value("OPERATOR_NAMESPACE"),
        operator_image_pull_policy=cast(
            PullPolicy, choice("OPERATOR_IMAGE_PULL_POLICY", "IfNotPresent", ("Always", "IfNotPresent", "Never"))
        ),
        job_deadline_seconds=number("JOB_DEADLINE_SECONDS", DEFAULT_JOB_DEADLINE, most=30 * 24 * 3600),
        job_resources=_resources(value("JOB_RESOURCES", DEFAULT_JOB_RESOURCES)),
        log_level=choice("LOG_LEVEL", "INFO", LOG_LEVELS),
        log_format=cast(Literal["json", "plain"], choice("LOG_FORMAT", "json", ("json", "plain"))),
        health_port=number("HEALTH_PORT", 8080, most=65535),
    )


def _resources(text: str) -> Mapping[str, Any]:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise SettingsError(f"environment variable JOB_RESOURCES must be JSON: {error}") from error
    if not isinstance(parsed, dict) or not set(parsed) <= {"requests", "limits"}:
        raise SettingsError(
            "environment variable JOB_RESOURCES must be an object with requests and limits, as in a pod"
        )
    return parsed
