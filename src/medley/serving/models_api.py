"""`/v1/models`: the names of the models, and what each can do."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from medley.serving.json_body import JsonRoute
from medley.serving.served_names import describe_model, find_model, list_names
from medley.serving.state import get_state

router = APIRouter(route_class=JsonRoute)


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    state = get_state(request)
    data = [describe_model(state, model) for model in list_names(state)]
    return {"object": "list", "data": data}


@router.get("/v1/models/{name}")
async def get_model(name: str, request: Request) -> dict[str, Any]:
    state = get_state(request)
    return describe_model(state, find_model(state, name))
