"""The admin API guard decides who may ask an engine for what: inference is open, everything that changes state needs the deployment's token.

An allow-list, because new engine versions bring new routes that change state. Paths are compared whole, as the server's router
sees them; anything unusual about a path (a doubled slash, an encoded letter) is simply not on the list. Without a token on disk
nobody has the right one.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Final

TOKEN_HEADER: Final = b"x-lora-operator-token"
API_PREFIX: Final = "/lora-operator/v1/"
READY_PATH: Final = "/lora-operator/ready"  # of pods' readiness probes: /health says less (plugin.py)
ERROR_TYPE: Final = "lora_operator_gate"
_TOKEN_BYTES: Final = 4096

_READ: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_INFER: Final = frozenset({"POST", "OPTIONS"})
OPEN_ROUTES: Final[Mapping[str, frozenset[str]]] = {
    **dict.fromkeys(
        (
            READY_PATH,
            "/health",
            "/load",
            "/version",
            "/metrics",
            "/v1/models",
            "/openapi.json",
            "/docs",
            "/redoc",
            "/tokenizer_info",
        ),
        _READ,
    ),
    "/ping": _READ | _INFER,
    **dict.fromkeys(
        (
            "/v1/completions",
            "/v1/chat/completions",
            "/v1/chat/completions/batch",
            "/v1/responses",
            "/v1/messages",
            "/v1/messages/count_tokens",
            "/v1/systemone",
            "/v1/decisions",
            "/cohere/v2/chat",
            "/cohere/v2/chat/render",
            "/tokenize",
            "/detokenize",
            "/generative_scoring",
            "/v1/embeddings",
            "/v2/embed",
            "/pooling",
            "/classify",
            "/score",
            "/v1/score",
            "/rerank",
            "/v1/rerank",
            "/v2/rerank",
            "/v1/audio/transcriptions",
            "/v1/audio/translations",
        ),
        _INFER,
    ),
}  # fmt: skip
# /invocations is not among them: vLLM answers it with the base model whatever adapter the body names, unless a header chooses one.

# Where no API key is asked for: what probes and monitoring read, and the description of the routes.
KEYLESS: Final = frozenset(
    {READY_PATH, "/health", "/ping", "/load", "/version", "/metrics", "/openapi.json", "/docs", "/redoc"}
)


class Access(Enum):
    """What happens to a request."""

    OPEN = "open"  # inference: goes through as it is
    TRUSTED = "trusted"  # has the token: goes through, or is for the plugin
    UNKNOWN = "no token"  # 401
    REFUSED = "wrong token"  # 403


def route_path(scope: Mapping[str, Any]) -> str:
    """The path as the server's router matches it: without the root path that a proxy may add."""
    path, root = str(scope.get("path", "")), str(scope.get("root_path", "") or "")
    if root and path.startswith(root) and path[len(root) :][:1] in ("", "/"):
        return path[len(root) :]
    return path


def judge(scope: Mapping[str, Any], read: Callable[[], str | None]) -> Access:
    """What to do with an HTTP request; `read` gives the right token (None: there is none) and is only asked when one came."""
    given = [value for name, value in scope.get("headers", ()) if name.lower() == TOKEN_HEADER]
    if not given:
        return Access.OPEN if is_open(scope) else Access.UNKNOWN
    token = read()
    right = token is not None and len(given) == 1 and hmac.compare_digest(given[0], token.encode())
    return Access.TRUSTED if right else Access.REFUSED


def is_open(scope: Mapping[str, Any]) -> bool:
    """Whether a request is for inference or for looking, and written plainly."""
    raw, path = scope.get("raw_path"), str(scope.get("path", ""))
    if raw is not None and bytes(raw).split(b"?", 1)[0] != path.encode("utf-8", "surrogateescape"):
        return False
    return str(scope.get("method", "")) in OPEN_ROUTES.get(route_path(scope), frozenset())


def read_token(path: Path) -> str | None:
    """The token of a mounted Secret, read anew each time so that rotation works; None when there is none."""
    try:
        with path.open("rb") as file:
            return file.read(_TOKEN_BYTES).decode("ascii").strip() or None
    except (OSError, ValueError):
        return None


def without_token(headers: Iterable[tuple[bytes, bytes]], *, api_key: str | None) -> list[tuple[bytes, bytes]]:
    """A trusted request's headers for the engine: not the token, but the engine's own API key where it has one."""
    hidden = {TOKEN_HEADER, b"authorization"} if api_key else {TOKEN_HEADER}
    kept = [(name, value) for name, value in headers if name.lower() not in hidden]
    return [*kept, (b"authorization", f"Bearer {api_key}".encode())] if api_key else kept
