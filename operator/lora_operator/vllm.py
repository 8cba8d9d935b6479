"""Talks to engine pods: the engine plugin's HTTP API and vLLM's own routes. The only place that does, and the only aiohttp client.

Answers come from pods that tenants' content runs in: they are bounded in size, checked against a schema, redirects are not
followed, and no proxy from the environment is used. The admin API's token must never get into an error message or a log.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Final, Self, TypeVar

import aiohttp
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from lora_operator.engine_plugin.admin_guard import API_PREFIX, ERROR_TYPE
from lora_operator.errors import EngineRefused, EngineUnreachable, StaleList
from lora_operator.wire.plugin import MAX_MESSAGE, HeldList, Message, PluginState, ServedModel

TOKEN_HEADER: Final = "X-LoRA-Operator-Token"  # noqa: S105 - the header's name
MAX_ANSWER: Final = 32 * 2**20  # 5,000 adapters take about 4 MB in /v1/models
REQUEST_TIMEOUT: Final = 10.0
CONNECT_TIMEOUT: Final = 3.0

_ResultT = TypeVar("_ResultT")


@dataclass(frozen=True, config=ConfigDict(extra="ignore"))
class _ModelList:
    data: tuple[ServedModel, ...]


_STATE: Final = TypeAdapter(PluginState)
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
        """Close the session; further calls are an error."""
        if self._session is not None:
            await self._session.close()

    async def put_list(self, url: str, token: str, body: bytes, *, wait: float) -> PluginState:
        """Give a pod the adapter list (JSON, may be gzip) and wait up to `wait` seconds (≤ 30) until it is loaded.

        An answer means that the pod keeps the list over restarts. Raises StaleList when it holds a newer one, EngineRefused
        and EngineUnreachable.
        """
        headers = {"Content-Type": "application/json"}
        if body.startswith(b"\x1f\x8b"):
            headers["Content-Encoding"] = "gzip"
        status, answer = await self._request(
            "PUT",
            f"{url}{API_PREFIX}modules?wait={wait:g}",
            token=token,
            data=body,
            headers=headers,
            limit=self._timeout + wait,
        )
        if status == 409:
            raise StaleList(_understood(_STATE, url, answer))
        return _understood(_STATE, url, _successful(url, status, answer, token))

    async def state(self, url: str, token: str) -> PluginState:
        """What the pod's plugin reports; raises EngineRefused (a 404 where there is no plugin) and EngineUnreachable."""
        status, answer = await self._request("GET", f"{url}{API_PREFIX}state", token=token)
        return _understood(_STATE, url, _successful(url, status, answer, token))

    async def held_list(self, url: str, token: str) -> HeldList:
        """The list that the pod's plugin holds; raises EngineRefused (a 404 by one that can't report it) and EngineUnreachable."""
        status, answer = await self._request("GET", f"{url}{API_PREFIX}modules", token=token)
        return _understood(_HELD, url, _successful(url, status, answer, token))

    async def models(self, url: str, token: str) -> tuple[ServedModel, ...]:
        """What the engine itself lists as served; raises EngineRefused and EngineUnreachable."""
        status, answer = await self._request("GET", f"{url}/v1/models", token=token)
        return _understood(_MODELS, url, _successful(url, status, answer, token)).data

    async def admin_api_is_guarded(self, url: str) -> bool:
        """Whether the plugin refuses a client without the token that loads an adapter.

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
            return bool(_GATE.validate_json(answer).error.type == ERROR_TYPE)
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
