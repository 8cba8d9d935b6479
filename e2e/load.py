"""Clients that never stop asking, as a fleet's users: what they were not answered well is kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from e2e.engine_client import Stream, request
from e2e.stack import Stack


def ask(url: str, model: str) -> tuple[int, Any]:
    """One short completion over a connection of its own: (status, answer)."""
    body = {"model": model, "prompt": "SELECT", "max_tokens": 2, "temperature": 0}
    return request("POST", f"{url}/v1/completions", body, timeout=60)


class Client:
    """Asks for every model in turn, over and over, `pause` seconds apart."""

    def __init__(self, url: str, models: Sequence[str], pause: float) -> None:
        self.answered = dict.fromkeys(models, 0)
        self.bad: list[tuple[str, int, Any]] = []
        self._url, self._pause = url, pause
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            for model in self.answered:
                status, answer = ask(self._url, model)
                self.answered[model] += 1
                if status != 200:
                    self.bad.append((model, status, answer))
                self._stop.wait(self._pause)

    def stop(self) -> None:
        """End after the requests in hand."""
        self._stop.set()
        self._thread.join(120)


@contextmanager
def clients(url: str, models: Sequence[str], number: int, *, pause: float = 0) -> Iterator[list[Client]]:
    """Some clients, as long as the block lasts; at its end each was answered, and always with 200."""
    running = [Client(url, models, pause) for _ in range(number)]
    try:
        yield running
    finally:
        for client in running:
            client.stop()
    bad = [answer for client in running for answer in client.bad]
    assert bad == []
    assert all(count > 0 for client in running for count in client.answered.values())


class Streams:
    """One stream after the other, the last one begun before the end of the block: each is whole, or kept in `broken`.

    They end sooner where one is refused before anything of it has come, as by an engine that was told to stop.
    """

    def __init__(self, url: str, model: str, tokens: int) -> None:
        self.whole = 0
        self.broken: list[str] = []
        self.refused: float | None = None  # when, on time.monotonic()
        self.begun = threading.Event()  # the first has arrived in part
        self._url, self._model, self._tokens = url, model, tokens
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Streams:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(300)

    def _run(self) -> None:
        while not self._stop.is_set():
            stream = Stream(self._url, self._model, "SELECT", tokens=self._tokens)
            try:
                while stream.running and not stream.token_ids:
                    self._stop.wait(0.05)
                self.begun.set()
                stream.join(300)
                assert (len(stream.token_ids), stream.finish_reason) == (self._tokens, "length")
            except AssertionError as error:
                if not stream.token_ids and not stream.running:
                    self.refused = time.monotonic()
                    return
                self.broken.append(str(error))
            else:
                self.whole += 1


def service_url(stack: Stack, namespace: str, deployment: str) -> str:
    """The Service, as pods without DNS reach it, and the node too."""
    service = stack.get("service", deployment, namespace) or {}
    return f"http://{service['spec']['clusterIP']}:{service['spec']['ports'][0]['port']}"


def answers_beside(stack: Stack, namespace: str, deployment: str, known: Collection[str]) -> bool:
    """Whether an engine answers in a pod that is none of the known: before anybody has called it Ready."""
    pods = [pod for pod in stack.pods(namespace, deployment) if pod["metadata"]["name"] not in known]
    addresses = [pod["status"]["podIP"] for pod in pods if pod["status"].get("podIP")]
    return any(request("GET", f"http://{address}:8000/health", timeout=2)[0] == 200 for address in addresses)
