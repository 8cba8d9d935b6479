"""Talking to engines as clients do: plain HTTP, with the answers as they come. Standard library only."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

Json = dict[str, Any]


def request(
    method: str, url: str, body: Any = None, *, headers: dict[str, str] | None = None, timeout: float = 60
) -> tuple[int, Any]:
    """One HTTP request: (status, parsed JSON or text); status 0 and the error where there is no answer."""
    data = None if body is None else json.dumps(body).encode()
    call = urllib.request.Request(
        url, data=data, method=method, headers={"Content-Type": "application/json", **(headers or {})}
    )
    try:
        with urllib.request.urlopen(call, timeout=timeout) as response:
            status, text = response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text


def token_ids(url: str, model: str, prompt: str | list[Json], *, tokens: int = 32) -> list[int]:
    """Greedy token ids for a completion (text) or a chat (messages)."""
    body: Json = {"model": model, "temperature": 0, "max_tokens": tokens, "ignore_eos": True, "return_token_ids": True}
    if isinstance(prompt, str):
        status, answer = request("POST", f"{url}/v1/completions", body | {"prompt": prompt}, timeout=300)
    else:
        status, answer = request("POST", f"{url}/v1/chat/completions", body | {"messages": prompt}, timeout=300)
    assert status == 200, f"{model} at {url}: {status} {answer}"
    ids: list[int] = answer["choices"][0]["token_ids"]
    return ids


def models(url: str) -> dict[str, Json]:
    """The entries of /v1/models by id."""
    status, answer = request("GET", f"{url}/v1/models")
    assert status == 200, f"{url}/v1/models: {status} {answer}"
    return {model["id"]: model for model in answer["data"]}


class Stream:
    """One streamed completion, read in a thread: its token ids so far, whether it runs, and how it ended."""

    def __init__(self, url: str, model: str, prompt: str, *, tokens: int) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.model: str | None = None
        self._body = {
            "model": model,
            "prompt": prompt,
            "temperature": 0,
            "max_tokens": tokens,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
        }
        self._where = urlsplit(url)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether tokens may still come."""
        return self._thread.is_alive()

    def join(self, timeout: float) -> None:
        """Wait for its end; AssertionError where it goes on, or broke."""
        self._thread.join(timeout)
        assert not self._thread.is_alive(), f"a stream still runs after {timeout:.0f} s"
        assert self.error is None, f"the stream broke after {len(self.token_ids)} tokens: {self.error}"

    def _run(self) -> None:
        connection = http.client.HTTPConnection(self._where.hostname or "", self._where.port, timeout=120)
        try:
            connection.request("POST", "/v1/completions", json.dumps(self._body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                self.error = f"{response.status} {response.read().decode()[:300]}"
                return
            for line in response:
                if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                    self._take(json.loads(line[6:]))
            if self.finish_reason is None and self.error is None:
                self.error = "it ended without a finish_reason"
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.error = f"{type(error).__name__}: {error}"
        finally:
            connection.close()

    def _take(self, chunk: Json) -> None:
        if "error" in chunk:
            self.error = str(chunk["error"])
            return
        self.model = chunk.get("model", self.model)
        for choice in chunk["choices"]:
            self.token_ids += choice.get("token_ids") or []
            self.finish_reason = choice.get("finish_reason") or self.finish_reason


def tokens_for(url: str, *names: str, seconds: float, least: int = 300, most: int = 100_000) -> int:
    """How many tokens streams of these models side by side take at least so long for, on this machine.

    By the fastest of three rounds: one round alone may fall into a busy moment, and the streams then end too soon.
    """

    def side_by_side(tokens: int) -> float:
        started = time.monotonic()
        for stream in [Stream(url, name, "Once", tokens=tokens) for name in names]:
            stream.join(120)
        return time.monotonic() - started

    side_by_side(4)
    return max(least, min(most, int(seconds * 64 / min(side_by_side(64) for _ in range(3)))))
