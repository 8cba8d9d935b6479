"""Talks to engine pods: the engine kit's HTTP API and vLLM's own routes. The only place that does, and the only aiohttp client.

Answers come from pods that tenants' content runs in: they are bounded in size, checked against a schema, redirects are not
followed, and no proxy from the environment is used. The gate's token must never get into an error message or a log.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import TracebackType
from typing import Annotated, Any, Final, Self, TypeVar

import aiohttp
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.alias_generators import to_camel
from pydantic.dataclasses import dataclass

from lora_operator.constants import HOT_LOAD, ROLLOUT
from lora_operator.engine_plugin.versions import FIRST_RELEASE
from lora_operator.errors import EngineRefused, EngineUnreachable, StaleList
from lora_operator.plan.adapter_list import MAX_GENERATION

TOKEN_HEADER: Final = "X-LoRA-Operator-Token"  # noqa: S105 - the header's name
GATE_ERROR_TYPE: Final = "lora_operator_gate"
MAX_ANSWER: Final = 32 * 2**20  # 5,000 modules take about 4 MB in /v1/models
MAX_MESSAGE: Final = 500
REQUEST_TIMEOUT: Final = 10.0
CONNECT_TIMEOUT: Final = 3.0

# The oldest vLLM for each updateStrategy. Below 0.26 an adapter that is loaded while all slots run silently gives wrong weights to
# running requests; below 0.10 the kit was never tried.
MINIMUM_VERSIONS: Final = {HOT_LOAD: (0, 26), ROLLOUT: (0, 10)}

_VERSION: Final = re.compile(r"^v?(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?")
_CONFIG: Final = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore")
_ResultT = TypeVar("_ResultT")


def parse_version(text: str) -> tuple[int, ...] | None:
    """'0.32.0', 'v0.26.1rc2', '0.11.2+cpu' as numbers; None for what is no release version ('dev', '0.1.dev12' of a clone without tags)."""
    match = _VERSION.match(text.strip())
    version = () if match is None else tuple(int(part) for part in match.groups() if part is not None)
    return version if version >= FIRST_RELEASE else None


def _cut(value: Any) -> Any:
    return value[:MAX_MESSAGE] if isinstance(value, str) else value


Name = Annotated[str, Field(max_length=1024)]
Path = Annotated[str, Field(max_length=4096)]
Message = Annotated[str, BeforeValidator(_cut)]


@dataclass(frozen=True, config=ConfigDict(extra="ignore"))
class ServedModel:
    """One entry of /v1/models: `root` is the path that it was loaded from, `parent` its lineage (None: a base model)."""

    id: Name
    root: Path | None = None
    parent: Name | None = None


@dataclass(frozen=True, config=_CONFIG)
class LoadedModule:
    """An adapter that the kit has in the engine's registry under its public name."""

    name: Name
    internal_name: Name
    path: Path
    base_model_name: Name | None = None


@dataclass(frozen=True, config=_CONFIG)
class WaitingModule:
    """An adapter of the list that the first request for it will load."""

    name: Name
    path: Path


@dataclass(frozen=True, config=_CONFIG)
class ModuleFailure:
    """An adapter of the list that the pod does not serve, and why; `stage`: refused by the kit's "checks" or by the "engine"."""

    name: Name
    path: Path
    stage: Name
    message: Message


@dataclass(frozen=True, config=_CONFIG)
class RetiredModule:
    """Content that is no longer served under a public name; `running`: requests may still use its files."""

    internal_name: Name
    path: Path
    running: bool = True


@dataclass(frozen=True, config=_CONFIG)
class KitState:
    """What a pod's kit says of itself; `instance` is another one after every start of the engine's process."""

    kit: Name
    vllm_version: Name
    instance: Name
    list_generation: Annotated[int, Field(ge=0, lt=MAX_GENERATION)] | None
    settled: bool
    list_digest: Annotated[str, Field(max_length=64)] | None = None
    loaded: tuple[LoadedModule, ...] = ()
    waiting: tuple[WaitingModule, ...] = ()
    failures: tuple[ModuleFailure, ...] = ()
    retired: tuple[RetiredModule, ...] = ()
    atomic_swap: bool = False
    update_strategy: Name = HOT_LOAD  # Rollout: its list is in the pod's arguments, and it takes no other


@dataclass(frozen=True, config=_CONFIG)
class HeldModule:
    """An entry of the list that a pod holds; `uid`: of the adapter that it was told for."""

    name: Name
    path: Path
    base_model_name: Name | None = None
    revision: Name = ""
    uid: Name = ""


@dataclass(frozen=True, config=_CONFIG)
class HeldList:
    """The list that a pod holds, whatever of it is loaded."""

    generation: Annotated[int, Field(ge=0, lt=MAX_GENERATION)] = 0
    modules: tuple[HeldModule, ...] = ()


@dataclass(frozen=True, config=ConfigDict(extra="ignore"))
class _ModelList:
    data: tuple[ServedModel, ...]


_STATE: Final = TypeAdapter(KitState)
_HELD: Final = TypeAdapter(HeldList)
_MODELS: Final = TypeAdapter(_ModelList)


