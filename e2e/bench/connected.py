"""What a change costs without kubectl: from creating a LoRAAdapter over an open connection to its answers. Needs `make demo`.

The content is in the cache already. Measured from the moment the request to create the object is sent, in milliseconds:
until the API server has answered, until the engine lists the name, until it answers a completion for it (another run, since
asking for a name that is not there yet is work for the engine), and until a watch has told that the adapter is Ready.

    python -m e2e.bench.connected [--runs 20]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import aiohttp

from e2e.bench.apply_to_answer import show
from e2e.cluster import find_cluster
from e2e.demo import FLEET, HUB_PORT, SERVING, TEAM
from e2e.stack import Json, Stack, lora_adapter
from lora_operator.kube.client import Kube, load_configuration
from lora_operator.kube.kinds import LORA_ADAPTERS

POLL_SECONDS = 0.002


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m e2e.bench.connected", description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    runs = parser.parse_args().runs
    cluster = find_cluster()
    stack = Stack(cluster, f"http://{cluster.node_ip}:{HUB_PORT}")
    (engine,) = stack.engine_urls(SERVING, FLEET).values()
    with urllib.request.urlopen(f"{stack.hub_url}/api/models/tiny/one", timeout=10) as answer:
        commit = json.loads(answer.read())["sha"]

    stack.apply(_manifest("bench-keep", commit))
    stack.wait_condition("lora", "bench-keep", TEAM)
    took = asyncio.run(_all(str(cluster.kubeconfig), engine, commit, runs=runs))
    for what, values in took.items():
        show(what, values)
    stack.delete("lora", "bench-keep", TEAM)
    return 0


def _manifest(name: str, commit: str) -> Json:
    return lora_adapter(name, TEAM, repo="tiny/one", revision=commit, deployment=(SERVING, FLEET))


async def _all(kubeconfig: str, engine: str, commit: str, *, runs: int) -> dict[str, list[float]]:
    """Milliseconds of each run by what was waited for."""
    took: dict[str, list[float]] = {"created": [], "listed": [], "answers": [], "Ready (watch)": []}
    async with Kube(await load_configuration(kubeconfig)) as kube, aiohttp.ClientSession() as clients:
        server, session = await kube.watch_session(lambda _: None)
        async with session:
            for run in range(2 * runs + 2):
                name, (asked, look) = f"bench-{run}", (("listed", _listed) if run % 2 else ("answers", _answers))
                collection = f"{server}{LORA_ADAPTERS.path(TEAM)}"
                times = await _measure(collection, session, _manifest(name, commit), clients, engine, look)
                await kube.delete(LORA_ADAPTERS, TEAM, name)
                await _until(partial(_is_gone, clients, engine, name))
                if run < 2:
                    continue  # connections and caches are made by the first
                for what, seconds in zip(("created", asked, "Ready (watch)"), times, strict=True):
                    took[what].append(seconds * 1000)
    return took


async def _measure(
    collection: str,
    session: aiohttp.ClientSession,
    manifest: Json,
    clients: aiohttp.ClientSession,
    engine: str,
    look: Callable[[aiohttp.ClientSession, str, str], Awaitable[bool]],
) -> tuple[float, float, float]:
    """Seconds until created, until `look` holds, and until a watch told Ready=True."""
    name = manifest["metadata"]["name"]
    query = {"watch": "1", "fieldSelector": f"metadata.name={name}"}
    async with session.get(collection, params=query, timeout=aiohttp.ClientTimeout(total=60)) as events:

        async def ready() -> float:
            async for line in events.content:
                if _is_ready(json.loads(line)["object"]):
                    return time.monotonic()
            raise AssertionError(f"the watch ended before {name} was Ready")

        async def there() -> float:
            await _until(partial(look, clients, engine, name))
            return time.monotonic()

        began = time.monotonic()
        waits = asyncio.gather(ready(), there())
        async with session.post(collection, json=manifest) as answer:
            assert answer.status == 201, await answer.text()
        created = time.monotonic()
        told, served = await waits
        return created - began, served - began, told - began


async def _until(look: Callable[[], Awaitable[bool]]) -> None:
    while True:
        if await look():
            return
        await asyncio.sleep(POLL_SECONDS)


def _is_ready(obj: Json) -> bool:
    conditions: list[Json] = obj.get("status", {}).get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


async def _listed(clients: aiohttp.ClientSession, engine: str, name: str) -> bool:
    async with clients.get(f"{engine}/v1/models") as answer:
        found: Any = await answer.json()
        return any(model["id"] == name for model in found["data"])


async def _is_gone(clients: aiohttp.ClientSession, engine: str, name: str) -> bool:
    return not await _listed(clients, engine, name)


async def _answers(clients: aiohttp.ClientSession, engine: str, name: str) -> bool:
    async with clients.post(f"{engine}/v1/completions", json={"model": name, "prompt": "x", "max_tokens": 1}) as answer:
        await answer.read()
        return answer.status == 200


if __name__ == "__main__":
    sys.exit(main())
