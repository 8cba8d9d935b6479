"""Probes: /healthz for liveness, /readyz for readiness. Says what this process knows of itself; asks nobody else.

Liveness fails only for what a restart repairs: an event loop that does not answer, a reconcile that hangs in spite of its time
limit. An API server that is away is no reason to restart; it shows in readiness until every kind was listed once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final

from aiohttp import web

from lora_operator.kube.kinds import Kind
from lora_operator.reconcile.queue import RUN_TIME_LIMIT, WorkQueue

HANGING_AFTER: Final = RUN_TIME_LIMIT + 60.0


def health_app(queue: WorkQueue, missing: Callable[[], Mapping[Kind, str]]) -> web.Application:
    """The two routes; `missing` has the kinds that were not listed yet, and why."""

    async def healthz(_: web.Request) -> web.Response:
        longest = queue.longest_run()
        if longest is not None and longest[1] > HANGING_AFTER:
            return web.Response(status=503, text=f"{longest[0]} has been running for {longest[1]:.0f} s\n")
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        kinds = missing()
        if kinds:
            lines = "".join(f"{kind}: {why}\n" for kind, why in sorted(kinds.items()))
            return web.Response(status=503, text=f"not listed yet:\n{lines}")
        return web.Response(text="ok\n")

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    return app


@asynccontextmanager
async def serve_health(app: web.Application, *, port: int, host: str = "0.0.0.0") -> AsyncIterator[int]:  # noqa: S104 - probes come from the node
    """Serves the probes inside the block; yields the port (for `port=0`)."""
    runner = web.AppRunner(app, access_log=None, keepalive_timeout=5, shutdown_timeout=0.5)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()