class Engines:
    """One HTTP session to all engine pods. `url` is a pod's base address, for instance http://198.18.0.7:8000."""

    def __init__(self, *, timeout: float = REQUEST_TIMEOUT, max_answer: int = MAX_ANSWER) -> None:
        self._timeout = timeout
        self._max_answer = max_answer
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=64, limit_per_host=4),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            headers={"User-Agent": "lora-operator", "Accept-Encoding": "identity"},
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the session; further calls are an error."""
        if self._session is not None:
            await self._session.close()

    async def put_modules(self, url: str, token: str, body: bytes, *, wait: float) -> KitState:
        """Gives a pod the module list (JSON, may be gzip) and waits up to `wait` seconds (≤ 30) until it is loaded.

        An answer means that the pod keeps the list over restarts. Raises StaleList when it holds a newer one, EngineRefused
        and EngineUnreachable.
        """
        headers = {"Content-Type": "application/json"}
        if body.startswith(b"\x1f\x8b"):
            headers["Content-Encoding"] = "gzip"
        status, answer = await self._request(
            "PUT",
            f"{url}/lora-operator/v1/modules?wait={wait:g}",
            token=token,
            data=body,
            headers=headers,
            limit=self._timeout + wait,
        )
        if status == 409:
            raise StaleList(_understood(_STATE, url, answer))
        return _understood(_STATE, url, _successful(url, status, answer, token))

    async def state(self, url: str, token: str) -> KitState:
        """What the pod's kit holds; raises EngineRefused (a 404 where there is no kit) and EngineUnreachable."""
        status, answer = await self._request("GET", f"{url}/lora-operator/v1/state", token=token)
        return _understood(_STATE, url, _successful(url, status, answer, token))

    async def held_list(self, url: str, token: str) -> HeldList:
        """The list that the pod's kit holds; raises EngineRefused (a 404 by a kit that does not tell) and EngineUnreachable."""
        status, answer = await self._request("GET", f"{url}/lora-operator/v1/modules", token=token)
        return _understood(_HELD, url, _successful(url, status, answer, token))

    async def models(self, url: str, token: str) -> tuple[ServedModel, ...]:
        """What the engine serves by its own word; raises EngineRefused and EngineUnreachable."""
        status, answer = await self._request("GET", f"{url}/v1/models", token=token)
        return _understood(_MODELS, url, _successful(url, status, answer, token)).data

    async def gate_is_closed(self, url: str) -> bool:
        """Whether a client without the token is refused by the kit when it loads an adapter.

        Any other answer is False; raises EngineUnreachable when there is none. What it asks for can't exist, so it does no harm.
        """
        status, answer = await self._request(
            "POST",
            f"{url}/v1/load_lora_adapter",
            data=b'{"lora_name": "lora-operator@gate", "lora_path": "/nonexistent/lora-operator-gate"}',
            headers={"Content-Type": "application/json"},
        )
        if status != 401:
            return False
        try:
            return bool(_GATE.validate_json(answer).error.type == GATE_ERROR_TYPE)
        except ValidationError:
            return False

    async def _request(
        self,
        method: str,
        url: str,
        *,
        token: str | None = None,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        limit: float | None = None,
    ) -> tuple[int, bytes]:
        if self._session is None:
            raise RuntimeError("Engines is used outside its async with block")
        sent = {**(headers or {}), **({TOKEN_HEADER: token} if token is not None else {})}
        limits = aiohttp.ClientTimeout(total=limit or self._timeout, sock_connect=CONNECT_TIMEOUT)
        try:
            async with self._session.request(
                method, url, data=data, headers=sent, timeout=limits, allow_redirects=False
            ) as response:
                answer = bytearray()
                async for chunk in response.content.iter_chunked(2**18):
                    answer += chunk
                    if len(answer) > self._max_answer:
                        response.close()
                        raise EngineUnreachable(f"{method} {url}: the answer is larger than {self._max_answer} bytes")
                return response.status, bytes(answer)
        except TimeoutError as error:
            raise EngineUnreachable(f"{method} {url}: no answer within {limits.total:g} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # from None: the request's headers, and so the token, are in reach of the foreign exception
            raise EngineUnreachable(f"{method} {url}: {type(error).__name__}: {_safe(str(error), token)}") from None


@dataclass(frozen=True, config=ConfigDict(extra="ignore"))
class _Error:
    type: str = ""
    message: Message = ""


@dataclass(frozen=True, config=ConfigDict(extra="ignore"))
class _ErrorAnswer:
    error: _Error


_GATE: Final = TypeAdapter(_ErrorAnswer)


def _safe(text: str, token: str | None) -> str:
    """Foreign text for a message: one bounded line without the token."""
    if token:
        text = text.replace(token, "…")
    return " ".join(text.split())[:MAX_MESSAGE]


def _successful(url: str, status: int, answer: bytes, token: str) -> bytes:
    if status == 200:
        return answer
    try:
        text = _GATE.validate_json(answer).error.message
    except ValidationError:
        text = answer[: 2 * MAX_MESSAGE].decode(errors="replace")
    raise EngineRefused(status, f"{url} answered {status}: {_safe(text, token)}")


def _understood(adapter: TypeAdapter[_ResultT], url: str, answer: bytes) -> _ResultT:
    try:
        return adapter.validate_json(answer)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise EngineUnreachable(f"{url} answered what is not understood: {place}: {first['msg']}") from None
