"""Registration of this server as a worker of LLaVA's controller, and its heartbeats."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from fastapi import FastAPI

from medley.serving.llava_api import worker_status
from medley.serving.state import ServerState

HEARTBEAT_SECONDS = 15.0
log = logging.getLogger("medley.serving")


def register_on_startup(app: FastAPI, state: ServerState, controller: str, own_url: str) -> None:
    """Keeps the application registered with a controller while it runs."""
    lifespan = app.router.lifespan_context

    @asynccontextmanager
    async def registered(inner: FastAPI) -> AsyncIterator[None]:
        async with lifespan(inner):
            heartbeat = asyncio.create_task(
                keep_registered(state, controller.rstrip("/"), own_url.rstrip("/"))
            )
            yield
            heartbeat.cancel()

    app.router.lifespan_context = registered


async def keep_registered(
    state: ServerState, controller: str, own_url: str, interval: float = HEARTBEAT_SECONDS
) -> None:
    """Registers, and sends heartbeats until the server drains.

    Registers again if the controller no longer lists this worker. An error is logged, and the next
    attempt follows after `interval` seconds.
    """
    is_registered = False
    headers = {"Authorization": f"Bearer {state.token}"} if state.token else {}
    async with httpx.AsyncClient(timeout=10, follow_redirects=False, headers=headers) as client:
        while not state.draining:  # The controller removes a worker without heartbeats.
            status = worker_status(state)
            try:
                if is_registered:
                    body = {"worker_name": own_url, "queue_length": status["queue_length"]}
                    response = await client.post(f"{controller}/receive_heart_beat", json=body)
                    is_registered = response.status_code == 200 and response.json().get("exist")
                if not is_registered:
                    body = {
                        "worker_name": own_url, "check_heart_beat": True, "worker_status": status,
                    }  # fmt: skip
                    response = await client.post(f"{controller}/register_worker", json=body)
                    response.raise_for_status()
                    is_registered = True
                    log.info("registered with %s as %s", controller, own_url)
            except Exception as error:  # The controller is unreachable, or its response invalid.
                is_registered = False
                log.warning("controller %s: %s", controller, error)
            await asyncio.sleep(interval)
