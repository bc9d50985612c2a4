"""The server of `medley serve` on a Ray cluster: serve run deploy.ray_serve:application

MEDLEY_CKPT is the checkpoint (tiny by default), MEDLEY_REPLICAS the number of replicas, and
MEDLEY_GPUS the number of GPUs of each. Ray balances the load over the replicas.
"""

from __future__ import annotations

import os

from fastapi import FastAPI
from ray import serve

from medley.commands.serve import ServeOptions, load_state
from medley.serving.app import make_app
from medley.serving.state import ServerState

OPTIONS = ServeOptions(ckpt=[os.environ.get("MEDLEY_CKPT", "tiny")])


STATES: list[ServerState] = []  # of this process; a replica has one


def build() -> FastAPI:
    """Loads the models and makes the application; runs on each replica."""
    STATES.append(load_state(OPTIONS))
    return make_app(STATES[-1])


@serve.deployment(
    num_replicas=int(os.environ.get("MEDLEY_REPLICAS", "1")),
    ray_actor_options={"num_gpus": float(os.environ.get("MEDLEY_GPUS", "0"))},
    max_ongoing_requests=OPTIONS.max_num_seqs + OPTIONS.max_queue,
    graceful_shutdown_timeout_s=OPTIONS.drain_seconds,
)
@serve.ingress(build)
class Medley:
    """One replica."""

    def check_health(self) -> None:
        """Raises RuntimeError if an engine thread has stopped; Ray then restarts the replica."""
        for state in STATES:
            for worker in state.workers.values():
                if not worker.is_alive:
                    raise RuntimeError(f"Model {worker.name} is unavailable: its engine stopped.")


application = Medley.bind()
