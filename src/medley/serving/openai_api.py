"""OpenAI's protocol: the routes of all its endpoints."""

from __future__ import annotations

from fastapi import APIRouter

from medley.serving import (
    chat_api,
    completions_api,
    embeddings_api,
    images_api,
    models_api,
    responses_api,
    tokens_api,
)
from medley.serving.json_body import JsonRoute

router = APIRouter(route_class=JsonRoute)
for api in (
    models_api, chat_api, responses_api, completions_api, images_api, embeddings_api,
    tokens_api,
):  # fmt: skip
    router.include_router(api.router)
