"""A worker tells LLaVA's controller that it is there, and goes on telling."""

from __future__ import annotations

import asyncio
import logging

import httpx

from medley.serving.llava_api import status_of
from medley.serving.state import State

HEART_BEAT = 15.0  # seconds
log = logging.getLogger("medley.serving")


async def keep_registered(
    state: State, controller: str, own: str, every: float = HEART_BEAT
) -> None:
    """Registers, and again whenever the controller does not know us any more, until the server
    drains. A controller that is away is asked again at the next beat."""
    known = False
    headers = {"Authorization": f"Bearer {state.token}"} if state.token else {}
    async with httpx.AsyncClient(timeout=10, follow_redirects=False, headers=headers) as client:
        while not state.draining:  # a controller forgets who is silent
            status = status_of(state)
            try:
                if known:
                    beat = {"worker_name": own, "queue_length": status["queue_length"]}
                    found = await client.post(f"{controller}/receive_heart_beat", json=beat)
                    known = found.status_code == 200 and bool(found.json().get("exist"))
                if not known:
                    body = {"worker_name": own, "check_heart_beat": True, "worker_status": status}
                    found = await client.post(f"{controller}/register_worker", json=body)
                    found.raise_for_status()
                    known = True
                    log.info("registered with %s as %s", controller, own)
            except Exception as error:  # whatever it answers, or cannot be reached for
                known = False
                log.warning("the controller %s: %s", controller, error)
            await asyncio.sleep(every)
