"""The same application on a Ray cluster: serve run deploy.ray_serve:application

MEDLEY_CKPT names the checkpoint (tiny unless set), MEDLEY_REPLICAS how many of it run, MEDLEY_GPUS
how many GPUs each takes. Ray stands before the replicas.
"""

from __future__ import annotations

import os

from fastapi import FastAPI
from ray import serve

from medley.commands.serve import ServeOptions, state_of
from medley.serving.app import make_app
from medley.serving.state import State

OPTIONS = ServeOptions(ckpt=[os.environ.get("MEDLEY_CKPT", "tiny")])


STATES: list[State] = []  # of this process: a replica has one


def build() -> FastAPI:
    """Called on each replica, where the models are loaded."""
    STATES.append(state_of(OPTIONS))
    return make_app(STATES[-1])


@serve.deployment(
    num_replicas=int(os.environ.get("MEDLEY_REPLICAS", "1")),
    ray_actor_options={"num_gpus": float(os.environ.get("MEDLEY_GPUS", "0"))},
    max_ongoing_requests=OPTIONS.rows + OPTIONS.max_queue,
    graceful_shutdown_timeout_s=OPTIONS.drain_seconds,
)
@serve.ingress(build)
class Medley:
    """One replica."""

    def check_health(self) -> None:
        """Ray asks now and then, and starts a replica anew that raises."""
        for state in STATES:
            for worker in state.workers.values():
                if not worker.alive:
                    raise RuntimeError(f"the model {worker.name} is out of order")


application = Medley.bind()
