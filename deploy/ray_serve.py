"""The same application on a Ray cluster: serve run deploy.ray_serve:application

MEDLEY_CKPT names the checkpoint (tiny unless set), MEDLEY_REPLICAS how many of it run, MEDLEY_GPUS
how many GPUs each takes. Ray stands before the replicas and asks /health.
"""

from __future__ import annotations

import os

from fastapi import FastAPI
from ray import serve

from medley.commands.serve import ServeOptions, state_of
from medley.serving.app import make_app

OPTIONS = ServeOptions(ckpt=[os.environ.get("MEDLEY_CKPT", "tiny")])


def build() -> FastAPI:
    """Called on each replica, where the models are loaded."""
    return make_app(state_of(OPTIONS))


@serve.deployment(
    num_replicas=int(os.environ.get("MEDLEY_REPLICAS", "1")),
    ray_actor_options={"num_gpus": float(os.environ.get("MEDLEY_GPUS", "0"))},
    max_ongoing_requests=OPTIONS.rows + OPTIONS.max_queue,
    graceful_shutdown_timeout_s=OPTIONS.drain_seconds,
)
@serve.ingress(build)
class Medley:
    """One replica."""


application = Medley.bind()
